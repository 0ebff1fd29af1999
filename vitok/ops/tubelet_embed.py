"""tubelet_embed: pixels to tokens. out[b, l] = W . normalise(tubelet l of clip b) + bias.

The gather reads the q x p x p x 3 pixels of every tubelet in any layout and dtype and maps uint8 to [-1, 1]. The native
implementation writes them as rows for a library matrix product, the Triton one multiplies whole tubelets as they come:
no float image, no padded image and no permuted copy ever exist. Conv3d with kernel = stride computes the same and is a
known slow path. Source: ViTok (arXiv:2501.09755), section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vitok.errors import InputError
from vitok.ops import _triton
from vitok.ops._library import define, differentiable_once, kernels
from vitok.ops._registry import Implementation, Op
from vitok.ops._tensors import FLOATS
from vitok.ops._tubelet import (
    GATHER,
    UINT8_SCALE,
    UINT8_SHIFT,
    check_tubelet,
    gather_backward,
    grid,
    native_refuses,
)
from vitok.ops.linear import autocast, check_linear, product, product_dtype, wide_linear

SOURCE_DTYPES = (torch.uint8, *FLOATS)


def tubelet_embed(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    tubelet: tuple[int, int],
    pad: str = "edge",
    impl: str = "auto",
) -> Tensor:
    """Embed every tubelet of a clip as one token.

    Args:
        pixels: [B, T, H, W, 3], any strides (a permuted view of a channels-first clip is fine). uint8 0..255, mapped to
            [-1, 1], or float, taken as it is.
        weight: [width, q * p * p * 3], elements of a tubelet in (frame, row, column, colour) order.
        bias: [width] or None.
        tubelet: (q, p).
        pad: what fills T, H, W up to multiples of q, p, p: "edge" repeats the last frame, row and column, "zero" is
            mid-grey.
        impl: "auto", "native", "triton" or "reference".

    Returns: tokens [B, ceil(T/q) * ceil(H/p) * ceil(W/p), width] in row-major (t, y, x) order, in the weight's dtype,
    or autocast's where it is on. Differentiable in float pixels, weight and bias; the backward gathers the rows again
    instead of keeping them. Raises InputError for wrong shapes, dtypes and devices.

    >>> tubelet_embed(torch.zeros(1, 1, 32, 32, 3, dtype=torch.uint8), torch.ones(8, 768), tubelet=(1, 16)).shape
    torch.Size([1, 4, 8])
    """
    _check(pixels, tubelet, pad)
    q, p = tubelet
    check_linear(pixels, weight, bias, f"[width, {q * p * p * 3}] for tubelet {tubelet}", (None, q * p * p * 3))
    weight = weight.to(autocast(weight))
    bias = None if bias is None else bias.to(weight.dtype)
    return _EMBED_OP(impl, pixels, weight, bias, q, p, pad == "zero")


def tubelet_gather(
    pixels: Tensor,
    *,
    tubelet: tuple[int, int],
    pad: str = "edge",
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> Tensor:
    """The first half of `tubelet_embed`: normalised tubelets as rows, [B, L, q * p * p * 3] in `dtype`.

    dtype is float32, bfloat16, float16 or float64; the other arguments and errors are those of `tubelet_embed`.
    Differentiable in float pixels.
    """
    _check(pixels, tubelet, pad)
    if dtype not in FLOATS:
        raise InputError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    return _GATHER_OP(impl, pixels, *tubelet, pad == "zero", dtype)


def _check(pixels: Tensor, tubelet: tuple[int, int], pad: str) -> None:
    if pixels.dim() != 5 or pixels.shape[-1] != 3:
        raise InputError(f"pixels must be [B, T, H, W, 3], got {list(pixels.shape)}")
    if pixels.dtype not in SOURCE_DTYPES:
        raise InputError(f"pixels must be uint8 or floating point, got {pixels.dtype}")
    if pixels.numel() == 0 and 0 in pixels.shape[1:]:
        raise InputError(f"pixels must have at least one frame, row and column, got {list(pixels.shape)}")
    if pad not in ("edge", "zero"):
        raise InputError(f"pad must be 'edge' or 'zero', got {pad!r}")
    check_tubelet(tubelet)


def reference(pixels: Tensor, q: int, p: int, pad_zero: bool, dtype: torch.dtype) -> Tensor:
    """Eager composition of the gather; float64 when either side is."""
    compute = torch.float64 if torch.float64 in (pixels.dtype, dtype) else torch.float32
    if pixels.dtype == torch.uint8:
        pixels = pixels.to(compute) * UINT8_SCALE + UINT8_SHIFT
    for dim, step in ((1, q), (2, p), (3, p)):
        size = pixels.shape[dim]
        if missing := -size % step:
            last = pixels.narrow(dim, size - 1, 1).expand(
                [missing if d == dim else n for d, n in enumerate(pixels.shape)]
            )
            pixels = torch.cat((pixels, torch.zeros_like(last) if pad_zero else last), dim)
    batch, frames, height, width, colours = pixels.shape
    tubelets = pixels.reshape(batch, frames // q, q, height // p, p, width // p, p, colours).permute(
        0, 1, 3, 5, 2, 4, 6, 7
    )
    return tubelets.flatten(4).flatten(1, 3).to(dtype)


def embed_reference(pixels: Tensor, weight: Tensor, bias: Tensor | None, q: int, p: int, pad_zero: bool) -> Tensor:
    """Eager composition of the whole op, in the weight's dtype."""
    return F.linear(reference(pixels, q, p, pad_zero, weight.dtype), weight, bias)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, impl, pixels, q, p, pad_zero, dtype):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(pixels)
        ctx.arguments = (impl, q, p, pad_zero)
        return GATHER(impl, pixels, q, p, pad_zero, dtype)

    @staticmethod
    @differentiable_once
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        impl, q, p, pad_zero = ctx.arguments
        return None, gather_backward(impl, gradient, ctx.saved_tensors[0], q, p, pad_zero), None, None, None, None


def _run_gather(impl: str, pixels: Tensor, q: int, p: int, pad_zero: bool, dtype: torch.dtype) -> Tensor:
    gather = _Gather.apply if pixels.requires_grad and torch.is_grad_enabled() else GATHER
    return gather(impl, pixels, q, p, pad_zero, dtype)


def _embed_empty(
    impl: str, pixels: Tensor, weight: Tensor, bias: Tensor | None, q: int, p: int, pad_zero: bool
) -> Tensor:
    t, y, x = grid((pixels.shape[1], pixels.shape[2], pixels.shape[3]), q, p)
    return weight.new_empty((pixels.shape[0], t * y * x, weight.shape[0]))


def _embed(impl: str, pixels: Tensor, weight: Tensor, bias: Tensor | None, q: int, p: int, pad_zero: bool) -> Tensor:
    if impl == "triton":
        from vitok.kernels import tubelet_embed as kernel

        if kernel.fits(pixels, q, p):
            return kernel.tubelet_embed(pixels, weight, bias, q, p, UINT8_SCALE, UINT8_SHIFT)
    compute = product_dtype(weight)
    return wide_linear(GATHER(impl, pixels, q, p, pad_zero, compute), weight, bias, compute).to(weight.dtype)


_FORWARD = define(
    "tubelet_embed_forward(str impl, Tensor pixels, Tensor weight, Tensor? bias, int q, int p, bool pad_zero)"
    " -> Tensor",
    _embed,
    _embed_empty,
)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, impl, pixels, weight, bias, q, p, pad_zero):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(pixels, weight)
        ctx.arguments = (impl, q, p, pad_zero)
        return _FORWARD(impl, pixels, weight, bias, q, p, pad_zero)

    @staticmethod
    @differentiable_once
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        pixels, weight = ctx.saved_tensors
        impl, q, p, pad_zero = ctx.arguments
        of_pixels = of_weight = of_bias = None
        if ctx.needs_input_grad[1]:
            of_pixels = gather_backward(impl, product(gradient, weight), pixels, q, p, pad_zero)
        if ctx.needs_input_grad[2]:
            rows = GATHER(impl, pixels, q, p, pad_zero, product_dtype(weight))
            of_weight = product(gradient.flatten(0, 1).mT, rows.flatten(0, 1))
        if ctx.needs_input_grad[3]:
            of_bias = gradient.sum((0, 1))
        return None, of_pixels, of_weight, of_bias, None, None, None


def _run_embed(
    impl: str, pixels: Tensor, weight: Tensor, bias: Tensor | None, q: int, p: int, pad_zero: bool
) -> Tensor:
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (pixels, weight, bias))
    return (_Embed.apply if wanted else _FORWARD)(impl, pixels, weight, bias, q, p, pad_zero)


def _native_refuses(pixels: Tensor, q: int, p: int, pad_zero: bool, dtype: torch.dtype) -> str:
    return native_refuses(pixels, p, dtype)


def _triton_refuses(pixels: Tensor, q: int, p: int, pad_zero: bool, dtype: torch.dtype) -> str:
    return _triton.refuses(pixels, dtype)


def _native_embed_refuses(pixels: Tensor, weight: Tensor, bias: Tensor | None, q: int, p: int, pad_zero: bool) -> str:
    return native_refuses(pixels, p, weight.dtype, weight)


def _triton_embed_refuses(pixels: Tensor, weight: Tensor, bias: Tensor | None, q: int, p: int, pad_zero: bool) -> str:
    return _triton.refuses(pixels, weight.dtype)


_EMBED_OP = Op(
    "tubelet_embed",
    *kernels(_run_embed, _native_embed_refuses, _triton_embed_refuses),
    Implementation("reference", embed_reference),
)

_GATHER_OP = Op(
    "tubelet_gather",
    *kernels(_run_gather, _native_refuses, _triton_refuses),
    Implementation("reference", reference),
)
