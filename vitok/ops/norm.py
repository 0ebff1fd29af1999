"""norm: layer norm or RMS norm over the last dimension, by itself or of a residual sum.

Statistics and arithmetic in float32 (float64 for float64), one rounding at the end. `add_norm` computes the residual
sum and its norm in one pass: the sum is written once and not read again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitok import _native
from vitok.errors import InputError
from vitok.ops import _triton
from vitok.ops._library import define, differentiable_once, kernels
from vitok.ops._registry import Implementation, Op
from vitok.ops._tensors import address, as_rows, check_eps, check_float, compute_dtype

MAX_GPU_WIDTH = 4096  # a row stays in the registers of one thread block


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None = None, *, kind: str, eps: float, impl: str = "auto"
) -> Tensor:
    """Normalise rows.

    kind "layer": (x - mean) / sqrt(var + eps) * weight + bias (Ba et al., arXiv:1607.06450);
    kind "rms": x / sqrt(mean(x^2) + eps) * weight + bias (Zhang and Sennrich, arXiv:1910.07467).

    Args:
        x: [..., width], floating point. Rows are read in place where one stride leads through all of them, else copied.
        weight, bias: [width] or None, in the dtype of x or in another one (float32 beside bfloat16, say).
        kind: "layer" or "rms".
        eps: at least 0, added to the variance or the mean square.
        impl: "auto", "native", "triton" or "reference".

    Returns: a contiguous tensor of the shape and dtype of x. Differentiable in all tensors, once (the reference: more).
    Raises InputError for wrong shapes, dtypes and devices.

    >>> norm(torch.ones(2, 4), None, kind="rms", eps=0.0)[0, 0].item()
    1.0
    """
    _check(x, kind, eps, weight=weight, bias=bias)
    return _NORM(impl, x, weight, bias, kind, eps)


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    kind: str,
    eps: float,
    scale: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum.

        s = residual + scale * x
        y = norm(s, weight, bias)

    s is rounded to its dtype before the statistics are taken, as when the two steps are written one after the other.

    Args:
        x: [..., width], the branch's output, floating point.
        residual: the shape of x; if the dtypes differ, both are converted to the wider one first.
        weight, bias, kind, eps, impl: as in `norm`.
        scale: [width] (LayerScale, Touvron et al., arXiv:2103.17239) or None for 1.

    Returns: (y, s), contiguous, both of the shape of x, in the wider dtype of x and residual. Differentiable in all
    tensors, once (the reference: more); the gradients of y and s are summed in the one backward pass. Raises
    InputError for wrong shapes, dtypes and devices.

    >>> y, s = add_norm(torch.ones(2, 4), torch.ones(2, 4), None, kind="rms", eps=0.0)
    >>> y[0, 0].item(), s[0, 0].item()
    (1.0, 2.0)
    """
    _check(x, kind, eps, weight=weight, bias=bias, scale=scale)
    if residual.shape != x.shape:
        raise InputError(f"residual must have the shape of x, {list(x.shape)}, got {list(residual.shape)}")
    check_float("residual", residual)
    if residual.device != x.device:
        raise InputError(f"residual must be on the device of x, {x.device}, got {residual.device}")
    if residual.dtype != x.dtype:
        wide = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(wide), residual.to(wide)
    return _ADD_NORM(impl, x, residual, scale, weight, bias, kind, eps)


def _check(x: Tensor, kind: str, eps: float, **parameters: Tensor | None) -> None:
    if kind not in ("layer", "rms"):
        raise InputError(f"kind must be 'layer' or 'rms', got {kind!r}")
    check_eps(eps)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise InputError(f"x must be [..., width] with width at least 1, got {list(x.shape)}")
    check_float("x", x)
    for name, parameter in parameters.items():
        if parameter is None:
            continue
        if parameter.dim() != 1 or parameter.shape[0] != x.shape[-1]:
            raise InputError(f"{name} must be [width] = [{x.shape[-1]}], got {list(parameter.shape)}")
        check_float(name, parameter)
        if parameter.device != x.device:
            raise InputError(f"{name} must be on the device of x, {x.device}, got {parameter.device}")


def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float) -> Tensor:
    """Eager composition."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    if kind == "layer":
        if all(p is None or p.dtype == x.dtype for p in (weight, bias)):
            return F.layer_norm(x, x.shape[-1:], weight, bias, eps).to(x.dtype)  # autocast gives float32
        weight, bias = (None if p is None else p.to(wide.dtype) for p in (weight, bias))
        return F.layer_norm(wide, x.shape[-1:], weight, bias, eps).to(x.dtype)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    return (y if bias is None else y + bias).to(x.dtype)


def add_reference(
    x: Tensor,
    residual: Tensor,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Eager composition."""
    s = residual + (x if scale is None else (x * scale).to(x.dtype))
    return reference(s, weight, bias, kind, eps), s


def _parameters(x: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """Contiguous, and of one dtype: that of x, or the one of the arithmetic."""
    dtype = x.dtype
    for p in parameters:
        if p is not None and p.dtype != dtype:
            dtype = compute_dtype(x)
            break
    return [
        p if p is None or (p.dtype == dtype and p.is_contiguous()) else p.to(dtype).contiguous() for p in parameters
    ]


def _parameter_dtype(otherwise: str, *parameters: Tensor | None) -> str:
    for p in parameters:
        if p is not None:
            return _native.DTYPE[p.dtype]
    return otherwise


def _forward_fake(
    impl: str,
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    centred: bool,
    eps: float,
    save: bool,
) -> list[Tensor]:
    """[y, then s with a residual, then stats to save]; stats are rows of means (if centred) and of 1 / deviation."""
    outputs = [torch.empty_like(x, memory_format=torch.contiguous_format)]
    if residual is not None:
        outputs.append(torch.empty_like(x, memory_format=torch.contiguous_format))
    if save:
        rows = x.numel() // x.shape[-1]
        outputs.append(torch.empty((1 + centred, rows), dtype=compute_dtype(x), device=x.device))
    return outputs


def _forward(
    impl: str,
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    centred: bool,
    eps: float,
    save: bool,
) -> list[Tensor]:
    outputs = _forward_fake(impl, x, residual, scale, weight, bias, centred, eps, save)
    y = outputs[0]
    s = None if residual is None else outputs[1]
    stats = outputs[-1] if save else None
    width = x.shape[-1]
    rows = x.numel() // width
    x, x_stride = as_rows(x)
    residual, residual_stride = (None, 0) if residual is None else as_rows(residual)
    scale, weight, bias = _parameters(x, scale, weight, bias)
    if impl == "triton":
        from vitok.kernels import norm as kernel

        kernel.norm_forward(
            x, x_stride, residual, residual_stride, scale, weight, bias, rows, width, centred, eps, s, y, stats
        )
        return outputs
    dtype = _native.DTYPE[x.dtype]
    _native.run(
        "norm_forward", x,
        x.data_ptr(), x_stride, address(residual), residual_stride, address(scale), address(weight), address(bias),
        dtype, _parameter_dtype(dtype, scale, weight, bias), rows, width, centred, eps,
        address(s), y.data_ptr(), address(stats),
    )  # fmt: skip
    return outputs


_FORWARD = define(
    "norm_forward(str impl, Tensor x, Tensor? residual, Tensor? scale, Tensor? weight, Tensor? bias, bool centred, "
    "float eps, bool save) -> Tensor[]",
    _forward,
    _forward_fake,
)


def _backward_fake(
    impl: str,
    grad_y: Tensor,
    grad_s: Tensor | None,
    s: Tensor,
    x: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    stats: Tensor,
    centred: bool,
    wanted: list[bool],
) -> list[Tensor]:
    """[grad of s, grads], with a scale [grad of s, grad of x, grads]; grads are rows, one for each wanted parameter."""
    grads = s.new_empty((sum(wanted), s.shape[-1]), dtype=stats.dtype)
    return [s.new_empty(s.shape) for _ in range(1 if scale is None else 2)] + [grads]


def _backward(
    impl: str,
    grad_y: Tensor,
    grad_s: Tensor | None,
    s: Tensor,
    x: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    stats: Tensor,
    centred: bool,
    wanted: list[bool],
) -> list[Tensor]:
    grad_sum, *grad_xs, grads = outputs = _backward_fake(
        impl, grad_y, grad_s, s, x, scale, weight, stats, centred, wanted
    )
    width, rows = s.shape[-1], stats.shape[1]
    if rows == 0:
        grads.zero_()
        return outputs
    blocks = _blocks(s, rows)
    partials = s.new_empty((blocks, *grads.shape), dtype=stats.dtype)
    grad_y, grad_y_stride = as_rows(grad_y)
    grad_s, grad_s_stride = (None, 0) if grad_s is None else as_rows(grad_s)
    s, s_stride = as_rows(s)
    x, x_stride = (None, 0) if x is None else as_rows(x)
    scale, weight = _parameters(s, scale, weight)
    grad_x = grad_xs[0] if grad_xs else None
    if impl == "triton":
        from vitok.kernels import norm as kernel

        kernel.norm_backward(
            grad_y, grad_y_stride, grad_s, grad_s_stride, s, s_stride, x, x_stride, scale, weight, stats, rows, width,
            centred, grad_sum, grad_x, wanted, partials, grads,
        )  # fmt: skip
        return outputs
    dtype = _native.DTYPE[s.dtype]
    _native.run(
        "norm_backward", s,
        grad_y.data_ptr(), grad_y_stride, address(grad_s), grad_s_stride, s.data_ptr(), s_stride,
        address(x), x_stride, address(scale), address(weight), stats.data_ptr(),
        dtype, _parameter_dtype(dtype, scale, weight), rows, width, centred,
        grad_sum.data_ptr(), address(grad_x), *wanted, blocks, partials.data_ptr(), grads.data_ptr(),
    )  # fmt: skip
    return outputs


def _blocks(s: Tensor, rows: int) -> int:
    """How many blocks of rows sum their parameter gradients apart; never by the number of threads."""
    if s.is_cuda:
        return min(2 * torch.cuda.get_device_properties(s.device).multi_processor_count, -(-rows // 8))
    return min(256, -(-rows // 32))


_BACKWARD = define(
    "norm_backward(str impl, Tensor grad_y, Tensor? grad_s, Tensor s, Tensor? x, Tensor? scale, Tensor? weight, "
    "Tensor stats, bool centred, bool[] wanted) -> Tensor[]",
    _backward,
    _backward_fake,
)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, impl, x, residual, scale, weight, bias, centred, eps):  # type: ignore[no-untyped-def]
        y, *sums, stats = _FORWARD(impl, x, residual, scale, weight, bias, centred, eps, True)
        s = sums[0] if sums else x
        ctx.save_for_backward(s, None if scale is None else x, scale, weight, stats)
        ctx.impl, ctx.centred = impl, centred
        ctx.parameter_dtypes = [None if p is None else p.dtype for p in (weight, bias, scale)]
        ctx.set_materialize_grads(False)
        return (y, s) if sums else y

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_y, grad_s=None):  # type: ignore[no-untyped-def]
        s, x, scale, weight, stats = ctx.saved_tensors
        if grad_y is None:
            grad_y = s.new_zeros(s.shape)
        _, _, residual_wanted, scale_wanted, weight_wanted, bias_wanted, _, _ = ctx.needs_input_grad
        wanted = [weight_wanted, bias_wanted, scale_wanted]
        grad_sum, *grad_xs, grads = _BACKWARD(ctx.impl, grad_y, grad_s, s, x, scale, weight, stats, ctx.centred, wanted)
        rows = iter(grads.unbind())
        to_weight, to_bias, to_scale = (
            next(rows).to(dtype) if want else None for want, dtype in zip(wanted, ctx.parameter_dtypes, strict=True)
        )
        grad_x = grad_xs[0] if grad_xs else grad_sum
        return None, grad_x, grad_sum if residual_wanted else None, to_scale, to_weight, to_bias, None, None


def _run(
    impl: str,
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
) -> Any:
    """y, with a residual (y, s)."""
    centred = kind == "layer"
    if torch.is_grad_enabled():
        for tensor in (x, residual, scale, weight, bias):
            if tensor is not None and tensor.requires_grad:
                return _Norm.apply(impl, x, residual, scale, weight, bias, centred, eps)
    outputs = _FORWARD(impl, x, residual, scale, weight, bias, centred, eps, False)
    return outputs[0] if residual is None else tuple(outputs)


def _run_norm(impl: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float) -> Tensor:
    y: Tensor = _run(impl, x, None, None, weight, bias, kind, eps)
    return y


def _native_refuses(x: Tensor, *_: object) -> str:
    if x.is_cuda and x.dtype == torch.float64:
        return "it computes in float32 on CUDA"
    if x.is_cuda and x.shape[-1] > MAX_GPU_WIDTH:
        return f"rows have at most {MAX_GPU_WIDTH} elements on CUDA, got {x.shape[-1]}"
    return _native.refuses(x)


def _triton_refuses(x: Tensor, *_: object) -> str:
    if x.shape[-1] > MAX_GPU_WIDTH:
        return f"rows have at most {MAX_GPU_WIDTH} elements, got {x.shape[-1]}"
    return _triton.refuses(x)


def _op(name: str, run: Callable[..., Any], reference: Callable[..., Any]) -> Op:
    return Op(
        name,
        *kernels(run, _native_refuses, _triton_refuses),
        Implementation("reference", reference),
        pointwise=True,
    )


_NORM = _op("norm", _run_norm, reference)
_ADD_NORM = _op("add_norm", _run, add_reference)
