"""linear: x @ weight.T + bias by torch's library, in a dtype that the machine multiplies fast.

x86 processors without AVX512-BF16 or AMX have no products of 16-bit floats, and libraries emulate them at a quarter of
float32's rate or less. There the operands are widened, multiplied in float32 and the result is rounded once: several
times faster and closer to the exact result. Everywhere else this is torch's own linear.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor
from torch.nn import functional as F

from vitok import _native
from vitok.errors import InputError
from vitok.ops._registry import Implementation, Op
from vitok.ops._tensors import check_float

_LIBRARY = _native.library()
_X86 = platform.machine().lower() in ("x86_64", "amd64")
_EMULATED = _LIBRARY is not None and _X86 and _LIBRARY.cpu_isa() not in ("avx512_bf16", "amx")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """Project the last dimension: x @ weight.T + bias.

    Args:
        x: [..., n], floating point.
        weight: [m, n]. It and the bias are taken in x's dtype, or autocast's where it is on.
        bias: [m] or None.
        impl: "auto", "widened" (16-bit floats on a CPU that has no products of them) or "reference".

    Returns: [..., m] in x's dtype or autocast's. Differentiable in all three; the backward pass keeps x and weight.
    Raises InputError for shapes, dtypes or devices that do not fit.

    >>> linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)).tolist()[0]
    [4.0, 4.0, 4.0, 4.0]
    """
    check_float("x", x)
    if x.dim() == 0:
        raise InputError(f"x must be [..., n], got {list(x.shape)}")
    check_linear(x, weight, bias, f"[m, {x.shape[-1]}] for this x", (None, x.shape[-1]))
    dtype = autocast(x)
    return _OP(impl, x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def check_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, wanted: str, shape: tuple[int | None, int | None]
) -> None:
    """Refuse a weight not of `shape` (None: any), a bias that does not go with it, and tensors of two devices."""
    if weight.dim() != 2 or any(n is not None and n != got for n, got in zip(shape, weight.shape, strict=True)):
        raise InputError(f"weight must be {wanted}, got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        check_float(name, tensor)
        if tensor.device != x.device:
            raise InputError(f"{name} must be on {x.device} as the input is, got one on {tensor.device}")


def autocast(x: Tensor) -> torch.dtype:
    """The dtype that a matrix product of x is to run in: autocast's where it is on, else x's own."""
    kind = x.device.type
    if x.dtype != torch.float64 and kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def product_dtype(x: Tensor) -> torch.dtype:
    """What tensors like x are multiplied fastest in: float32 for 16-bit floats that this CPU has no products of."""
    return torch.float32 if _EMULATED and x.is_cpu and x.dtype in (torch.bfloat16, torch.float16) else x.dtype


def product(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """a @ b, multiplied in `dtype` (by default the fastest) and rounded to a's; what autocast would do is done."""
    dtype = dtype or product_dtype(a)
    if dtype == a.dtype == b.dtype:
        return a @ b
    with torch.autocast("cpu", enabled=False):
        return (a.to(dtype) @ b.to(dtype)).to(a.dtype)


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The linear of x, weight and bias widened to `dtype`, in `dtype`."""
    x = x.contiguous()  # else the library adds the bias by itself, to sums that are rounded already
    if dtype == x.dtype == weight.dtype:
        return F.linear(x, weight, bias)
    with torch.autocast("cpu", enabled=False):
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        return wide_linear(x, weight, bias, torch.float32).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = product(gradient, weight, torch.float32)
        if ctx.needs_input_grad[1]:
            of_weight = product(gradient.flatten(0, -2).mT, x.flatten(0, -2), torch.float32)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.flatten(0, -2).sum(0)
        return of_x, of_weight, of_bias


def _run_widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        out: Tensor = _Widened.apply(x, weight, bias)
        return out
    return wide_linear(x, weight, bias, torch.float32).to(x.dtype)


def _widened_refuses(x: Tensor, *_: object) -> str:
    if not x.is_cpu:
        return f"it is for the CPU, x is on {x.device}"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"it widens 16-bit floats, x is {x.dtype}"
    return "" if _EMULATED else "no x86 CPU without products of 16-bit floats was found"


_OP = Op(
    "linear",
    Implementation("widened", _run_widened, refuses=_widened_refuses, devices=("cpu",)),
    Implementation("reference", F.linear),
)
