"""quantize_rows and dequantize: rows of 8-bit numbers with a scale each, for products on the units that multiply those.

    quantize     q = round(h / scale), scale = max |h| / largest, h = x, a norm of x, or act(gate) * up of x
    dequantize   out = sums * row_scale * column_scale + bias  (+ what is there)

The norm or gate is part of the pass that quantises: what stands between two products is read once and written once, in
8 bits. Symmetric and row by row as in LLM.int8() (Dettmers et al., arXiv:2208.07339); e4m3 as in Micikevicius et al.,
arXiv:2209.05433. For inference: neither has a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitok.errors import InputError
from vitok.ops import _triton
from vitok.ops._library import define
from vitok.ops._registry import Implementation, Op
from vitok.ops._tensors import as_rows, check_eps, check_float
from vitok.ops.gated_mlp_act import gated_mlp_act
from vitok.ops.norm import norm

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
NORMS, GATES = ("layer", "rms"), ("silu", "gelu")
MAX_WIDTH = 16384  # a row stays in the registers of one thread block


def quantize_rows(
    x: Tensor, dtype: torch.dtype, *, before: str | None = None, eps: float = 1e-6, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Round rows to 8 bits, each in steps of its own.

    Args:
        x: [..., n], float32, bfloat16 or float16; [..., 2n] gate | up where `before` is a gate.
        dtype: torch.int8 (-127..127) or torch.float8_e4m3fn (+-448).
        before: None, "layer" or "rms" (the norm of the row without weights), "silu" or "gelu" (act(gate) * up).
        eps: of the norm.
        impl: "auto", "triton" or "reference".

    Returns: q [..., n] in `dtype`, contiguous, and scale [...] in float32: q * scale is about the row. A row of zeros
    has the scale 0. Raises InputError for arguments that do not fit.

    >>> q, scale = quantize_rows(torch.tensor([[1.0, -2.0]]), torch.int8)
    >>> q.tolist(), round(scale.item() * 127, 4)
    ([[64, -127]], 2.0)
    """
    check_float("x", x)
    check_eps(eps)
    if dtype not in LARGEST:
        raise InputError(f"dtype must be torch.int8 or torch.float8_e4m3fn, got {dtype}")
    if before is not None and before not in NORMS + GATES:
        raise InputError(f"before must be one of {', '.join(NORMS + GATES)} or None, got {before!r}")
    if x.dim() == 0 or x.shape[-1] == 0 or (before in GATES and x.shape[-1] % 2):
        wanted = "[..., 2n]" if before in GATES else "[..., n]"
        raise InputError(f"x must be {wanted}, n at least 1, got {list(x.shape)}")
    quantized: tuple[Tensor, Tensor] = _QUANTIZE(impl, x, dtype, before or "", float(eps))
    return quantized


def dequantize(
    sums: Tensor,
    row_scale: Tensor,
    column_scale: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype,
    add_to: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The product of two matrices whose rows were quantised: sums * row_scale[:, None] * column_scale + bias.

    Args:
        sums: [rows, m] int32, as `torch._int_mm` makes them.
        row_scale, column_scale: [rows] and [m] float32.
        bias: [m] float32 or None.
        dtype: of the result.
        add_to: [rows, m] of that dtype, contiguous: overwritten by its sum with the result, and returned.
        impl: "auto", "triton" or "reference".

    Returns: [rows, m], rounded once. Raises InputError for arguments that do not fit.

    >>> dequantize(torch.tensor([[6]], dtype=torch.int32), torch.ones(1), torch.full((1,), 0.5), dtype=torch.float32)
    tensor([[3.]])
    """
    if sums.dim() != 2 or sums.dtype != torch.int32:
        raise InputError(f"sums must be int32 [rows, m], got {sums.dtype} {list(sums.shape)}")
    rows, columns = sums.shape
    for name, x, length in (
        ("row_scale", row_scale, rows),
        ("column_scale", column_scale, columns),
        ("bias", bias, columns),
    ):
        if x is not None and (x.shape != (length,) or x.dtype != torch.float32 or x.device != sums.device):
            raise InputError(
                f"{name} must be float32 [{length}] on {sums.device}, got {x.dtype} {list(x.shape)} on {x.device}"
            )
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    if add_to is not None and (add_to.shape != sums.shape or add_to.dtype != dtype or not add_to.is_contiguous()):
        raise InputError(
            f"add_to must be contiguous {dtype} {[rows, columns]}, got {add_to.dtype} {list(add_to.shape)}"
        )
    out: Tensor = _DEQUANTIZE(impl, sums, row_scale, column_scale, bias, dtype, add_to)
    return out


def quantize_reference(x: Tensor, dtype: torch.dtype, before: str, eps: float) -> tuple[Tensor, Tensor]:
    """Eager composition in float32, float64 when x is."""
    x = x if x.dtype == torch.float64 else x.float()
    if before in GATES:
        x = gated_mlp_act(x, gate=before, impl="reference")
    elif before:
        x = norm(x, None, kind=before, eps=eps, impl="reference")
    most = x.abs().amax(-1, keepdim=True)
    steps = x * torch.where(most > 0, LARGEST[dtype] / most, 0.0)
    return (steps.round() if dtype == torch.int8 else steps).to(dtype), (most[..., 0] / LARGEST[dtype]).float()


def dequantize_reference(
    sums: Tensor,
    row_scale: Tensor,
    column_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    add_to: Tensor | None,
) -> Tensor:
    """Eager composition in float32."""
    out = sums.float() * row_scale[:, None] * column_scale
    if bias is not None:
        out = out + bias
    return out.to(dtype) if add_to is None else add_to.copy_(out + add_to.float())


def _width(x: Tensor, before: str) -> int:
    """Of a quantised row."""
    return x.shape[-1] // 2 if before in GATES else x.shape[-1]


def _quantize_empty(impl: str, x: Tensor, dtype: torch.dtype, before: str, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], _width(x, before)), dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _quantize(impl: str, x: Tensor, dtype: torch.dtype, before: str, eps: float) -> tuple[Tensor, Tensor]:
    from vitok.kernels import quantize_rows as kernel

    q, scale = _quantize_empty(impl, x, dtype, before, eps)
    rows, stride = as_rows(x)
    kernel.quantize_rows(rows, stride, q, scale, LARGEST[dtype], before, eps)
    return q, scale


_QUANTIZE_FORWARD = define(
    "quantize_rows(str impl, Tensor x, ScalarType dtype, str before, float eps) -> (Tensor q, Tensor scale)",
    _quantize,
    _quantize_empty,
)


def _dequantize(
    sums: Tensor,
    row_scale: Tensor,
    column_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    add_to: Tensor | None,
) -> Tensor:
    from vitok.kernels import quantize_rows as kernel

    out = sums.new_empty(sums.shape, dtype=dtype) if add_to is None else add_to
    kernel.dequantize(sums, row_scale, column_scale, bias, out, add=add_to is not None)
    return out


def _triton_refuses(x: Tensor, dtype: torch.dtype, before: str, eps: float) -> str:
    if _width(x, before) > MAX_WIDTH:
        return f"it takes rows of at most {MAX_WIDTH} numbers, got {_width(x, before)}"
    return _triton.refuses(x)


_QUANTIZE = Op(
    "quantize_rows",
    Implementation(
        "triton",
        lambda *args: _QUANTIZE_FORWARD("triton", *args),
        _triton.MISSING,
        _triton_refuses,
        devices=_triton.DEVICES,
    ),
    Implementation("reference", quantize_reference),
)

_DEQUANTIZE = Op(
    "dequantize",
    Implementation(
        "triton", _dequantize, _triton.MISSING, lambda sums, *_: _triton.refuses(sums), devices=_triton.DEVICES
    ),
    Implementation("reference", dequantize_reference),
)
