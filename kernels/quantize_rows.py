"""Rows to 8 bits with a scale each, after a norm or a gate, and the integer sums of their products back to floats.

    quantize     h = x,  (x - [CENTRED] mean(x)) * rstd,  or  gate * c(gate) * up
                 scale = max |h| / largest,  q = h / scale rounded
    dequantize   out = sums * row_scale * column_scale + bias  (+ out)

Fused: the norm or gate, the search for the largest magnitude, and the rounding. An element between two products is read
once (2 bytes, or 4 for a gate) and written once (1 byte); a norm or gate of its own would write and read 4 more.

x      [rows, width or 2 * width]  float16, bfloat16 or float32, rows any distance apart, neighbouring elements
q      [rows, width]               int8 or float8 e4m3, contiguous; scale [rows] float32
sums   [rows, columns]             int32, contiguous, as is out (float16, bfloat16 or float32)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Elements of a tile, and of a warp's share: 16 values a thread beside the same number of a gate. Not measured yet.
TILE, WARP = 4096, 512
MAX_ROWS = 32
# 1024 sums over 4 warps: 16 bytes a thread are loaded twice. Not measured yet.
BLOCK, NUM_WARPS = 1024, 4


@triton.jit
def quantize_rows_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    rows,
    width,
    x_stride_row,
    eps,
    largest,
    BEFORE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """BLOCK_M whole rows: q = h * (largest / max |h|), to the nearest, ties to even. BEFORE is "", or what makes h."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_W)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    from_ptr = x_ptr + row[:, None] * x_stride_row + column[None, :]
    h = tl.load(from_ptr, mask=mask, other=0.0).to(tl.float32)
    if BEFORE == "silu" or BEFORE == "gelu":
        up = tl.load(from_ptr + width, mask=mask, other=0.0).to(tl.float32)
        c = 0.5 + 0.5 * tl.erf(h * 0.7071067811865476) if BEFORE == "gelu" else 1.0 / (1.0 + tl.exp(-h))
        h = h * c * up
    elif BEFORE == "layer" or BEFORE == "rms":
        if BEFORE == "layer":
            h = tl.where(mask, h - (tl.sum(h, axis=1) / width)[:, None], 0.0)
        h = h * tl.rsqrt(tl.sum(h * h, axis=1) / width + eps)[:, None]
    most = tl.max(tl.abs(h), axis=1)  # [BLOCK_M]
    tl.store(scale_ptr + row, most / largest, mask=row < rows)
    q = h * tl.where(most > 0.0, largest / most, 0.0)[:, None]
    if q_ptr.dtype.element_ty == tl.int8:
        # Adding and subtracting 1.5 * 2^23 rounds a float below 2^22 to an integer.
        q = (q + 12582912.0) - 12582912.0
    tl.store(q_ptr + row[:, None] * width + column[None, :], q.to(q_ptr.dtype.element_ty), mask=mask)


@triton.jit
def dequantize_kernel(
    sums_ptr,
    row_scale_ptr,
    column_scale_ptr,
    bias_ptr,
    out_ptr,
    columns,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK elements of a row; bias may be None, ADD says that out holds what the result is added to."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < columns
    at = row * columns + column
    factor = tl.load(row_scale_ptr + row) * tl.load(column_scale_ptr + column, mask=inside, other=0.0)
    value = tl.load(sums_ptr + at, mask=inside, other=0).to(tl.float32) * factor
    if bias_ptr is not None:
        value += tl.load(bias_ptr + column, mask=inside, other=0.0)
    if ADD:
        value += tl.load(out_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside)


def quantize_rows(
    x: torch.Tensor,
    stride: int,
    q: torch.Tensor,
    scale: torch.Tensor,
    largest: float,
    before: str,
    eps: float,
) -> None:
    """Fill q [..., width] and scale [...] from x, whose rows lie `stride` apart."""
    if q.numel() == 0:
        return
    rows, width = scale.numel(), q.shape[-1]
    block_w = triton.next_power_of_2(width)
    block_m = min(max(TILE // block_w, 1), MAX_ROWS)
    quantize_rows_kernel[(triton.cdiv(rows, block_m),)](
        x,
        q,
        scale,
        rows,
        width,
        stride,
        eps,
        largest,
        BEFORE=before,
        BLOCK_M=block_m,
        BLOCK_W=block_w,
        num_warps=min(max(block_m * block_w // WARP, 1), 16),
    )


def dequantize(
    sums: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    add: bool,
) -> None:
    """Fill out [rows, columns], or add to it, from the sums of int8 products."""
    if sums.numel() == 0:
        return
    rows, columns = sums.shape
    dequantize_kernel[(rows, triton.cdiv(columns, BLOCK))](
        sums,
        row_scale,
        column_scale,
        bias,
        out,
        columns,
        ADD=add,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
