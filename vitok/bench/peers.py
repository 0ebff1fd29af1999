"""The auto-encoders people use today, from diffusers, with random weights beside ours in the same process.

Each is timed in the dtype and memory layout in which it is fastest: what is clearly slower on a small input is left out
and says so. Their input is a float image, which is made outside the timed call; ours are bytes.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitok.bench.machine import FACTS
from vitok.bench.measure import reason
from vitok.bench.models import SKIPPED, Judge, Workload, compare_with_products, figures, macs
from vitok.bench.rows import Rows
from vitok.bench.timing import compare
from vitok.errors import InputError

KEY = ("case", "what")
COLUMNS = (
    *KEY, "provider", "input", "dtype", "layout", "ms_p20", "ms_p50", "ms_p95", "samples", "gmac", "gflop",
    "percent_of_matmul", "macs_ratio", "time_ratio", "refused", *FACTS,
)  # fmt: skip
ABSENT = f"{SKIPPED}diffusers is not installed (pip install vitok[peers])"
CLOSE = 1.25  # how many times slower than the fastest on a small input a variant may be and still be timed
LONG_SECONDS = 5.0  # a call of which only the variant that is fastest on a small input is timed
FAR = 2.0  # how many times slower one convolution may be in a dtype for models of it to be tried
STACK: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}


def _dc_ae(diffusers: Any) -> nn.Module:
    """dc-ae-f32c32-sana-1.0."""
    sides: dict[str, Any] = {}
    for side, layers in (("encoder", (2, 2, 2, 3, 3, 3)), ("decoder", (3,) * 6)):
        sides[f"{side}_block_types"] = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
        sides[f"{side}_block_out_channels"] = (128, 256, 512, 512, 1024, 1024)
        sides[f"{side}_layers_per_block"] = layers
        sides[f"{side}_qkv_multiscales"] = ((),) * 3 + ((5,),) * 3
    make: Callable[..., nn.Module] = diffusers.AutoencoderDC
    return make(
        latent_channels=32, attention_head_dim=32, downsample_block_type="conv", upsample_block_type="interpolate",
        **sides,
    )  # fmt: skip


def _cogvideox(diffusers: Any) -> nn.Module:
    make: Callable[..., nn.Module] = diffusers.AutoencoderKLCogVideoX
    down, up = ("CogVideoXDownBlock3D",) * 4, ("CogVideoXUpBlock3D",) * 4
    return make(down_block_types=down, up_block_types=up, latent_channels=16, block_out_channels=(128, 256, 256, 512))


@dataclass(frozen=True)
class Peer:
    """`make(diffusers)` is the model in its published configuration; for clips it takes one frame more than ours."""

    name: str
    make: Callable[[Any], nn.Module]
    clip: bool = False

    def shape(self, frames: int, size: int) -> tuple[int, ...]:
        return (1, 3, frames + 1, size, size) if self.clip else (1, 3, size, size)


PEERS = (
    Peer("SD-VAE f8", lambda d: d.AutoencoderKL(**STACK, latent_channels=4)),
    Peer(
        "FLUX-like f8c16",
        lambda d: d.AutoencoderKL(**STACK, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False),
    ),
    Peer("DC-AE f32", _dc_ae),
    Peer("TAESD", lambda d: d.AutoencoderTiny()),
    Peer("Wan 2.1", lambda d: d.AutoencoderKLWan(), clip=True),
    Peer("LTX", lambda d: d.AutoencoderKLLTXVideo(), clip=True),
    Peer("CogVideoX", _cogvideox, clip=True),
)


def chosen(names: Sequence[str], clip: bool) -> list[Peer]:
    return [peer for peer in PEERS if peer.clip == clip and peer.name in names]


def library() -> Any:
    """The package diffusers, imported when it is first needed."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it complains of picture processors that nobody asked for
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    return diffusers


def encode(model: Any, pixels: Tensor) -> Tensor:
    out = model.encode(pixels)
    latents: Tensor = out.latent_dist.mode() if hasattr(out, "latent_dist") else out[0]
    return latents


def decode(model: Any, latents: Tensor) -> Tensor:
    pixels: Tensor = model.decode(latents).sample
    return pixels


@torch.no_grad()
def operations(peer: Peer, shape: tuple[int, ...]) -> tuple[dict[str, int], Tensor]:
    """Multiply-accumulates of encode and decode on one input, counted without computing, and the latents' shape."""
    with torch.device("meta"):
        model, pixels = peer.make(library()).eval(), torch.empty(shape)
        with FlopCounterMode(display=False) as encoding:
            latents = encode(model, pixels)
        with FlopCounterMode(display=False) as decoding:
            decode(model, latents)
    return {"encode": encoding.get_total_flops() // 2, "decode": decoding.get_total_flops() // 2}, latents


@dataclass(frozen=True)
class Variant:
    dtype: torch.dtype
    channels_last: bool
    compiled: bool = False

    @property
    def layout(self) -> str:
        return ("channels last" if self.channels_last else "contiguous") + (", compiled" if self.compiled else "")

    def cast(self, x: Tensor) -> Tensor:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d} if self.channels_last else {}
        return x.to(self.dtype).to(memory_format=formats.get(x.dim(), torch.preserve_format))

    def cast_model(self, model: nn.Module) -> nn.Module:
        for parameter in model.parameters():
            parameter.data = self.cast(parameter.data)
        return model.to(self.dtype)


def variants(device: torch.device) -> list[Variant]:
    dtypes = (torch.bfloat16,) if device.type == "cuda" else (torch.float32, torch.bfloat16)
    eager = [Variant(dtype, channels_last) for dtype, channels_last in product(dtypes, (False, True))]
    return [*eager, *([Variant(torch.bfloat16, True, compiled=True)] if device.type == "cuda" else [])]


class Peers:
    """The rows of one size: ours, and every peer that takes it."""

    def __init__(
        self,
        device: torch.device,
        ours: Sequence[str],
        peers: Sequence[str],
        dtype: torch.dtype,
        seconds: float,
        limit: float,
    ) -> None:
        self.device, self.ours, self.peers, self.dtype = device, ours, peers, dtype
        self.seconds, self.limit = seconds, limit
        self._work: Workload | None = None
        self._clip = False
        self._slower: dict[tuple[str, str], tuple[dict[Variant, str], Variant | None, float]] = {}
        self._models: dict[tuple[Peer, Variant], nn.Module] = {}

    def providers(self, frames: int) -> tuple[str, ...]:
        known = [peer.name for peer in chosen(self.peers, frames > 1)] if find_spec("diffusers") else ["diffusers"]
        return (*self.ours, *(known if self.peers else []))

    @torch.no_grad()
    def measure(self, name: str, frames: int, size: int, what: str, rows: Rows) -> None:
        """Add the rows of ours, which is model `name`, and of the peers on one picture or clip."""
        torch.compiler.reset()  # or the compiler gives up on functions that it has compiled too often
        if self._clip != (frames > 1):
            self._clip, self._models = frames > 1, {}  # those of pictures make room for those of clips
        key = {"case": f"{frames} x {size} x {size}", "what": what}
        if self._work is None or self._work.name != name:
            self._work = Workload(name, size, frames, self.device)
        work = self._work.at(frames, size)
        pixels, latents = work.inputs(1)
        judge = Judge(work, what, pixels, latents)
        calls: dict[int, list[Callable[[], object]]] = {}
        about: dict[int, dict[str, Any]] = {}
        refused: list[dict[str, Any]] = []
        for provider in self.ours:
            row: dict[str, Any] = {"provider": provider, "input": list(pixels.shape), "layout": name}
            try:
                coder = work.coder(provider, self.dtype)
                row["dtype"] = coder.dtype
                call = coder.call(what, pixels, latents)
                if why := judge(coder, call):
                    refused.append(row | {"refused": why})
                    continue
                calls[len(about)], about[len(about)] = [call], row | {"macs": macs(work, what)}
            except InputError as error:
                refused.append(row | {"refused": f"{SKIPPED}{error}"})
            except Exception as error:
                refused.append(row | {"refused": reason(error)})
        if not find_spec("diffusers") and self.peers:
            refused.append({"provider": "diffusers", "refused": ABSENT})
        for peer in chosen(self.peers, frames > 1) if find_spec("diffusers") else []:
            row = {"provider": peer.name, "input": list(peer.shape(frames, size))}
            try:
                made, slower = self._fastest(peer, frames, size, what)
                refused += [row | {"refused": why, **variant} for variant, why in slower]
                for call, variant in made:
                    calls[len(about)], about[len(about)] = [call], row | variant
            except InputError as error:
                refused.append(row | {"refused": f"{SKIPPED}{error}"})
            except Exception as error:
                refused.append(row | {"refused": reason(error)})
        named = {str(number): call for number, call in calls.items()}
        dtypes = {str(number): row["dtype"] for number, row in about.items()}
        timings, failed, rates = compare_with_products(named, dtypes, self.device, self.seconds)
        refused += [about[int(number)] | {"refused": reason(error)} for number, error in failed.items()]
        ours = [(timings[str(n)].p50, row["macs"]) for n, row in about.items() if self._timed(row, n, timings)]
        added = []
        for number, timing in timings.items():
            row = about[int(number)]
            row |= figures(timing, row["macs"], rates[row["dtype"]])
            if ours:
                time, least = min(ours)
                row |= {"macs_ratio": row["macs"] / least, "time_ratio": timing.p50 / time}
            added.append(row)
        for row in (*added, *refused):
            row.update(key, dtype=str(row.get("dtype", "")).removeprefix("torch."))
            row["input"] = " x ".join(map(str, row.get("input", [])))
        rows.replace(key, [{name: value for name, value in row.items() if name != "macs"} for row in added + refused])

    def _timed(self, row: dict[str, Any], number: int, timings: Any) -> bool:
        return row["provider"] in self.ours and str(number) in timings

    def _fastest(self, peer: Peer, frames: int, size: int, what: str) -> tuple[list[Any], list[Any]]:
        """(call, columns) of the variants worth timing, and (columns, why not) of the others."""
        shape = peer.shape(frames, size)
        small = shape if self.device.type == "cuda" else peer.shape(min(frames, 8), min(size, 32 if peer.clip else 64))
        counts, latents = operations(peer, shape)
        if (peer.name, what) not in self._slower:
            self._slower[peer.name, what] = self._slow_variants(peer, small, what)
        slower, best, pace = self._slower[peer.name, what]
        if (expected := pace * counts[what]) > self.limit:
            raise InputError(f"it would take about {expected:.3g} s, more than --limit {self.limit:g}")
        if expected > LONG_SECONDS:
            slower = {
                v: f"{SKIPPED}not the fastest on a small input" for v in variants(self.device) if v != best
            } | slower
        columns = {v: {"dtype": v.dtype, "layout": v.layout} for v in variants(self.device)}
        made = [
            (self._call(peer, v, shape, what, latents), columns[v] | {"macs": counts[what]})
            for v in columns
            if v not in slower
        ]
        return made, [(columns[v], why) for v, why in slower.items()]

    def _slow_variants(
        self, peer: Peer, small: tuple[int, ...], what: str
    ) -> tuple[dict[Variant, str], Variant | None, float]:
        """Why not to time a variant at full size; the fastest one and its seconds a multiply-accumulate.

        On a GPU, where that takes no time, all are timed. Raises ValueError when a variant gives no finite numbers.
        """
        counts, latents = operations(peer, small)
        on_cpu = self.device.type == "cpu"
        times = {dtype: _convolution_seconds(dtype, peer.clip) for dtype in (torch.float32, torch.bfloat16) if on_cpu}
        slower: dict[Variant, str] = {}
        ways: dict[Variant, float] = {}
        for variant in variants(self.device):
            if times and (ratio := times[variant.dtype] / min(times.values())) > FAR:
                slower[variant] = f"{SKIPPED}one convolution is {ratio:.1f} times slower here than in the other dtype"
                continue
            call = self._call(peer, variant, small, what, latents)
            if not torch.isfinite(call()).all():
                raise ValueError("its numbers are not finite")
            if on_cpu:
                timings, _ = compare({"": [call]}, self.device, 0.0, graph=False)
                ways[variant] = timings[""].p50
        best = min(ways.values(), default=0.0)
        on = " x ".join(map(str, small))
        for variant, time in ways.items():
            if time > CLOSE * best:
                slower[variant] = f"{SKIPPED}{time / best:.1f} times slower than another variant on {on}"
        return slower, min(ways, key=ways.__getitem__, default=None), best / 1e3 / counts[what]

    def _call(
        self, peer: Peer, variant: Variant, shape: tuple[int, ...], what: str, latents: Tensor
    ) -> Callable[[], Tensor]:
        if (peer, variant) not in self._models:
            torch.manual_seed(0)
            with torch.device(self.device):
                self._models[peer, variant] = variant.cast_model(peer.make(library()).eval())
        model = self._models[peer, variant]
        x = torch.rand(shape) * 2 - 1 if what == "encode" else torch.randn(latents.shape)
        x = variant.cast(x.to(self.device))
        function = encode if what == "encode" else decode
        run: Any = torch.compile(function, dynamic=False) if variant.compiled else function
        return torch.no_grad()(lambda: run(model, x))


@cache
def _convolution_seconds(dtype: torch.dtype, clip: bool) -> float:
    """Of the faster layout."""
    conv = (nn.Conv3d if clip else nn.Conv2d)(128, 128, 3, padding=1)
    x = torch.randn(1, 128, *((4,) if clip else ()), 32, 32)
    calls = {}
    for channels_last in (False, True):
        variant = Variant(dtype, channels_last)
        model, inputs = variant.cast_model(copy.deepcopy(conv)), variant.cast(x)
        calls[str(channels_last)] = [torch.no_grad()(partial(model, inputs))]
    timings, _ = compare(calls, torch.device("cpu"), 0.1, graph=False)
    return min(timing.p20 for timing in timings.values())
