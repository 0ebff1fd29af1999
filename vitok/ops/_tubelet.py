"""The operators of the tubelet ops: clips to patch rows (gather), rows to clips (scatter), the other's gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitok import _native
from vitok.errors import InputError
from vitok.ops._library import define
from vitok.ops._tensors import check_integers

UINT8_SCALE, UINT8_SHIFT = 2.0 / 255.0, -1.0


def grid(size: tuple[int, int, int], q: int, p: int) -> tuple[int, int, int]:
    """Tubelets in time, height and width that cover a clip of size (T, H, W)."""
    return -(-size[0] // q), -(-size[1] // p), -(-size[2] // p)


def check_tubelet(tubelet: tuple[int, int]) -> None:
    check_integers("tubelet", tubelet, "(frames, pixels)")
    if max(tubelet) >= 2**16 or tubelet[0] * tubelet[1] ** 2 >= 2**28:
        raise InputError(f"tubelet must hold fewer than 2^28 pixels, got {tubelet}")


def _gather_empty(impl: str, pixels: Tensor, q: int, p: int, pad_zero: bool, dtype: torch.dtype) -> Tensor:
    batch, frames, height, width, colours = pixels.shape
    t, y, x = grid((frames, height, width), q, p)
    return pixels.new_empty((batch, t * y * x, q * p * p * colours), dtype=dtype)


def _gather(impl: str, pixels: Tensor, q: int, p: int, pad_zero: bool, dtype: torch.dtype) -> Tensor:
    scale, shift = (UINT8_SCALE, UINT8_SHIFT) if pixels.dtype == torch.uint8 else (1.0, 0.0)
    if impl == "triton":
        from vitok.kernels import tubelet_gather as kernel

        return kernel.tubelet_gather(pixels, q, p, pad_zero, dtype, scale, shift)
    out = _gather_empty(impl, pixels, q, p, pad_zero, dtype)
    _native.run(
        "tubelet_gather", pixels,
        pixels.data_ptr(), _native.DTYPE[pixels.dtype], pixels.shape[:4], pixels.stride(), q, p, pad_zero,
        out.data_ptr(), _native.DTYPE[dtype], scale, shift,
    )  # fmt: skip
    return out


def empty_clips(like: Tensor, size: Sequence[int], dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Clips of (T, H, W), as many as `like` has rows in its first dimension."""
    batch = like.shape[0]
    return like.new_empty((batch, *size, 3) if channels_last else (batch, 3, *size), dtype=dtype)


def _scatter_empty(
    impl: str, rows: Tensor, q: int, p: int, size: list[int], fold_edges: bool, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    return empty_clips(rows, size, dtype, channels_last)


def _scatter(
    impl: str, rows: Tensor, q: int, p: int, size: list[int], fold_edges: bool, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    frames, height, width = size
    if impl == "triton":
        from vitok.kernels import tubelet_scatter as kernel

        return kernel.tubelet_scatter(rows, q, p, (frames, height, width), fold_edges, dtype, channels_last)
    out = empty_clips(rows, size, dtype, channels_last)
    pixels = out if channels_last else out.permute(0, 2, 3, 4, 1)
    _native.run(
        "tubelet_scatter", rows,
        rows.data_ptr(), _native.DTYPE[rows.dtype], rows.stride(), q, p, fold_edges,
        out.data_ptr(), _native.DTYPE[dtype], pixels.shape[:4], pixels.stride(),
    )  # fmt: skip
    return out


GATHER = define(
    "tubelet_gather(str impl, Tensor pixels, int q, int p, bool pad_zero, ScalarType dtype) -> Tensor",
    _gather,
    _gather_empty,
)

# fold_edges: sum what lies beyond the clip into the last frame, row and column instead of dropping it.
SCATTER = define(
    "tubelet_scatter(str impl, Tensor rows, int q, int p, SymInt[] size, bool fold_edges, ScalarType dtype,"
    " bool channels_last) -> Tensor",
    _scatter,
    _scatter_empty,
)


def gather_backward(impl: str, rows: Tensor, pixels: Tensor, q: int, p: int, pad_zero: bool) -> Tensor:
    """The gradient of pixels [B, T, H, W, 3] from that of their rows, in the pixels' dtype and order of memory."""
    interleaved = pixels.stride(4) == 1
    gradient = SCATTER(impl, rows, q, p, pixels.shape[1:4], not pad_zero, pixels.dtype, interleaved)
    return gradient if interleaved else gradient.permute(0, 2, 3, 4, 1)


def scatter_backward(impl: str, pixels: Tensor, q: int, p: int, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """The gradient of rows from that of the pixels [B, T, H, W, 3] or [B, 3, T, H, W] made of them."""
    return GATHER(impl, pixels if channels_last else pixels.permute(0, 2, 3, 4, 1), q, p, True, dtype)


def native_refuses(x: Tensor, p: int, dtype: torch.dtype, *others: Tensor | None) -> str:
    """Why the native kernels cannot turn x into `dtype` (uint8 counts as a float here), or ""."""
    if (x.dtype == torch.float64) != (dtype == torch.float64):
        return f"it does not convert {x.dtype} to {dtype}"
    if p > 256:
        return f"patches have at most 256 pixels a side, got {p}"
    return _native.refuses(x, *others)
