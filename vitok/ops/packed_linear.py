"""packed_linear: a linear map prepared once for many products, with what stands before and after it in a transformer.

    out = after(W . before(x) + bias)      before: a norm without weights, or a gate;      after: a gate;  or x' += out

The weight is rounded, quantised and laid out when it is packed. The native implementation reads a row of x once, makes
it what `before` says while it lays it out for the product, and gates, adds and rounds the sums where they lie: no norm,
activation or residual sum is a pass over memory of its own. For inference: nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from vitok import _native
from vitok.errors import InputError
from vitok.ops import _packed_native
from vitok.ops._registry import Implementation, Op
from vitok.ops._tensors import check_eps, check_float
from vitok.ops.gated_mlp_act import gated_mlp_act
from vitok.ops.linear import check_linear, linear, product_dtype
from vitok.ops.norm import norm
from vitok.ops.quantize_rows import GATES, NORMS, dequantize, quantize_rows

QUANTIZED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}

# (x [rows, n], sum to add to [rows, m] or None) to [rows, m]
Product = Callable[[Tensor, Tensor | None], Tensor]


class PackedLinear:
    """What `pack_linear` makes: call it with x [..., n] for [..., m]."""

    def __init__(self, product: Product, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device) -> None:
        self._product, self.inputs, self.outputs, self.dtype, self.device = product, inputs, outputs, dtype, device

    def __call__(self, x: Tensor, *, add_to: Tensor | None = None) -> Tensor:
        """The map of x [..., n], [..., m] in x's dtype. `add_to`, contiguous and like the result, is overwritten by its
        sum with it, and returned. Raises InputError for tensors that do not fit or want a gradient."""
        if x.dim() == 0 or x.shape[-1] != self.inputs or x.dtype != self.dtype or x.device != self.device:
            wanted = f"{self.dtype} [..., {self.inputs}] on {self.device}"
            raise InputError(f"x must be {wanted}, got {x.dtype} {list(x.shape)} on {x.device}")
        if x.requires_grad and torch.is_grad_enabled():
            raise InputError("x must not require a gradient, a packed map has none; use the model it was packed from")
        shape = (*x.shape[:-1], self.outputs)
        if add_to is not None and (add_to.shape != shape or add_to.dtype != x.dtype or not add_to.is_contiguous()):
            raise InputError(
                f"add_to must be contiguous {x.dtype} {list(shape)}, got {add_to.dtype} {list(add_to.shape)}"
            )
        rows = x.reshape(-1, self.inputs)
        out = self._product(rows, None if add_to is None else add_to.view(-1, self.outputs))
        return out.view(shape) if add_to is None else add_to


def pack_linear(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype,
    quantize: str | None = None,
    before: str | None = None,
    eps: float = 1e-6,
    after: str | None = None,
    impl: str = "auto",
) -> PackedLinear:
    """Prepare x -> after(weight . before(x) + bias) for x of `dtype`.

    Args:
        weight: [m, n], floating point; [2h, n] with the gate in the first half where `after` is a gate.
        bias: [m] or None.
        dtype: float32, bfloat16 or float16, of what goes in and comes out. Sums are float32.
        quantize: None, or "int8" or "fp8" (e4m3): both operands are rounded to 8 bits, symmetrically, each row of the
            weight and of what `before` makes by its own largest magnitude; sums are exact integers or float32.
        before: None, "layer" or "rms" (the norm of x without weights), or "silu" or "gelu" (x is gate | up).
        eps: of the norm.
        after: None, "silu" or "gelu": act(first half) * second half, [..., h].
        impl: "auto", "native" (the CPU) or "reference": a library's products between norms, gates and quantisation of
            this package, which is what GPUs run.

    Raises InputError for arguments that do not fit, ImplementationError where the implementation cannot take them.

    >>> pack_linear(torch.ones(4, 3), dtype=torch.float32)(torch.ones(2, 3)).tolist()[0]
    [3.0, 3.0, 3.0, 3.0]
    """
    check_float("weight", weight)
    check_linear(weight, weight, bias, "[m, n]", (None, None))
    check_eps(eps)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    for name, value, known in (
        ("quantize", quantize, tuple(QUANTIZED)), ("before", before, NORMS + GATES), ("after", after, GATES),
    ):  # fmt: skip
        if value is not None and value not in known:
            raise InputError(f"{name} must be one of {', '.join(known)} or None, got {value!r}")
    outputs, inputs = weight.shape
    if after and outputs % 2:
        raise InputError(f"weight must have an even number of rows to be gated, got {outputs}")
    weight, bias = weight.detach().float(), None if bias is None else bias.detach().to(torch.float32, copy=True)
    product: Product = _OP(impl, weight, bias, dtype, quantize, before, eps, after)
    inputs, outputs = 2 * inputs if before in GATES else inputs, outputs // 2 if after else outputs
    return PackedLinear(product, inputs, outputs, dtype, weight.device)


def _quantized(weight: Tensor, quantize: str) -> tuple[Tensor, Tensor]:
    """weight [m, n] in 8 bits, and the float32 [m] by which its rows are to be multiplied."""
    return quantize_rows(weight, QUANTIZED[quantize], impl="reference")


def _composed(
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    quantize: str | None,
    before: str | None,
    eps: float,
    after: str | None,
) -> Product:
    multiply = (
        _multiply(weight, bias, dtype) if quantize is None else _MULTIPLY[quantize](weight, bias, dtype, before, eps)
    )

    def product(x: Tensor, total: Tensor | None) -> Tensor:
        if quantize is None and before in NORMS:
            x = norm(x, None, kind=before, eps=eps)
        elif quantize is None and before in GATES:
            x = gated_mlp_act(x, gate=before)
        if after is None:
            return multiply(x, total)
        out = gated_mlp_act(multiply(x, None), gate=after)
        return out if total is None else total.add_(out)

    return product


def _multiply(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Product:
    weight, bias = weight.to(dtype, copy=True), None if bias is None else bias.to(dtype)

    def product(x: Tensor, total: Tensor | None) -> Tensor:
        if total is None:
            return linear(x, weight, bias)
        if product_dtype(x) != dtype:
            return total.add_(linear(x, weight, bias))
        total.addmm_(x, weight.mT)
        return total if bias is None else total.add_(bias)

    return product


def _multiply_int8(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, before: str | None, eps: float) -> Product:
    q, scale = _quantized(weight, "int8")

    def product(x: Tensor, total: Tensor | None) -> Tensor:
        rows, row_scale = quantize_rows(x, torch.int8, before=before, eps=eps)
        # The library takes more than 16 rows, in eights.
        missing = max(-len(rows) % 8, 24 - len(rows))
        sums = torch._int_mm(F.pad(rows, (0, 0, 0, missing)) if missing > 0 else rows, q.mT)[: len(rows)]
        return dequantize(sums, row_scale, scale, bias, dtype=dtype, add_to=total)

    return product


def _multiply_fp8(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, before: str | None, eps: float) -> Product:
    q, scale = _quantized(weight, "fp8")
    bias = None if bias is None else bias.to(dtype)

    def product(x: Tensor, total: Tensor | None) -> Tensor:
        rows, row_scale = quantize_rows(x, torch.float8_e4m3fn, before=before, eps=eps)
        out: Tensor = torch._scaled_mm(
            rows, q.mT, scale_a=row_scale[:, None], scale_b=scale[None], bias=bias, out_dtype=dtype
        )
        return out if total is None else total.add_(out)

    return product


_MULTIPLY = {"int8": _multiply_int8, "fp8": _multiply_fp8}


def _composed_refuses(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, quantize: str | None, *_: object) -> str:
    if quantize is None:
        return ""
    if any(n % 16 for n in weight.shape):
        return f"8-bit products need rows and columns in multiples of 16, the weight is {list(weight.shape)}"
    if quantize == "fp8" and dtype != torch.bfloat16:
        return f"fp8 products give bfloat16, dtype is {dtype}"
    if quantize == "fp8" and weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (9, 0):
        return "fp8 products with a scale a row need a GPU of compute capability 9.0 or newer"
    return ""


def _native_product(
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    quantize: str | None,
    before: str | None,
    eps: float,
    after: str | None,
) -> Product:
    # float16 has no products on any CPU: it is widened once, here.
    packed_dtype = torch.int8 if quantize else torch.float32 if dtype == torch.float16 else dtype
    outputs = len(weight)
    packed = _packed_native.pack(weight, bias, packed_dtype, after is not None)

    def product(x: Tensor, total: Tensor | None) -> Tensor:
        return _packed_native.run(
            x, packed, outputs, packed_dtype, norm=before, eps=eps, gate=after, residual=total, out=total
        )

    return product


def _native_refuses(
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    quantize: str | None,
    before: str | None,
    *_: object,
) -> str:
    if not weight.is_cpu:
        return f"it is for the CPU, the weight is on {weight.device}"
    if quantize == "fp8":
        return "CPUs have no products of fp8"
    if quantize and weight.shape[1] > _packed_native.MAX_INT8_INNER:
        return f"sums of int8 products have at most {_packed_native.MAX_INT8_INNER} terms, got {weight.shape[1]}"
    return "it has no gate before the product, only after it" if before in GATES else ""


_OP = Op(
    "packed_linear",
    Implementation("native", _native_product, _native.reason(), _native_refuses, devices=("cpu",)),
    Implementation("reference", _composed, refuses=_composed_refuses),
)
