"""Tubelet gather: patch rows out of pixels of any layout, normalised on the way.

    out[b, (lt, ly, lx), (i, j, k, ch)] = pixels[b, lt*q + i, ly*p + j, lx*p + k, ch] * scale + shift

Fused: cast, normalisation, edge padding and the im2col permutation. A uint8 element is read once (1 byte) and written
once in the type of the following matmul (2 bytes); the eager composition writes and reads it several times as fp32.

pixels  [B, T, H, W, 3]  uint8, float16, bfloat16 or float32, any non-negative strides
out     [B, ceil(T/q) * ceil(H/p) * ceil(W/p), q*p*p*3]  float16, bfloat16 or float32, contiguous
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# 1024 elements over 4 warps are 8 a thread: one 16-byte store of a 16-bit type each. Not measured yet.
BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def tubelet_gather_forward_kernel(
    pixels_ptr,
    out_ptr,
    frames,
    height,
    width,
    rows_t,
    rows_y,
    row_elements,
    pixels_stride_b,
    pixels_stride_t,
    pixels_stride_y,
    pixels_stride_x,
    pixels_stride_c,
    scale,
    shift,
    Q: tl.constexpr,
    P: tl.constexpr,
    PAD_ZERO: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[token_row, e] = pixels[...] * scale + shift for one block of elements of one token row (b, lt, ly).

    WHOLE_ROWS promises interleaved rows without padding in x: a patch row is then 3P neighbouring elements, which lets
    the compiler use wide loads.
    """
    token_row = tl.program_id(0)
    ly = token_row % rows_y
    lt = token_row // rows_y % rows_t
    b = token_row // rows_y // rows_t

    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] (lx, i, j, k, ch) flattened
    within = e % (3 * P)  # (k, ch)
    j = e // (3 * P) % P
    i = e // (3 * P * P) % Q
    lx = e // (3 * P * P * Q)

    t = lt * Q + i
    y = ly * P + j
    frame = tl.minimum(t, frames - 1).to(tl.int64)
    line = tl.minimum(y, height - 1).to(tl.int64)
    origin = b.to(tl.int64) * pixels_stride_b + frame * pixels_stride_t + line * pixels_stride_y
    if WHOLE_ROWS:
        x = lx * P
        offset = origin + lx.to(tl.int64) * (3 * P) + within
    else:
        x = lx * P + within // 3
        column = tl.minimum(x, width - 1).to(tl.int64)
        offset = origin + column * pixels_stride_x + (within % 3).to(tl.int64) * pixels_stride_c

    inside = e < row_elements
    value = tl.load(pixels_ptr + offset, mask=inside, other=0).to(tl.float32)
    value = value * scale + shift
    if PAD_ZERO:
        value = tl.where((t < frames) & (y < height) & (x < width), value, 0.0)
    tl.store(out_ptr + token_row.to(tl.int64) * row_elements + e, value.to(out_ptr.dtype.element_ty), mask=inside)


def tubelet_gather(
    pixels: torch.Tensor,
    q: int,
    p: int,
    pad_zero: bool,
    dtype: torch.dtype,
    scale: float,
    shift: float,
) -> torch.Tensor:
    """Launch the kernel on pixels [B, T, H, W, 3] of any strides.

    Returns a contiguous [B, ceil(T/q) * ceil(H/p) * ceil(W/p), q*p*p*3] tensor of `dtype`. The arithmetic is fp32,
    with the product and the sum rounded separately, so the bits equal those of the eager expression.
    """
    batch, frames, height, width, _ = pixels.shape
    rows_t, rows_y, columns = triton.cdiv(frames, q), triton.cdiv(height, p), triton.cdiv(width, p)
    out = torch.empty(batch, rows_t * rows_y * columns, q * p * p * 3, dtype=dtype, device=pixels.device)
    if batch == 0:
        return out
    row_elements = columns * q * p * p * 3
    tubelet_gather_forward_kernel[(batch * rows_t * rows_y, triton.cdiv(row_elements, BLOCK))](
        pixels,
        out,
        frames,
        height,
        width,
        rows_t,
        rows_y,
        row_elements,
        pixels.stride(0),
        pixels.stride(1),
        pixels.stride(2),
        pixels.stride(3),
        pixels.stride(4),
        float(scale),
        float(shift),
        Q=q,
        P=p,
        PAD_ZERO=pad_zero,
        WHOLE_ROWS=pixels.stride(3) == 3 and pixels.stride(4) == 1 and width % p == 0,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    return out
