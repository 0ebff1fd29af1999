"""Tubelet scatter: patch rows into a clip, the transpose of the gather, to floats or to rounded bytes.

    out[b, lt*q + i, ly*p + j, lx*p + k, ch] = to_pixel(rows[b, (lt, ly, lx), (i, j, k, ch)])

Fused: the permutation, the crop, and for uint8 clamp, scale, round and cast. An element is read once (2 bytes) and
written once (1 or 2 bytes); the eager composition permutes, copies, clamps, adds, multiplies, rounds and casts in a
pass each.

rows  [B, ceil(T/q) * ceil(H/p) * ceil(W/p), q*p*p*3]  float16, bfloat16 or float32, any strides
out   [B, 3, T, H, W] or [B, T, H, W, 3]               contiguous; uint8 or float16, bfloat16, float32
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# 1024 elements over 4 warps are 8 a thread, a 16-byte store of a 16-bit type; a row of 256 pixels has 768 elements, one
# of 336 just over 1000, so one block covers the rows of common pictures. Not measured yet.
BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def to_byte(value):
    """Round (clamp(value, -1, 1) + 1) * 127.5 to nearest, ties to even; NaN gives 0. Needs enable_fp_fusion=False.

    Adding and subtracting 1.5 * 2^23 rounds a float below 2^22 to an integer, on the GPU as in the interpreter.
    """
    value = tl.where(value > -1.0, value, -1.0)
    value = (tl.where(value < 1.0, value, 1.0) + 1.0) * 127.5
    return ((value + 12582912.0) - 12582912.0).to(tl.uint8)


@triton.jit
def tubelet_scatter_forward_kernel(
    rows_ptr,
    out_ptr,
    frames,
    height,
    width,
    rows_t,
    rows_y,
    columns,
    rows_stride_b,
    rows_stride_l,
    rows_stride_e,
    Q: tl.constexpr,
    P: tl.constexpr,
    FOLD_EDGES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of the 3 * width elements of one row (b, t, y) of the clip.

    With FOLD_EDGES the elements that edge replication made of the last frame, row and column are summed into it, in the
    order of t, then y, then x; every other pixel is one load.
    """
    clip_row = tl.program_id(0)
    y = clip_row % height
    t = clip_row // height % frames
    b = (clip_row // height // frames).to(tl.int64)

    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] in the order of memory
    inside = e < 3 * width
    if CHANNELS_LAST:
        x, ch = e // 3, e % 3
        out_offset = clip_row.to(tl.int64) * (3 * width) + e
    else:
        x, ch = e % width, e // width
        plane = (b * 3 + ch) * frames + t
        out_offset = (plane * height + y) * width + x

    token = (t // Q * rows_y + y // P) * columns + x // P
    within = ((t % Q * P + y % P) * P + x % P) * 3 + ch
    offset = b * rows_stride_b + token.to(tl.int64) * rows_stride_l + within.to(tl.int64) * rows_stride_e
    value = tl.load(rows_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if FOLD_EDGES:
        more_t = tl.where(t == frames - 1, rows_t * Q - frames, 0)
        more_y = tl.where(y == height - 1, rows_y * P - height, 0)
        more_x = columns * P - width
        for d in range(1, (more_t + 1) * (more_y + 1) * (more_x + 1)):
            dx = d % (more_x + 1)
            dy = d // (more_x + 1) % (more_y + 1)
            dt = d // (more_x + 1) // (more_y + 1)
            replicated = inside & ((x == width - 1) | (dx == 0))
            further = (((dt * P + dy) * P + dx) * 3).to(tl.int64) * rows_stride_e
            value += tl.load(rows_ptr + offset + further, mask=replicated, other=0.0).to(tl.float32)

    if out_ptr.dtype.element_ty == tl.uint8:
        tl.store(out_ptr + out_offset, to_byte(value), mask=inside)
    else:
        tl.store(out_ptr + out_offset, value.to(out_ptr.dtype.element_ty), mask=inside)


def tubelet_scatter(
    rows: torch.Tensor,
    q: int,
    p: int,
    size: tuple[int, int, int],
    fold_edges: bool,
    dtype: torch.dtype,
    channels_last: bool,
) -> torch.Tensor:
    """Launch the kernel on rows [B, L, q*p*p*3] of any strides for clips of size (T, H, W).

    Returns a contiguous [B, T, H, W, 3] tensor when channels_last, else [B, 3, T, H, W]; of `dtype`, where uint8 is
    rounded from [-1, 1]. What the rows hold beyond the clip is dropped, or summed into its edges when fold_edges.
    """
    batch, (frames, height, width) = len(rows), size
    shape = (batch, *size, 3) if channels_last else (batch, 3, *size)
    out = torch.empty(shape, dtype=dtype, device=rows.device)
    if batch == 0:
        return out
    rows_t, rows_y, columns = triton.cdiv(frames, q), triton.cdiv(height, p), triton.cdiv(width, p)
    tubelet_scatter_forward_kernel[(batch * frames * height, triton.cdiv(3 * width, BLOCK))](
        rows,
        out,
        frames,
        height,
        width,
        rows_t,
        rows_y,
        columns,
        rows.stride(0),
        rows.stride(1),
        rows.stride(2),
        Q=q,
        P=p,
        FOLD_EDGES=fold_edges and (rows_t * q, rows_y * p, columns * p) != (frames, height, width),
        CHANNELS_LAST=channels_last,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    return out
