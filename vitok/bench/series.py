"""How cost grows with pixels and frames, and what mixed sizes in one call cost beside a uniform batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vitok.bench.machine import FACTS
from vitok.bench.measure import reason
from vitok.bench.models import SKIPPED, Workload, disagreement, figures, macs, peak_memory
from vitok.bench.rows import Rows
from vitok.bench.timing import compare
from vitok.count import count
from vitok.errors import InputError

SCALE_KEY = ("case", "frames", "size", "dtype")
SCALE_COLUMNS = (
    *SCALE_KEY, "provider", "ms_p20", "ms_p50", "ms_p95", "samples", "ns_per_pixel", "mpixel_per_s", "tokens", "gmac",
    "gflop", "peak_mb", "refused", *FACTS,
)  # fmt: skip
SIZES, FRAMES = (128, 256, 512, 1024, 2048, 4096), (1, 4, 16, 64)
PACKED_KEY = ("case", "path", "what", "dtype")
PACKED_COLUMNS = (
    *PACKED_KEY, "provider", "ms_p20", "ms_p50", "ms_p95", "samples", "tokens", "tokens_per_s", "percent_of_uniform",
    "gmac", "gflop", "refused", *FACTS,
)  # fmt: skip
# Tokens down and across of pictures that have as many tokens as eight of 16 x 16.
MIXED = ((8, 8), (12, 16), (16, 16), (16, 16), (16, 20), (20, 20), (16, 24), (11, 16))
JUDGED = 2  # of them, the first and smallest, are held to float64, which is slow


class Scale:
    """Encode and decode of one picture or clip, larger and larger, until a call would take longer than `limit` s."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, providers: Sequence[str], seconds: float, limit: float
    ) -> None:
        self.device, self.dtype, self.providers = device, dtype, tuple(providers)
        self.seconds, self.limit = seconds, limit
        self._works: dict[str, Workload] = {}
        self._pace: dict[tuple[str, str], float] = {}  # seconds a multiply-accumulate took at the size before

    def key(self, name: str, frames: int, size: int) -> dict[str, object]:
        values = (name, frames, size, str(self.dtype).removeprefix("torch."))
        return dict(zip(SCALE_KEY, values, strict=True))

    @torch.inference_mode()
    def measure(self, name: str, frames: int, size: int, rows: Rows) -> None:
        if name not in self._works:
            self._works = {name: Workload(name, size, frames, self.device)}  # one model at a time
        work = self._works[name].at(frames, size)
        operations, pixels = macs(work, "both"), frames * size**2
        calls, refused, peaks = {}, {}, {}
        for provider in self.providers:
            expected = operations * self._pace.get((name, provider), 0.0)
            if expected > self.limit:
                refused[provider] = f"{SKIPPED}it would take about {expected:.3g} s, more than --limit {self.limit:g}"
                continue
            try:
                call = work.coder(provider, self.dtype).call("both", *work.inputs(1))
                if not torch.isfinite(call()).all():
                    refused[provider] = "its numbers are not finite"
                    continue
                peaks[provider] = peak_memory(call, self.device)
                calls[provider] = [call]
            except InputError as error:
                refused[provider] = f"{SKIPPED}{error}"
            except Exception as error:
                refused[provider] = reason(error)
        timings, failed = compare(calls, self.device, len(calls) * self.seconds, graph=False)
        refused |= {provider: reason(error) for provider, error in failed.items()}
        key, added = self.key(name, frames, size), []
        tokens = count(work.config, size=size, frames=frames).tokens
        for provider, timing in timings.items():
            self._pace[name, provider] = timing.p50 / 1e3 / operations
            rates = {"ns_per_pixel": 1e6 * timing.p50 / pixels, "mpixel_per_s": pixels / timing.p50 / 1e3}
            more = {"tokens": tokens, "peak_mb": peaks[provider]}
            added.append({**key, "provider": provider, **figures(timing, operations), **rates, **more})
        rows.replace(key, [*added, *({**key, "provider": p, "refused": why} for p, why in refused.items())])


PACKED = ("uniform batch", "packed", "one by one")
PATHS = ("vitok", "vitok fast bf16")  # the model as it is, and made ready for inference


def packed_key(name: str, path: str, what: str, dtype: torch.dtype) -> dict[str, object]:
    dtype = dtype if path == "vitok" else torch.bfloat16
    return dict(zip(PACKED_KEY, (name, path, what, str(dtype).removeprefix("torch.")), strict=True))


@torch.inference_mode()
def measure_packed(
    name: str, path: str, what: str, device: torch.device, dtype: torch.dtype, seconds: float, rows: Rows
) -> None:
    """Pictures of mixed sizes in one call, one by one, and as many tokens as a batch of equal ones."""
    patch = Workload(name, 16, 1, device).config.patch
    work = Workload(name, 16 * patch, 1, device)
    key = packed_key(name, path, what, dtype)
    if path == "vitok":
        model = work.model(dtype)
    else:
        dtype = torch.bfloat16
        model = work.model(torch.float32).for_inference(dtype)
    generator = torch.Generator().manual_seed(0)
    pixels, latents = work.inputs(8)
    shapes = [(1, y * patch, x * patch, 3) for y, x in MIXED]
    pictures = [torch.randint(0, 256, s, dtype=torch.uint8, generator=generator).to(device) for s in shapes]
    codes = [torch.randn(1, latents.shape[1], y, x, generator=generator).to(device, dtype) for y, x in MIXED]
    encode = partial(model.encode, layout="channels_last")
    calls: dict[str, Any] = {
        "uniform batch": lambda: [encode(pixels).mode()],
        "packed": lambda: [p.mode() for p in model.encode_packed(pictures, layout="channels_last")],
        "one by one": lambda: [encode(x).mode() for x in pictures],
    }
    if what == "decode":
        latents = latents.to(dtype)
        calls = {
            "uniform batch": lambda: [model.decode(latents)],
            "packed": lambda: model.decode_packed(codes),
            "one by one": lambda: [model.decode(z) for z in codes],
        }
    wide = work.model(torch.float64)
    oracle: list[Tensor] = (
        [wide.encode(x, layout="channels_last").mode() for x in pictures[:JUDGED]]
        if what == "encode"
        else [wide.decode(z.double()) for z in codes[:JUDGED]]
    )
    refused = {}
    if wrong := disagreement(calls["packed"]()[:JUDGED], calls["one by one"]()[:JUDGED], oracle):
        refused["packed"] = f"its numbers are not those of the pictures one by one: {wrong}"
        del calls["packed"]
    timings, failed = compare({n: [call] for n, call in calls.items()}, device, len(calls) * seconds, graph=False)
    refused |= {provider: reason(error) for provider, error in failed.items()}
    tokens = 8 * 16 * 16
    added = []
    for provider, timing in timings.items():
        sizes = [(16 * patch,) * 2] * 8 if provider == "uniform batch" else [(y * patch, x * patch) for y, x in MIXED]
        counts = [count(work.config, size=size) for size in sizes]
        operations = sum(c.encoder_macs if what == "encode" else c.decoder_macs for c in counts)
        row = figures(timing, operations) | {"tokens": tokens, "tokens_per_s": tokens / (timing.p50 / 1e3)}
        if "uniform batch" in timings:
            row["percent_of_uniform"] = 100 * timings["uniform batch"].p50 / timing.p50
        added.append({**key, "provider": provider, **row})
    rows.replace(key, [*added, *({**key, "provider": p, "refused": why} for p, why in refused.items())])
