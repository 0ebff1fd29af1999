"""tubelet_unembed: tokens to pixels. tubelet l of clip b = W . tokens[b, l] + bias, written into the clip and cropped.

The transposed convolution with kernel = stride of ViTok (arXiv:2501.09755), section 2. The native implementation is a
library matrix product and one scatter of its rows into the clip; the Triton one writes the product into the clip.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vitok.errors import InputError
from vitok.ops import _triton
from vitok.ops._library import define, differentiable_once, kernels
from vitok.ops._registry import Implementation, Op
from vitok.ops._tensors import check_float, check_integers
from vitok.ops._tubelet import (
    SCATTER,
    check_tubelet,
    empty_clips,
    grid,
    native_refuses,
    scatter_backward,
)
from vitok.ops.linear import autocast, check_linear, product, product_dtype, wide_linear

LAYOUTS = ("channels_first", "channels_last")


def tubelet_unembed(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    tubelet: tuple[int, int],
    size: tuple[int, int, int],
    out_dtype: torch.dtype | None = None,
    layout: str = "channels_first",
    impl: str = "auto",
) -> Tensor:
    """Turn every token back into its tubelet of pixels.

    Args:
        tokens: [B, L, width] with L = ceil(T/q) * ceil(H/p) * ceil(W/p), row-major (t, y, x).
        weight: [q * p * p * 3, width], elements in (frame, row, column, colour) order.
        bias: [q * p * p * 3], or [3] for one bias a colour, or None.
        tubelet: (q, p).
        size: (T, H, W) of the clip; what the tubelets hold beyond it is cropped.
        out_dtype: None for the tokens' dtype (autocast's where it is on), or torch.uint8: clamped to [-1, 1], mapped to
            0..255 and rounded, ties to even; NaN gives 0. Bytes have no gradient.
        layout: "channels_first" or "channels_last".
        impl: "auto", "native", "triton" or "reference".

    Returns: contiguous pixels [B, 3, T, H, W], or [B, T, H, W, 3] channels-last, no activation. Differentiable in all
    tensors unless they are bytes. Weight and bias are taken in the tokens' dtype. Raises InputError when shapes, dtypes
    or devices do not fit.

    >>> tubelet_unembed(torch.zeros(1, 4, 8), torch.ones(768, 8), tubelet=(1, 16), size=(1, 30, 32)).shape
    torch.Size([1, 3, 1, 30, 32])
    """
    _check("tokens", "width", tokens, tubelet, size, out_dtype, layout)
    q, p = tubelet
    if bias is not None and bias.shape == (3,):
        bias = bias.repeat(q * p * p)
    wanted = f"[{q * p * p * 3}, {tokens.shape[2]}] for tubelet {tubelet}"
    check_linear(tokens, weight, bias, wanted, (q * p * p * 3, tokens.shape[2]))
    if out_dtype == torch.uint8:
        tokens, weight, bias = tokens.detach(), weight.detach(), None if bias is None else bias.detach()
    dtype = autocast(tokens)
    tokens, weight, bias = tokens.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _UNEMBED_OP(impl, tokens, weight, bias, q, p, tuple(size), out_dtype or dtype, layout == "channels_last")


def tubelet_scatter(
    rows: Tensor,
    *,
    tubelet: tuple[int, int],
    size: tuple[int, int, int],
    out_dtype: torch.dtype | None = None,
    layout: str = "channels_first",
    impl: str = "auto",
) -> Tensor:
    """The second half of `tubelet_unembed`: rows [B, L, q * p * p * 3], any strides, written into clips and cropped.

    `tubelet_gather` undoes it. Arguments, result and errors are those of `tubelet_unembed`, but the dtype is the rows'
    own, under autocast too, unless out_dtype is torch.uint8.

    >>> tubelet_scatter(torch.zeros(1, 4, 768), tubelet=(1, 16), size=(1, 30, 32), layout="channels_last").shape
    torch.Size([1, 1, 30, 32, 3])
    """
    _check("rows", "q * p * p * 3", rows, tubelet, size, out_dtype, layout)
    q, p = tubelet
    if rows.shape[2] != q * p * p * 3:
        raise InputError(f"rows must be [B, L, {q * p * p * 3}] for tubelet {tubelet}, got {list(rows.shape)}")
    return _SCATTER_OP(impl, rows, q, p, tuple(size), out_dtype or rows.dtype, layout == "channels_last")


def _check(
    name: str,
    width: str,
    x: Tensor,
    tubelet: tuple[int, int],
    size: tuple[int, int, int],
    out_dtype: torch.dtype | None,
    layout: str,
) -> None:
    check_tubelet(tubelet)
    check_integers("size", size, "(T, H, W)")
    count = math.prod(grid(size, *tubelet))
    if x.dim() != 3 or x.shape[1] != count:
        raise InputError(f"{name} must be [B, {count}, {width}] for size {size}, got {list(x.shape)}")
    check_float(name, x)
    if out_dtype not in (None, torch.uint8):
        raise InputError(f"out_dtype must be None or torch.uint8, got {out_dtype}")
    if layout not in LAYOUTS:
        raise InputError(f"layout must be 'channels_first' or 'channels_last', got {layout!r}")


Size = tuple[int, int, int]


def reference(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    q: int,
    p: int,
    size: Size,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """Eager composition: linear, permute, crop and, for uint8, round."""
    return scatter_reference(F.linear(tokens, weight, bias), q, p, size, dtype, channels_last)


def scatter_reference(rows: Tensor, q: int, p: int, size: Size, dtype: torch.dtype, channels_last: bool) -> Tensor:
    t, y, x = grid(size, q, p)
    tubelets = rows.reshape(rows.shape[0], t, y, x, q, p, p, 3).permute(0, 1, 4, 2, 5, 3, 6, 7)
    pixels = tubelets.reshape(rows.shape[0], t * q, y * p, x * p, 3)[:, : size[0], : size[1], : size[2]]
    if dtype == torch.uint8:
        pixels = pixels.detach().float().clamp(-1, 1).add(1).mul(127.5).round().nan_to_num(0.0).to(torch.uint8)
    return (pixels if channels_last else pixels.permute(0, 4, 1, 2, 3)).contiguous()


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, impl, rows, q, p, size, dtype, channels_last):  # type: ignore[no-untyped-def]
        ctx.arguments = (impl, q, p, dtype, channels_last)
        return SCATTER(impl, rows, q, p, size, False, dtype, channels_last)

    @staticmethod
    @differentiable_once
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        impl, q, p, dtype, channels_last = ctx.arguments
        return None, scatter_backward(impl, gradient, q, p, dtype, channels_last), None, None, None, None, None


def _run_scatter(
    impl: str, rows: Tensor, q: int, p: int, size: Size, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    if dtype == torch.uint8:
        rows = rows.detach()
    if rows.requires_grad and torch.is_grad_enabled():
        pixels: Tensor = _Scatter.apply(impl, rows, q, p, size, dtype, channels_last)
        return pixels
    scattered: Tensor = SCATTER(impl, rows, q, p, size, False, dtype, channels_last)
    return scattered


def _unembed(
    impl: str,
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    q: int,
    p: int,
    size: list[int],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    if impl == "triton":
        from vitok.kernels import tubelet_unembed as kernel

        frames, height, width = size
        return kernel.tubelet_unembed(tokens, weight, bias, q, p, (frames, height, width), dtype, channels_last)
    rows = wide_linear(tokens, weight, bias, product_dtype(tokens))
    pixels: Tensor = SCATTER(impl, rows, q, p, size, False, dtype, channels_last)
    return pixels


_FORWARD = define(
    "tubelet_unembed_forward(str impl, Tensor tokens, Tensor weight, Tensor? bias, int q, int p, SymInt[] size,"
    " ScalarType dtype, bool channels_last) -> Tensor",
    _unembed,
    lambda impl, tokens, weight, bias, q, p, size, dtype, last: empty_clips(tokens, size, dtype, last),
)


class _Unembed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, impl, tokens, weight, bias, q, p, size, dtype, channels_last):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(tokens, weight)
        ctx.arguments = (q, p, dtype, channels_last)
        ctx.impl = impl
        return _FORWARD(impl, tokens, weight, bias, q, p, size, dtype, channels_last)

    @staticmethod
    @differentiable_once
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        tokens, weight = ctx.saved_tensors
        rows = scatter_backward(ctx.impl, gradient, *ctx.arguments)
        of_tokens = of_weight = of_bias = None
        if ctx.needs_input_grad[1]:
            of_tokens = product(rows, weight)
        if ctx.needs_input_grad[2]:
            of_weight = product(rows.flatten(0, 1).mT, tokens.flatten(0, 1))
        if ctx.needs_input_grad[3]:
            of_bias = rows.sum((0, 1))
        return None, of_tokens, of_weight, of_bias, None, None, None, None, None


def _run_unembed(
    impl: str,
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    q: int,
    p: int,
    size: Size,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (tokens, weight, bias))
    run = _Unembed.apply if wanted else _FORWARD
    pixels: Tensor = run(impl, tokens, weight, bias, q, p, size, dtype, channels_last)
    return pixels


_UNEMBED_OP = Op(
    "tubelet_unembed",
    *kernels(
        _run_unembed,
        lambda tokens, weight, bias, q, p, size, dtype, last: native_refuses(tokens, p, dtype),
        lambda tokens, *_: _triton.refuses(tokens),
    ),
    Implementation("reference", reference),
)

_SCATTER_OP = Op(
    "tubelet_scatter",
    *kernels(
        _run_scatter,
        lambda rows, q, p, size, dtype, last: native_refuses(rows, p, dtype),
        lambda rows, *_: _triton.refuses(rows),
    ),
    Implementation("reference", scatter_reference),
)
