"""The calls that resources.py compiles kernels for: public ops, forward and backward, at the shapes of real models.

Every tile that a launcher can choose belongs to a case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """`run` calls an op; kernels of it that multiply matrices must do so by the instruction `demands` names. GPUs older
    than compute capability `oldest` (90 for 9.0) have no instructions for it."""

    label: str
    run: Callable[[], object]
    demands: str | None = None
    oldest: int = 80


def differentiated(op: Callable[..., Any], *tensors: Tensor | None, **options: Any) -> None:
    """Forward and backward of an op through Triton, with a gradient for each of `tensors` that can have one."""
    leaves = [x.requires_grad_() for x in tensors if x is not None and x.is_floating_point()]
    outputs = op(*tensors, impl="triton", **options)
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x.requires_grad]
    torch.autograd.grad(outputs, leaves, [torch.zeros_like(x) for x in outputs], allow_unused=True)


DTYPES = {"u8": torch.uint8, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def norm_cases() -> Iterator[Case]:
    from vitok.ops import add_norm, norm

    def alone(dtype: str, width: int, kind: str, bias: bool, parameters: str | None) -> Case:
        def run() -> None:
            x = torch.zeros(8, 256, width, dtype=DTYPES[dtype])
            weight = None if parameters is None else torch.ones(width, dtype=DTYPES[parameters])
            differentiated(norm, x, weight, torch.ones_like(weight) if bias else None, kind=kind, eps=1e-6)

        return Case(f"{dtype} {kind} {width}, weight {parameters}{', bias' * bias}", run)

    def added(dtype: str, width: int, kind: str, bias: bool, scale: bool, parameters: str) -> Case:
        def run() -> None:
            x, residual = torch.zeros(2, 8, 256, width, dtype=DTYPES[dtype]).unbind()
            weight, shift, factor = torch.ones(3, width, dtype=DTYPES[parameters]).unbind()
            tensors = (x, residual, weight, shift if bias else None)

            def op(*tensors: Tensor, scale: Tensor | None = None, **options: Any) -> Any:
                return add_norm(*tensors, scale=scale, kind=kind, eps=1e-6, **options)

            differentiated(op, *tensors, scale=factor.requires_grad_() if scale else None)

        return Case(f"{dtype} residual + {kind} {width}, weight {parameters}{', bias' * bias}{', scale' * scale}", run)

    for width in (48, 96, 192, 384, 768, 1536, 2050, 3075, 4096):  # every power of two that a row is rounded up to
        yield alone("bf16", width, "rms", False, "bf16")
    for width in (768, 2050, 4096):
        yield alone("bf16", width, "layer", True, "fp32")
    yield alone("bf16", 768, "layer", False, None)
    yield alone("fp32", 768, "rms", False, "fp32")
    yield alone("fp16", 3075, "layer", True, "fp16")
    for width in (768, 3075, 4096):
        yield added("bf16", width, "rms", False, False, "bf16")
        yield added("bf16", width, "layer", True, True, "fp32")


def heads(dtype: str, head_dim: int, normed: bool, rotated: bool, length: int = 256) -> tuple[Any, dict[str, Any]]:
    """A packed projection with its norm weights, and the table as an option."""
    qkv = torch.zeros(8, length, 3, 12, head_dim, dtype=DTYPES[dtype])
    q_weight, k_weight = torch.ones(2, head_dim, dtype=DTYPES[dtype]).unbind() if normed else (None, None)
    table = torch.zeros(2, length, head_dim // 2) if rotated else None
    return (qkv, q_weight, k_weight), {"table": table}


def qk_norm_rope_cases() -> Iterator[Case]:
    from vitok.ops import qk_norm_rope

    def case(dtype: str, head_dim: int, normed: bool, rotated: bool) -> Case:
        def run() -> None:
            tensors, options = heads(dtype, head_dim, normed, rotated)
            differentiated(qk_norm_rope, *tensors, **options)

        return Case(f"{dtype} head_dim {head_dim}{', norm' * normed}{', rope' * rotated}", run)

    for head_dim in (64, 72, 80, 96, 128, 256):
        yield case("bf16", head_dim, True, True)
        yield case("bf16", head_dim, False, True)
    yield case("bf16", 64, True, False)
    yield case("fp16", 72, True, True)
    yield case("fp32", 64, True, True)


def attention_cases() -> Iterator[Case]:
    from vitok.ops import attention

    def case(dtype: str, head_dim: int, label: str = "full", length: int = 256, **options: Any) -> Case:
        fused = label == "norm, rope"
        segments = options.pop("segments", None)

        def run() -> None:
            (qkv, *weights), table = heads(dtype, head_dim, fused, fused, length)
            if segments:
                options["cu_seqlens"] = torch.tensor(segments, dtype=torch.int32)
                qkv = qkv[:1]
            differentiated(attention, qkv, *weights, **table, **options)

        # float32 products are exact ones, which no matrix unit computes; the backward's tiles of the widest heads are
        # too small for the wide instructions.
        demands = None if dtype == "fp32" else "wide mma" if head_dim <= 128 else "mma"
        return Case(f"{dtype} head_dim {head_dim}, {label}", run, demands)

    for head_dim in (64, 72, 80, 96, 128):
        yield case("bf16", head_dim)
        yield case("bf16", head_dim, "norm, rope")
    yield case("bf16", 256)
    for head_dim in (64, 72):
        yield case("bf16", head_dim, "window 32", window=32)
        yield case("bf16", head_dim, "blocks of 64", causal_block=64)
        yield case("bf16", head_dim, "segments", segments=(0, 100, 256))
    yield case("bf16", 64, "257 tokens", length=257)
    yield case("fp16", 64)
    yield case("fp32", 64)
    yield case("fp32", 128, "norm, rope")


def gated_mlp_act_cases() -> Iterator[Case]:
    from vitok.ops import gated_mlp_act

    def case(dtype: str, hidden: int, gate: str) -> Case:
        def run() -> None:
            differentiated(gated_mlp_act, torch.zeros(8, 256, 2 * hidden, dtype=DTYPES[dtype]), gate=gate)

        return Case(f"{dtype} {gate} {hidden}", run)

    for gate in ("silu", "gelu"):
        for hidden in (2048, 2050, 3075):
            yield case("bf16", hidden, gate)
    yield case("fp16", 2048, "silu")
    yield case("fp32", 2048, "gelu")


def pixels(dtype: str, q: int, size: int, planar: bool, batch: int = 2) -> Tensor:
    """[B, 3q, size, size, 3], channels last or a view of a channels-first clip."""
    clip = torch.zeros(batch, q, 3, size, size, dtype=DTYPES[dtype]).permute(0, 1, 3, 4, 2)
    return clip if planar else clip.contiguous()


def layout(planar: bool) -> str:
    return "planar" if planar else "interleaved"


def tubelet_gather_cases() -> Iterator[Case]:
    from vitok.ops import tubelet_gather

    def case(source: str, target: str, q: int, p: int, pad: str, size: int, planar: bool) -> Case:
        def run() -> None:
            clip = pixels(source, q, size, planar)
            tubelet_gather(clip, tubelet=(q, p), pad=pad, dtype=DTYPES[target], impl="triton")

        return Case(f"{source}->{target} {q}x{p} {pad} {size} {layout(planar)}", run)

    for planar in (False, True):
        yield case("u8", "bf16", 1, 16, "edge", 256, planar)
        yield case("u8", "bf16", 4, 8, "zero", 128, planar)
        yield case("fp32", "fp16", 1, 16, "zero", 256, planar)
        yield case("bf16", "fp32", 2, 3, "edge", 256, planar)


def tubelet_scatter_cases() -> Iterator[Case]:
    from vitok.ops import tubelet_gather, tubelet_scatter

    def case(dtype: str, q: int, p: int, size: int, last: bool, to_bytes: bool) -> Case:
        def run() -> None:
            frames = 1 if q == 1 else 3 * q
            rows = torch.zeros(2, -(-frames // q) * (-(-size // p)) ** 2, 3 * q * p * p, dtype=DTYPES[dtype])
            kind, order = torch.uint8 if to_bytes else None, "channels_last" if last else "channels_first"
            options: dict[str, Any] = {"tubelet": (q, p), "size": (frames, size, size), "layout": order}
            tubelet_scatter(rows, out_dtype=kind, impl="triton", **options)

        return Case(f"{dtype} {q}x{p} {size} channels {'last' if last else 'first'}{', bytes' * to_bytes}", run)

    def gradient(dtype: str, pad: str, planar: bool) -> Case:
        def run() -> None:
            differentiated(tubelet_gather, pixels(dtype, 2, 250, planar), tubelet=(2, 16), pad=pad, dtype=DTYPES[dtype])

        return Case(f"{dtype} gradient of pixels, {pad} 250 {layout(planar)}", run)

    for last in (False, True):
        yield case("bf16", 1, 16, 256, last, False)
        yield case("bf16", 1, 16, 256, last, True)
        yield case("fp32", 4, 8, 128, last, False)
    yield case("fp16", 1, 16, 250, True, True)
    for planar in (False, True):
        yield gradient("fp32", "edge", planar)
        yield gradient("bf16", "zero", planar)


def tubelet_embed_cases() -> Iterator[Case]:
    from vitok.ops import tubelet_embed

    def case(source: str, target: str, batch: int, q: int, p: int, pad: str, size: int, planar: bool) -> Case:
        def run() -> None:
            clip, elements = pixels(source, q, size, planar, batch), 3 * q * p * p
            weight, bias = torch.zeros(768, elements, dtype=DTYPES[target]), torch.zeros(768, dtype=DTYPES[target])

            def op(*tensors: Tensor, **options: Any) -> Tensor:
                return tubelet_embed(clip, *tensors, tubelet=(q, p), pad=pad, **options)

            if batch == 1:  # backward multiplies for real, here by the CPU
                differentiated(op, weight, bias)
            else:
                op(weight, bias, impl="triton")

        demands = None if target == "fp32" else "mma"
        return Case(f"{source}->{target} {q}x{p} {pad} {batch}x{size} {layout(planar)}", run, demands)

    for batch in (1, 16):  # small and large tiles
        for planar in (False, True):
            yield case("u8", "bf16", batch, 1, 16, "edge", 256, planar)
        yield case("bf16", "bf16", batch, 4, 8, "zero", 128, True)
    yield case("u8", "fp16", 1, 1, 16, "zero", 250, False)
    yield case("u8", "fp32", 1, 1, 16, "edge", 256, False)
    yield case("fp32", "fp32", 1, 4, 8, "edge", 128, True)


def tubelet_unembed_cases() -> Iterator[Case]:
    from vitok.ops import tubelet_unembed

    def case(
        dtype: str, batch: int, q: int, p: int, size: int, last: bool, to_bytes: bool = False, cut: int = 0
    ) -> Case:
        def run() -> None:
            elements, frames = 3 * q * p * p, 1 if q == 1 else 3 * q - cut
            tokens = torch.zeros(batch, -(-frames // q) * (-(-size // p)) ** 2, 768, dtype=DTYPES[dtype])
            weight, bias = (torch.zeros(elements, *more, dtype=DTYPES[dtype]) for more in ((768,), ()))
            options: dict[str, Any] = {"layout": "channels_last" if last else "channels_first", "tubelet": (q, p)}
            options["size"] = (frames, size, size)
            if to_bytes or batch > 1:  # backward multiplies for real, here by the CPU
                kind = torch.uint8 if to_bytes else None
                tubelet_unembed(tokens, weight, bias, out_dtype=kind, impl="triton", **options)
            else:
                differentiated(tubelet_unembed, tokens, weight, bias, **options)

        where = f"{'last' if last else 'first'}{', bytes' * to_bytes}{', cut' * (cut > 0)}"
        return Case(f"{dtype} {q}x{p} {batch}x{size} channels {where}", run, None if dtype == "fp32" else "mma")

    for batch in (1, 16):
        yield case("bf16", batch, 1, 16, 256, False)
        yield case("bf16", batch, 1, 16, 256, True, to_bytes=True)
    yield case("bf16", 2, 4, 8, 128, False)
    for last in (False, True):
        yield case("fp16", 2, 1, 16, 250, last)
        yield case("fp32", 2, 1, 16, 250, last)
        for batch in (2, 16):
            yield case("bf16", batch, 4, 8, 128, last, cut=1)
    yield case("fp32", 1, 1, 16, 256, False)


def pixel_loss_cases() -> Iterator[Case]:
    from vitok.ops import pixel_loss

    def case(dtype: str, source: str, kind: str, q: int, p: int, size: int, planar: bool) -> Case:
        def run() -> None:
            target = pixels(source, q, size, planar, 8)
            tokens = -(-target.shape[1] // q) * (-(-size // p)) ** 2
            prediction = torch.zeros(8, tokens, 3 * q * p * p, dtype=DTYPES[dtype])
            differentiated(pixel_loss, prediction, target=target, tubelet=(q, p), kind=kind)

        return Case(f"{dtype} to {source} {kind} {q}x{p} {size} {layout(planar)}", run)

    for kind in ("l1", "l2", "charbonnier"):
        yield case("bf16", "u8", kind, 1, 16, 256, False)
        yield case("bf16", "u8", kind, 4, 8, 128, True)
    yield case("bf16", "fp32", "l1", 1, 16, 250, True)
    yield case("fp32", "fp32", "l2", 1, 16, 256, False)


def gaussian_sample_cases() -> Iterator[Case]:
    from vitok.ops import gaussian_sample, normal_noise

    def case(dtype: str, channels: int, sample: bool, tensors: bool) -> Case:
        def run() -> None:
            moments = torch.zeros(8, 256, 2 * channels, dtype=DTYPES[dtype])
            keys = (
                {"seed": torch.zeros(1, dtype=torch.int64), "sample_ids": torch.arange(8)} if tensors else {"seed": 3}
            )
            differentiated(gaussian_sample, moments, sample=sample, **keys)

        return Case(f"{dtype} {channels} channels{', sample' * sample}{', seed and ids in memory' * tensors}", run)

    for channels in (16, 64, 7):
        yield case("bf16", channels, True, False)
    yield case("bf16", 16, True, True)
    yield case("bf16", 16, False, False)
    yield case("fp16", 16, True, False)
    yield case("fp32", 16, True, False)
    yield Case("noise", lambda: normal_noise(3, torch.arange(8), 4096, impl="triton"))


def quantize_rows_cases() -> Iterator[Case]:
    from vitok.ops import dequantize, quantize_rows

    def case(dtype: str, width: int, before: str | None, to: torch.dtype) -> Case:
        def run() -> None:
            x = torch.zeros(8, 256, width * (2 if before in ("silu", "gelu") else 1), dtype=DTYPES[dtype])
            quantize_rows(x, to, before=before, impl="triton")

        name = "int8" if to == torch.int8 else "fp8"
        return Case(f"{dtype} to {name}, {before} {width}", run, oldest=80 if to == torch.int8 else 90)

    def back(dtype: str, columns: int, bias: bool, add: bool) -> Case:
        def run() -> None:
            sums, scales = torch.zeros(256, columns, dtype=torch.int32), torch.ones(2, max(256, columns))
            total = torch.zeros(256, columns, dtype=DTYPES[dtype]) if add else None
            shift = torch.zeros(columns) if bias else None
            out = {"dtype": DTYPES[dtype], "add_to": total, "impl": "triton"}
            dequantize(sums, scales[0, :256], scales[1, :columns], shift, **out)

        return Case(f"{dtype} of sums {columns}{', bias' * bias}{', added' * add}", run)

    for to in (torch.int8, torch.float8_e4m3fn):
        for width in (96, 384, 768, 1536, 3075, 8192):  # every power of two that a row of a block is rounded up to
            yield case("bf16", width, "layer", to)
        for width in (768, 2048, 3072, 8208):
            yield case("bf16", width, "silu", to)
        yield case("bf16", 768, "rms", to)
        yield case("bf16", 768, None, to)
        yield case("bf16", 2048, "gelu", to)
    for dtype in ("fp16", "fp32"):
        yield case(dtype, 768, "layer", torch.int8)
    for columns in (768, 2050):
        yield back("bf16", columns, True, False)
        yield back("bf16", columns, False, True)
    yield back("fp32", 768, True, True)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "norm": norm_cases,
    "qk_norm_rope": qk_norm_rope_cases,
    "attention": attention_cases,
    "gated_mlp_act": gated_mlp_act_cases,
    "tubelet_gather": tubelet_gather_cases,
    "tubelet_scatter": tubelet_scatter_cases,
    "tubelet_embed": tubelet_embed_cases,
    "tubelet_unembed": tubelet_unembed_cases,
    "pixel_loss": pixel_loss_cases,
    "gaussian_sample": gaussian_sample_cases,
    "quantize_rows": quantize_rows_cases,
}
