"""tubelet_embed: pixels to tokens. out[b, l] = W . normalise(tubelet l of clip b) + bias.

Two steps. The gather reads the q x p x p x 3 pixels of every tubelet in any layout and dtype, maps uint8 to [-1, 1]
and writes them as rows: no float image, no padded image and no permuted copy ever exist. A library matrix product
follows; Conv3d with kernel = stride computes the same and is a known slow path. Source: ViTok (arXiv:2501.09755),
section 2.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from vitok import _native
from vitok.errors import InputError
from vitok.ops import _triton
from vitok.ops._library import define
from vitok.ops._registry import Implementation, Op

SOURCE_DTYPES = (torch.uint8, torch.float32, torch.bfloat16, torch.float16, torch.float64)
UINT8_SCALE, UINT8_SHIFT = 2.0 / 255.0, -1.0


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

    Returns: tokens [B, ceil(T/q) * ceil(H/p) * ceil(W/p), width] in row-major (t, y, x) order, in the weight's dtype.
    Differentiable in float pixels, weight and bias. Raises InputError for wrong shapes and dtypes.

    >>> tubelet_embed(torch.zeros(1, 1, 32, 32, 3, dtype=torch.uint8), torch.ones(8, 768), tubelet=(1, 16)).shape
    torch.Size([1, 4, 8])
    """
    return F.linear(tubelet_gather(pixels, tubelet=tubelet, pad=pad, dtype=weight.dtype, impl=impl), weight, bias)


def tubelet_gather(
    pixels: Tensor,
    *,
    tubelet: tuple[int, int],
    pad: str = "edge",
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> Tensor:
    """The first half of `tubelet_embed`: normalised tubelets as rows, [B, L, q * p * p * 3] in `dtype`."""
    if pixels.dim() != 5 or pixels.shape[-1] != 3:
        raise InputError(f"pixels must be [B, T, H, W, 3], got {list(pixels.shape)}")
    if pixels.dtype not in SOURCE_DTYPES:
        raise InputError(f"pixels must be uint8 or floating point, got {pixels.dtype}")
    if pixels.numel() == 0 and 0 in pixels.shape[1:]:
        raise InputError(f"pixels must have at least one frame, row and column, got {list(pixels.shape)}")
    if pad not in ("edge", "zero"):
        raise InputError(f"pad must be 'edge' or 'zero', got {pad!r}")
    if min(tubelet) < 1:
        raise InputError(f"tubelet must be (frames, pixels), both at least 1, got {tubelet}")
    return _OP(impl, pixels, *tubelet, pad == "zero", dtype)


def reference(pixels: Tensor, q: int, p: int, pad_zero: bool, dtype: torch.dtype) -> Tensor:
    """Eager composition; float64 when either side is."""
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


def _scatter(rows: Tensor, size: tuple[int, int, int], q: int, p: int, pad_zero: bool) -> Tensor:
    """The transpose of the gather: gradients of rows [B, L, q * p * p * 3] summed into pixels [B, T, H, W, 3]."""
    t, h, w = (math.ceil(n / step) for n, step in zip(size, (q, p, p), strict=True))
    tubelets = rows.reshape(len(rows), t, h, w, q, p, p, 3).permute(0, 1, 4, 2, 5, 3, 6, 7)
    pixels = tubelets.reshape(len(rows), t * q, h * p, w * p, 3)
    for dim, n in enumerate(size, start=1):
        kept, padding = pixels.narrow(dim, 0, n), pixels.narrow(dim, n, pixels.shape[dim] - n)
        if padding.shape[dim] and not pad_zero:
            kept = kept.clone()
            kept.select(dim, n - 1).add_(padding.sum(dim))
        pixels = kept
    return pixels


def _empty(impl: str, pixels: Tensor, q: int, p: int, pad_zero: bool, dtype: torch.dtype) -> Tensor:
    batch, frames, height, width, colours = pixels.shape
    tokens = (-(-frames // q)) * (-(-height // p)) * (-(-width // p))
    return pixels.new_empty((batch, tokens, q * p * p * colours), dtype=dtype)


def _gather(impl: str, pixels: Tensor, q: int, p: int, pad_zero: bool, dtype: torch.dtype) -> Tensor:
    scale, shift = (UINT8_SCALE, UINT8_SHIFT) if pixels.dtype == torch.uint8 else (1.0, 0.0)
    if impl == "triton":
        from vitok.kernels import tubelet_gather as kernel

        return kernel.tubelet_gather(pixels, q, p, pad_zero, dtype, scale, shift)
    out = _empty(impl, pixels, q, p, pad_zero, dtype)
    _native.run(
        "tubelet_gather", pixels,
        pixels.data_ptr(), _native.DTYPE[pixels.dtype], pixels.shape[:4], pixels.stride(), q, p, pad_zero,
        out.data_ptr(), _native.DTYPE[dtype], scale, shift,
    )  # fmt: skip
    return out


_GATHER = define(
    "tubelet_gather(str impl, Tensor pixels, int q, int p, bool pad_zero, ScalarType dtype) -> Tensor", _gather, _empty
)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, impl, pixels, q, p, pad_zero, dtype):  # type: ignore[no-untyped-def]
        ctx.geometry = (tuple(pixels.shape[1:4]), q, p, pad_zero)
        ctx.dtype = pixels.dtype
        return _GATHER(impl, pixels, q, p, pad_zero, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return None, _scatter(grad, *ctx.geometry).to(ctx.dtype), None, None, None, None


def _run(impl: str, pixels: Tensor, q: int, p: int, pad_zero: bool, dtype: torch.dtype) -> Tensor:
    gather = _Gather.apply if pixels.requires_grad else _GATHER
    return gather(impl, pixels, q, p, pad_zero, dtype)


def _native_refuses(pixels: Tensor, q: int, p: int, pad_zero: bool, dtype: torch.dtype) -> str:
    if (pixels.dtype == torch.float64) != (dtype == torch.float64):
        return f"it does not convert {pixels.dtype} to {dtype}"
    if p > 256:
        return f"patches have at most 256 pixels a side, got {p}"
    return _native.refuses(pixels)


def _triton_refuses(pixels: Tensor, q: int, p: int, pad_zero: bool, dtype: torch.dtype) -> str:
    if torch.float64 in (pixels.dtype, dtype):
        return "it computes in float32"
    return _triton.refuses(pixels)


_OP = Op(
    "tubelet_embed",
    Implementation("native", partial(_run, "native"), missing=_native.reason(), refuses=_native_refuses),
    Implementation("triton", partial(_run, "triton"), missing=_triton.MISSING, refuses=_triton_refuses),
    Implementation("reference", reference),
)
