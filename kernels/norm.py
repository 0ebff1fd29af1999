"""Layer norm and RMS norm of rows, forward and backward, by themselves or of a residual sum.

    s = x  or  residual + scale * x, rounded to its dtype
    y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias         centred: layer norm
    y = s / sqrt(mean(s^2) + eps) * weight + bias                  not centred: RMS norm

Fused: sum, statistics, scale and shift. An element of a plain norm is read once and written once (4 bytes in bfloat16);
with the sum it is read from both tensors and written to both (8 bytes), where one step after another moves 10 or more.
Backward reads grad_y and s once and makes all gradients; those of the parameters are summed by blocks of rows, then in
order.

x, residual, s, y, grad_y, grad_s  [rows, width]  float16, bfloat16 or float32, rows any stride apart, elements adjacent
scale, weight, bias                [width]        the same dtype or float32
stats                              [1 or 2, rows] float32: mean (if centred), 1 / deviation
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Elements of a tile and of one warp's share of it. Forward: 32 values a thread, which hide the latency of a load;
# backward holds two inputs and up to three sums, so 8. Not measured yet.
FORWARD_TILE, FORWARD_WARP = 4096, 1024
BACKWARD_TILE, BACKWARD_WARP = 1024, 256
# No copies ahead through shared memory: other blocks hide the latency, and the copies' bookkeeping costs registers.
BACKWARD_STAGES = 1
# What 16 warps leave each thread. A plain layer norm of wide rows is told so: left alone, the compiler aims at half of
# it for a second block (width 4096, sm_80) and spills. RMS norms fit into half, and with a scale it does not try.
BACKWARD_REGISTERS = 128
# Rows of narrow tensors that one tile takes at most.
MAX_ROWS = 64
# Columns and blocks that one step of the last sum takes: 8 values a thread.
SUM_COLUMNS, SUM_BLOCKS, SUM_WARPS = 64, 16, 4


def tile(width: int, elements: int, warp: int) -> dict[str, int]:
    """BLOCK_M, BLOCK_W and num_warps for rows of `width`: a row is never split."""
    block_w = triton.next_power_of_2(width)
    block_m = min(max(elements // block_w, 1), MAX_ROWS)
    return {"BLOCK_M": block_m, "BLOCK_W": block_w, "num_warps": min(max(block_m * block_w // warp, 1), 16)}


@triton.jit
def norm_forward_kernel(
    x_ptr,
    residual_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    s_ptr,
    y_ptr,
    stats_ptr,
    rows,
    width,
    x_stride_row,
    residual_stride_row,
    eps,
    CENTRED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """y = (s - mean) * rstd * weight + bias for BLOCK_M whole rows, s = x or residual + scale * x.

    residual, scale, weight, bias, s and stats may be None. The variance is that of the distances from the mean.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_W)
    inside = column < width
    mask = (row < rows)[:, None] & inside[None, :]
    out = row[:, None] * width + column[None, :]

    s = tl.load(x_ptr + row[:, None] * x_stride_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        if scale_ptr is not None:
            s = s * tl.load(scale_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        residual = tl.load(residual_ptr + row[:, None] * residual_stride_row + column[None, :], mask=mask, other=0.0)
        rounded = (s + residual.to(tl.float32)).to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + out, rounded, mask=mask)
        s = rounded.to(tl.float32)

    if CENTRED:
        mean = tl.sum(s, axis=1) / width  # [BLOCK_M]
        s = tl.where(mask, s - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(s * s, axis=1) / width + eps)  # [BLOCK_M]
    if stats_ptr is not None:
        if CENTRED:
            tl.store(stats_ptr + row, mean, mask=row < rows)
            tl.store(stats_ptr + rows + row, rstd, mask=row < rows)
        else:
            tl.store(stats_ptr + row, rstd, mask=row < rows)

    y = s * rstd[:, None]
    if weight_ptr is not None:
        y = y * tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def norm_backward_kernel(
    grad_y_ptr,
    grad_s_ptr,
    s_ptr,
    x_ptr,
    scale_ptr,
    weight_ptr,
    stats_ptr,
    grad_sum_ptr,
    grad_x_ptr,
    weight_partial_ptr,
    bias_partial_ptr,
    scale_partial_ptr,
    rows,
    width,
    grad_y_stride_row,
    grad_s_stride_row,
    s_stride_row,
    x_stride_row,
    partial_stride_block,
    steps,
    CENTRED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Gradients of one block of steps * BLOCK_M rows; with g = grad_y * weight, h = (s - mean) * rstd, means over rows:

    grad_sum = rstd * (g - [CENTRED] mean(g) - h * mean(g * h)) + grad_s,  grad_x = scale * grad_sum
    grad_weight = sum grad_y * h,  grad_bias = sum grad_y,  grad_scale = sum grad_sum * x    over the block's rows

    grad_s, x, scale, weight, grad_x and each partial may be None.
    """
    block = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_W)
    inside = column < width
    weight_sum = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    bias_sum = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    scale_sum = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    # Loaded once, unlike the scale, which would be one row too many to hold.
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]

    for step in range(steps):
        row = (block * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (row < rows)[:, None] & inside[None, :]
        out = row[:, None] * width + column[None, :]
        rstd_row = row + rows if CENTRED else row
        rstd = tl.load(stats_ptr + rstd_row, mask=row < rows, other=0.0)[:, None]
        h = tl.load(s_ptr + row[:, None] * s_stride_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if CENTRED:
            h = h - tl.load(stats_ptr + row, mask=row < rows, other=0.0)[:, None]
        h = h * rstd
        g = tl.load(grad_y_ptr + row[:, None] * grad_y_stride_row + column[None, :], mask=mask, other=0.0)
        g = g.to(tl.float32)
        if weight_partial_ptr is not None:
            weight_sum += g * h
        if bias_partial_ptr is not None:
            bias_sum += g
        if weight_ptr is not None:
            g = g * weight

        gradient = g - h * (tl.sum(g * h, axis=1) / width)[:, None]
        if CENTRED:
            gradient = gradient - (tl.sum(g, axis=1) / width)[:, None]
        gradient = gradient * rstd
        if grad_s_ptr is not None:
            more = tl.load(grad_s_ptr + row[:, None] * grad_s_stride_row + column[None, :], mask=mask, other=0.0)
            gradient += more.to(tl.float32)
        tl.store(grad_sum_ptr + out, gradient.to(grad_sum_ptr.dtype.element_ty), mask=mask)
        if scale_ptr is not None:
            if scale_partial_ptr is not None:
                x = tl.load(x_ptr + row[:, None] * x_stride_row + column[None, :], mask=mask, other=0.0)
                scale_sum += gradient * x.to(tl.float32)
            gradient *= tl.load(scale_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            tl.store(grad_x_ptr + out, gradient.to(grad_x_ptr.dtype.element_ty), mask=mask)

    partial = block * partial_stride_block + column
    if weight_partial_ptr is not None:
        tl.store(weight_partial_ptr + partial, tl.sum(weight_sum, axis=0), mask=inside)
    if bias_partial_ptr is not None:
        tl.store(bias_partial_ptr + partial, tl.sum(bias_sum, axis=0), mask=inside)
    if scale_partial_ptr is not None:
        tl.store(scale_partial_ptr + partial, tl.sum(scale_sum, axis=0), mask=inside)


@triton.jit
def norm_sum_kernel(
    partials_ptr,
    grads_ptr,
    blocks,
    columns,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grads[c] = sum over b of partials[b, c], always in the same order."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    for start in range(0, blocks, BLOCK_B):
        block = start + tl.arange(0, BLOCK_B)
        mask = (block < blocks)[:, None] & (column < columns)[None, :]
        total += tl.load(partials_ptr + block[:, None].to(tl.int64) * columns + column[None, :], mask=mask, other=0.0)
    tl.store(grads_ptr + column, tl.sum(total, axis=0), mask=column < columns)


def norm_forward(
    x: torch.Tensor,
    x_stride: int,
    residual: torch.Tensor | None,
    residual_stride: int,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    rows: int,
    width: int,
    centred: bool,
    eps: float,
    s: torch.Tensor | None,
    y: torch.Tensor,
    stats: torch.Tensor | None,
) -> None:
    """Write y and, where they are given, s and stats, all contiguous; strides lead from row to row."""
    if rows == 0:
        return
    options = tile(width, FORWARD_TILE, FORWARD_WARP)
    norm_forward_kernel[(triton.cdiv(rows, options["BLOCK_M"]),)](
        x,
        residual,
        scale,
        weight,
        bias,
        s,
        y,
        stats,
        rows,
        width,
        x_stride,
        residual_stride,
        float(eps),
        CENTRED=centred,
        **options,
    )


def norm_backward(
    grad_y: torch.Tensor,
    grad_y_stride: int,
    grad_s: torch.Tensor | None,
    grad_s_stride: int,
    s: torch.Tensor,
    s_stride: int,
    x: torch.Tensor | None,
    x_stride: int,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    stats: torch.Tensor,
    rows: int,
    width: int,
    centred: bool,
    grad_sum: torch.Tensor,
    grad_x: torch.Tensor | None,
    wanted: list[bool],
    partials: torch.Tensor,
    grads: torch.Tensor,
) -> None:
    """Write grad_sum, grad_x (with a scale) and grads, whose rows are the wanted ones of weight, bias and scale.

    partials [blocks, len(grads), width] is scratch memory; its first size is the number of blocks of rows.
    """
    options = tile(width, BACKWARD_TILE, BACKWARD_WARP)
    if centred and scale is None and options["num_warps"] == 16:
        options["maxnreg"] = BACKWARD_REGISTERS
    blocks, parameters, _ = partials.shape
    slots = iter(partials.unbind(1))
    weight_partial, bias_partial, scale_partial = (next(slots) if want else None for want in wanted)
    norm_backward_kernel[(blocks,)](
        grad_y,
        grad_s,
        s,
        x,
        scale,
        weight,
        stats,
        grad_sum,
        grad_x,
        weight_partial,
        bias_partial,
        scale_partial,
        rows,
        width,
        grad_y_stride,
        grad_s_stride,
        s_stride,
        x_stride,
        parameters * width,
        triton.cdiv(triton.cdiv(rows, blocks), options["BLOCK_M"]),
        CENTRED=centred,
        num_stages=BACKWARD_STAGES,
        **options,
    )
    if parameters:
        norm_sum_kernel[(triton.cdiv(parameters * width, SUM_COLUMNS),)](
            partials,
            grads,
            blocks,
            parameters * width,
            BLOCK_B=SUM_BLOCKS,
            BLOCK_C=SUM_COLUMNS,
            num_warps=SUM_WARPS,
        )
