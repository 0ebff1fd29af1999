"""What the benchmarks of whole models time: ours in its precisions, its eager reference, and what torch makes of that.

All compute with the same weights, rounded to bfloat16. A provider prints a time only if its numbers are as near to the
float64 reference as the eager reference in the same dtype is; in 8 bits, if the demo weights lose little PSNR by it.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.nn import functional as F

from vitok import ops
from vitok.bench.machine import FACTS
from vitok.bench.measure import reason
from vitok.bench.rows import Rows
from vitok.bench.timing import Timing, compare, product
from vitok.checkpoint import create_model, load
from vitok.count import count
from vitok.errors import InputError
from vitok.evaluate.reconstruction import score_folder
from vitok.model import ViTok
from vitok.ops._registry import preferring
from vitok.ops.linear import product_dtype

WHATS = ("encode", "decode", "both", "train")
KEY = ("case", "frames", "size", "batch", "dtype", "what")
COLUMNS = (
    *KEY, "provider", "ms_p20", "ms_p50", "ms_p95", "samples", "images_per_s", "gmac", "gflop", "percent_of_matmul",
    "linear_share", "ratio_to_reference", "tokens_per_s", "mpixel_per_s", "peak_mb", "psnr_change_db", "refused",
    *FACTS,
)  # fmt: skip
SKIPPED = "skipped: "
"""How `refused` begins for what this machine cannot do, which is no failure."""
LINEAR = "linear layers alone"
LOSSES = {"int8": 0.15, "fp8": 0.10}
"""dB of PSNR that the demo weights may lose."""


@dataclass(frozen=True)
class Coder:
    """`encode` pixels to latents and `decode` them; `step` is a training step on pixels and returns two gradients."""

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    step: Callable[[Tensor], Any] | None = None
    precision: str = ""  # "int8" or "fp8"

    def call(self, what: str, pixels: Tensor, latents: Tensor) -> Callable[[], Any]:
        if what == "both":
            return lambda: self.decode(self.encode(pixels))
        if what == "train":
            if self.step is None:
                raise InputError("it does not train")
            return partial(self.step, pixels)
        return partial(self.encode, pixels) if what == "encode" else partial(self.decode, latents.to(self.dtype))


@dataclass
class Workload:
    """A model and random inputs of one size."""

    name: str
    size: int
    frames: int
    device: torch.device
    photos: Path | None = None
    models: dict[torch.dtype, ViTok] = field(default_factory=dict)
    coders: dict[tuple[str, torch.dtype], Coder | str] = field(default_factory=dict)
    providers: dict[str, Callable[[Workload, torch.dtype], Coder]] = field(default_factory=lambda: PROVIDERS)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        stored = "/" not in self.name or Path(self.name).is_dir()
        model = load(self.name) if stored else create_model(self.name)
        self.models[torch.float32] = model.bfloat16().float().to(self.device).eval()
        self.config = model.config

    def model(self, dtype: torch.dtype) -> ViTok:
        if dtype not in self.models:
            self.models[dtype] = copy.deepcopy(self.models[torch.float32]).to(dtype)
        return self.models[dtype]

    def at(self, frames: int, size: int) -> Workload:
        """The same model with inputs of another size."""
        other = copy.copy(self)
        other.frames, other.size = frames, size
        return other

    def coder(self, provider: str, dtype: torch.dtype) -> Coder:
        """Of a provider, built once; one that cannot be built says so each time."""
        key = provider, dtype
        if key not in self.coders:
            try:
                self.coders[key] = self.providers[provider](self, dtype)
            except InputError as error:
                self.coders[key] = str(error)
        built = self.coders[key]
        if isinstance(built, str):
            raise InputError(built)
        return built

    def inputs(self, batch: int) -> tuple[Tensor, Tensor]:
        """uint8 pixels and bfloat16 latents; of pictures when there is one frame."""
        generator = torch.Generator().manual_seed(0)
        shape = (batch, self.frames, self.size, self.size, 3)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        grid = self.config.grid(self.frames, self.size, self.size)
        latents = torch.randn(batch, self.config.channels, *grid, generator=generator).bfloat16()
        if self.frames == 1:
            pixels, latents = pixels[:, 0], latents[:, :, 0]
        return pixels.to(self.device), latents.to(self.device)


def plain(work: Workload, dtype: torch.dtype, **compiled: Any) -> Coder:
    """A model as it is; `compiled` are arguments of torch.compile, which is used when there are any."""
    model = work.model(dtype)

    def encode(pixels: Tensor) -> Tensor:
        return model.encode(pixels, layout="channels_last").mode()

    def decode(latents: Tensor) -> Tensor:
        return model.decode(latents)

    step = _train_step(work.models[torch.float32], dtype, **compiled)
    if compiled:
        compiler = partial(torch.compile, dynamic=False, fullgraph=True, **compiled)
        return Coder(torch.no_grad()(compiler(encode)), torch.no_grad()(compiler(decode)), dtype, step)
    return Coder(torch.inference_mode()(encode), torch.inference_mode()(decode), dtype, step)


def reference(work: Workload, dtype: torch.dtype, freezing: bool = False, **compiled: Any) -> Coder:
    """The same with every op's eager reference."""
    coder = plain(work, dtype, **compiled)

    def inside(call: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def run(x: Tensor) -> Any:
            with preferring("reference"), torch._inductor.config.patch(freezing=freezing):
                return call(x)

        return run

    step = None if freezing else inside(coder.step or coder.encode)
    return Coder(inside(coder.encode), inside(coder.decode), dtype, step)


def freezing(work: Workload, dtype: torch.dtype) -> Coder:
    if work.device.type != "cpu":
        raise InputError("torch.compile freezes weights for the CPU")
    return reference(work, dtype, freezing=True, mode="default")


def fast(work: Workload, _: torch.dtype, precision: torch.dtype | str) -> Coder:
    """Ours made ready for inference."""
    model = work.model(torch.float32).for_inference(dtype=precision, graphs="auto")
    quantized = precision if isinstance(precision, str) else ""
    return Coder(
        torch.inference_mode()(lambda pixels: model.encode(pixels, layout="channels_last").mode()),
        torch.inference_mode()(model.decode),
        torch.bfloat16 if isinstance(precision, str) else precision,
        precision=quantized,
    )


PROVIDERS: dict[str, Callable[[Workload, torch.dtype], Coder]] = {
    "reference": reference,
    "vitok": plain,
    "vitok fast bf16": partial(fast, precision=torch.bfloat16),
    "vitok fast fp32": partial(fast, precision=torch.float32),
    "vitok fast int8": partial(fast, precision="int8"),
    "vitok fast fp8": partial(fast, precision="fp8"),
    "compile": partial(reference, mode="default"),
    "compile max-autotune": partial(reference, mode="max-autotune"),
    "compile freezing": freezing,
    LINEAR: lambda work, dtype: linear_layers(work, dtype),
}


def _train_step(base: ViTok, dtype: torch.dtype, **compiled: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Forward in `dtype` by autocast, loss, backward, AdamW. The model is copied when the step is first made."""
    made: list[Any] = []

    def step(pixels: Tensor) -> tuple[Tensor, Tensor]:
        if not made:
            model = copy.deepcopy(base).to(torch.float64 if dtype == torch.float64 else torch.float32).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)  # weights stay as they were judged
            loss = partial(_loss, model)
            made.extend((model, optimizer, torch.compile(loss, dynamic=False, **compiled) if compiled else loss))
        model, optimizer, loss = made
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = loss(pixels)
        value.backward()
        optimizer.step()
        return model.encoder.embed.weight.grad, model.decoder.unembed.weight.grad

    return step


def _loss(model: ViTok, pixels: Tensor) -> Tensor:
    posterior = model.encode(pixels, layout="channels_last")
    rows = model.decode_patches(posterior.mode())  # no noise: the compiler takes minutes over its reference
    target = pixels if pixels.dim() == 5 else pixels.unsqueeze(1)
    distance = ops.pixel_loss(rows, target, tubelet=model.config.tubelet, kind="l2")
    return distance.mean() + 1e-6 * posterior.kl().mean()


def linear_layers(work: Workload, dtype: torch.dtype) -> Coder:
    """The matrices of the blocks one after the other, nothing between them, each as this machine does it fastest."""

    def layers(part: nn.Module, x: Tensor) -> list[tuple[Callable[..., Any], Tensor]]:
        tokens = x.numel() // x.shape[1 if part is model.decoder else -1]  # of latents, or pixels
        if part is model.encoder:
            tokens //= work.config.tubelet_elements // 3
        modules = [m for m in part.modules() if isinstance(m, nn.Linear)]
        shared = {m.in_features: torch.randn(tokens, m.in_features, device=x.device).to(dtype) for m in modules}
        known: dict[torch.Size, Callable[..., Any]] = {}
        result = []
        for m in modules:
            inputs = shared[m.in_features]
            if m.weight.shape not in known:
                known[m.weight.shape] = _fastest_linear(m, inputs)
            result.append((known[m.weight.shape](m, inputs), inputs))
        return result

    model = work.model(dtype)
    made: dict[tuple[nn.Module, torch.Size], list[tuple[Callable[..., Any], Tensor]]] = {}

    @torch.no_grad()
    def run(part: nn.Module, x: Tensor) -> Tensor:
        if (part, x.shape) not in made:
            made[part, x.shape] = layers(part, x)
        for layer, inputs in made[part, x.shape]:
            layer(inputs)
        return x

    def encode(pixels: Tensor) -> Tensor:
        run(model.encoder, pixels)
        grid = work.config.grid(*(1, *pixels.shape[1:-1])[-3:])
        return pixels.new_empty(len(pixels), work.config.channels, *grid, dtype=dtype)

    rows: dict[tuple[int, int], Tensor] = {}

    @torch.no_grad()
    def step(pixels: Tensor) -> tuple[Tensor, ...]:
        """Each matrix forward, and the products that give the gradients of its inputs and of itself."""
        tokens = len(pixels) * count(work.config, size=work.size, frames=work.frames).tokens
        last: Tensor = pixels
        for m in (m for part in (model.encoder, model.decoder) for m in part.modules() if isinstance(m, nn.Linear)):
            if (inputs := rows.get((tokens, m.in_features))) is None:
                inputs = torch.randn(tokens, m.in_features, device=pixels.device).to(dtype)
                rows[tokens, m.in_features] = inputs
            out = F.linear(inputs, m.weight, m.bias)
            last = out.t() @ inputs
            out @ m.weight
        return (last,)

    return Coder(encode, partial(run, model.decoder), dtype, step)


def _torch_linear(m: nn.Linear, x: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, m.weight, m.bias)


def _our_linear(m: nn.Linear, x: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: ops.linear(x, m.weight, m.bias)


def _prepacked_linear(m: nn.Linear, x: Tensor) -> Callable[[Tensor], Tensor]:
    weight = torch.ops.mkldnn._reorder_linear_weight(m.weight.detach(), len(x))
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, m.bias, "none", [], "")


def _our_packed_linear(m: nn.Linear, x: Tensor) -> Callable[[Tensor], Tensor]:
    return ops.pack_linear(m.weight, m.bias, dtype=x.dtype)


_LINEARS = (_torch_linear, _our_linear, _prepacked_linear, _our_packed_linear)


def _fastest_linear(m: nn.Linear, x: Tensor) -> Callable[[nn.Linear, Tensor], Callable[[Tensor], Tensor]]:
    if x.device.type != "cpu":
        return _torch_linear
    ways: dict[str, list[Callable[[], object]]] = {}
    for make in _LINEARS:
        with suppress(Exception):  # what torch or this machine lacks is not the fastest
            ways[make.__name__] = [partial(make(m, x), x)]
    timings, _ = compare(ways, x.device, seconds=0.02, graph=False)
    return next(make for make in _LINEARS if make.__name__ == min(timings, key=lambda name: timings[name].p20))


def disagreement(actual: Sequence[Tensor], baseline: Sequence[Tensor], oracle: Sequence[Tensor]) -> str:
    """How much larger errors are than they may be, or "": the largest at most twice and their RMS at most 1.5 times the
    baseline's, with a floor of two roundings."""
    for a, b, o in zip(actual, baseline, oracle, strict=True):
        if a.shape != o.shape or not torch.isfinite(a).all():
            return f"{list(a.shape)} for {list(o.shape)}, or not finite"
        floor = 2 * torch.finfo(a.dtype).eps * o.abs().max().item()
        ours, theirs = ((x.double() - o.double()).abs() for x in (a, b))
        (most, rms), (its_most, its_rms) = ((e.max().item(), e.square().mean().sqrt().item()) for e in (ours, theirs))
        if most > 2 * its_most + floor or rms > 1.5 * its_rms + floor:
            return f"largest error {most:.2g}, RMS {rms:.2g}, where the reference has {its_most:.2g} and {its_rms:.2g}"
    return ""


@cache
def psnr_change(precision: str, device: torch.device, photos: Path | None) -> float:
    """Mean PSNR of the demo weights on the example photographs, in 8 bits minus in float32."""
    if photos is None or not photos.is_dir():
        raise InputError("its loss on the demo weights needs photographs; name a folder of them by --photos")
    demo = load("demo", device=device)
    both = []
    for model in (demo, demo.for_inference(dtype=precision, graphs="auto")):

        @torch.inference_mode()
        def through(pixels: Tensor, model: ViTok = model) -> Tensor:
            latents = model.encode(pixels, layout="channels_last").mode()
            return model.decode(latents, size=tuple(pixels.shape[1:3])).float()

        scores = [score.psnr for score in score_folder(photos, 256, through) if not score.error]
        both.append(sum(scores) / len(scores))
    return both[1] - both[0]


@dataclass
class Judge:
    """Says of each provider's call why it may print no time, or ""."""

    work: Workload
    what: str
    pixels: Tensor
    latents: Tensor
    known: dict[torch.dtype, list[Tensor]] = field(default_factory=dict)  # what the reference makes in a dtype

    def __call__(self, coder: Coder, call: Callable[[], Any]) -> str:
        results = _tensors(call())
        if coder.precision:
            change = psnr_change(coder.precision, self.work.device, self.work.photos)
            if not all(torch.isfinite(x).all() for x in results):
                return "its numbers are not finite"
            if change < -LOSSES[coder.precision]:
                return f"it loses {-change:.2f} dB on the demo weights, more than {LOSSES[coder.precision]:.2f}"
            return ""
        oracle = torch.float32 if self.what == "train" and coder.dtype == torch.bfloat16 else torch.float64
        actual = results if self.what == "train" else [x[:1] for x in results]
        wrong = disagreement(actual, self._of(coder.dtype), self._of(oracle))
        return wrong and f"its numbers are not those of the reference: {wrong}"

    def _of(self, dtype: torch.dtype) -> list[Tensor]:
        if dtype not in self.known:
            part = slice(None) if self.what == "train" else slice(1)  # the rest of a batch would only cost time
            coder = reference(self.work, dtype)
            self.known[dtype] = _tensors(coder.call(self.what, self.pixels[part], self.latents[part])())
        return self.known[dtype]


def _tensors(result: Any) -> list[Tensor]:
    return [x.detach().clone() for x in ((result,) if isinstance(result, Tensor) else result)]


def peak_memory(call: Callable[[], object], device: torch.device) -> float | None:
    """MB that a call needs at its worst on top of what was there; on the CPU, None where Linux does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with suppress(OSError, StopIteration, ValueError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # or what was freed before is used again and does not count
        Path("/proc/self/clear_refs").write_text("5")  # makes the peak what is resident now
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before) / 1e3
    return None


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def macs(work: Workload, what: str, batch: int = 1) -> int:
    """Multiply-accumulates of a call; a training step is three forwards."""
    c = count(work.config, size=work.size, frames=work.frames)
    return batch * {"encode": c.encoder_macs, "decode": c.decoder_macs, "both": c.macs, "train": 3 * c.macs}[what]


def linear_macs(work: Workload, what: str, batch: int) -> int:
    model = work.models[torch.float32]
    both: list[nn.Module] = [model.encoder, model.decoder]
    parts = {"encode": both[:1], "decode": both[1:]}.get(what, both)
    tokens = count(work.config, size=work.size, frames=work.frames).tokens
    weights = sum(m.weight.numel() for p in parts for m in p.modules() if isinstance(m, nn.Linear))
    return batch * tokens * weights * (3 if what == "train" else 1)


def figures(timing: Timing, operations: int, rate: float | None = None) -> dict[str, object]:
    """The columns that follow from a time and multiply-accumulates; `rate` is operations a second of a product."""
    row: dict[str, object] = {"ms_p20": timing.p20, "ms_p50": timing.p50, "ms_p95": timing.p95}
    row |= {"samples": timing.samples, "gmac": operations / 1e9, "gflop": operations / 5e8}
    if rate:
        row["percent_of_matmul"] = 100 * 2 * operations / (timing.p50 / 1e3) / rate
    return row


def compare_with_products(
    calls: Mapping[str, Sequence[Callable[[], object]]],
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
    seconds: float,
) -> tuple[dict[str, Timing], dict[str, Exception], dict[torch.dtype, float]]:
    """`compare`, so many seconds a call, with a large product in each of the dtypes among them: the rates of those."""
    made = {dtype: product(device, dtype) for dtype in set(dtypes.values())} if calls else {}
    every = dict(calls) | {str(dtype): [call] for dtype, (call, _) in made.items()}
    timings, failed = compare(every, device, len(every) * seconds, graph=False)
    rates = {dtype: operations / (timings.pop(str(dtype)).p50 / 1e3) for dtype, (_, operations) in made.items()}
    return timings, failed, rates


def default_dtype(device: torch.device) -> torch.dtype:
    """What everybody's models are fastest in: bfloat16, but float32 on a CPU that has no products of bfloat16."""
    return product_dtype(torch.empty(0, dtype=torch.bfloat16, device=device))


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32, which convolutions have by default: float32 of every provider is the same arithmetic."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    with ExitStack() as stack:
        for backend, old in zip(backends, before, strict=True):
            stack.callback(setattr, backend, "allow_tf32", old)
            backend.allow_tf32 = False
        yield


class Models:
    """The rows of a workload, batch by batch, so that what was compiled for a batch is there for encode and decode."""

    def __init__(
        self,
        work: Workload,
        dtype: torch.dtype,
        providers: Sequence[str],
        seconds: float,
        baseline: str = "reference",
    ) -> None:
        self.work, self.dtype, self.providers, self.seconds = work, dtype, tuple(providers), seconds
        self.baseline = baseline  # the provider to whose time the column ratio_to_<baseline> is
        self._batch = 0

    def key(self, batch: int, what: str) -> dict[str, object]:
        values = (self.work.name, self.work.frames, self.work.size, batch, str(self.dtype).removeprefix("torch."), what)
        return dict(zip(KEY, values, strict=True))

    def measure(self, batch: int, what: str, rows: Rows) -> None:
        """Add a row for every provider."""
        if batch != self._batch:
            torch.compiler.reset()  # or the compiler gives up on functions that it has compiled too often
            self._batch = batch
            self.work.coders.clear()
        pixels, latents = self.work.inputs(batch)
        judge = Judge(self.work, what, pixels, latents)
        calls, coders, refused, peaks = {}, {}, {}, {}
        for name in self.providers:
            try:
                coder = self.work.coder(name, self.dtype)
                call = coder.call(what, pixels, latents)
                if name != LINEAR and (why := judge(coder, call)):
                    refused[name] = why
                    continue
                calls[name], coders[name] = [call], coder
                peaks[name] = peak_memory(call, self.work.device)
            except InputError as error:
                refused[name] = f"{SKIPPED}{error}"
            except Exception as error:
                refused[name] = reason(error)
        timings, failed, rates = compare_with_products(
            calls, {name: coder.dtype for name, coder in coders.items()}, self.work.device, self.seconds
        )
        refused |= {name: reason(error) for name, error in failed.items()}
        tokens = batch * count(self.work.config, size=self.work.size, frames=self.work.frames).tokens
        added = []
        for name, timing in timings.items():
            operations = linear_macs(self.work, what, batch) if name == LINEAR else macs(self.work, what, batch)
            row = figures(timing, operations, rates[coders[name].dtype]) | {"peak_mb": peaks.get(name)}
            if name != LINEAR:
                pixels_each = self.work.frames * self.work.size**2
                each = {"images_per_s": batch * self.work.frames, "tokens_per_s": tokens}
                row |= {column: number / (timing.p50 / 1e3) for column, number in each.items()}
                row["mpixel_per_s"] = batch * pixels_each / (timing.p50 * 1e3)
            if LINEAR in timings and name != LINEAR and not coders[name].precision:
                row["linear_share"] = timings[LINEAR].p50 / timing.p50
            if self.baseline in timings:
                row[f"ratio_to_{self.baseline}"] = timings[self.baseline].p50 / timing.p50
            if precision := coders[name].precision:
                row["psnr_change_db"] = psnr_change(precision, self.work.device, self.work.photos)
            added.append({**self.key(batch, what), "provider": name, **row})
        added += [{**self.key(batch, what), "provider": name, "refused": why} for name, why in refused.items()]
        rows.replace(self.key(batch, what), added)
