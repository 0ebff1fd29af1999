"""Pixel loss: the mean distance of a prediction in patch layout from a clip, sample by sample.

    d       = prediction[b, (lt, ly, lx), (i, j, k, ch)] - (target[b, lt*q + i, ly*p + j, lx*p + k, ch] * scale + shift)
    loss[b] = mean of f(d) over the clip's elements, f = |d| (l1), d^2 (l2) or sqrt(d^2 + eps^2) (charbonnier)

Fused: cast and normalisation of the target, the permutation between the layouts, cropping, distance and mean. For a
uint8 target and a bf16 prediction that is 3 bytes an element forward and 5 backward; the eager composition moves 19
for the two float clips and their difference alone.

prediction  [B, ceil(T/q) * ceil(H/p) * ceil(W/p), q*p*p*3]  float16, bfloat16 or float32, any strides but the last
target      [B, T, H, W, 3]  uint8, float16, bfloat16 or float32, any non-negative strides
loss        [B]              float32
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# 1024 elements over 4 warps are 8 a thread: one 16-byte load of a 16-bit prediction. Not measured yet.
BLOCK = 1024
NUM_WARPS = 4
KINDS = {"l1": 0, "l2": 1, "charbonnier": 2}


@triton.jit
def _difference(
    prediction_ptr,
    target_ptr,
    frames,
    height,
    width,
    rows_t,
    rows_y,
    row_elements,
    prediction_stride_b,
    prediction_stride_l,
    target_stride_b,
    target_stride_t,
    target_stride_y,
    target_stride_x,
    target_stride_c,
    scale,
    shift,
    Q: tl.constexpr,
    P: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """d for one block of elements of one token row (b, lt, ly), and which of them are the clip's.

    WHOLE_ROWS promises interleaved rows without padding in x and tokens without gaps: a patch row is then 3P
    neighbouring elements of the target and a block of the prediction: the compiler can use wide loads.
    """
    token_row = tl.program_id(0)
    ly = token_row % rows_y
    lt = token_row // rows_y % rows_t
    b = (token_row // rows_y // rows_t).to(tl.int64)

    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] (lx, i, j, k, ch) flattened
    within = e % (3 * P)  # (k, ch)
    y = ly * P + e // (3 * P) % P
    t = lt * Q + e // (3 * P * P) % Q
    lx = e // (3 * P * P * Q)
    x = lx * P + within // 3
    real = e < row_elements
    # What lies beyond the clip is read at its edge and dropped later: a mask of many parts would split the loads.
    inside = real & (t < frames) & (y < height) & (x < width)
    t = tl.minimum(t, frames - 1)
    y = tl.minimum(y, height - 1)

    tokens = row_elements // (3 * P * P * Q)
    first = (token_row % (rows_t * rows_y)).to(tl.int64) * tokens
    target_offset = b * target_stride_b + t.to(tl.int64) * target_stride_t + y.to(tl.int64) * target_stride_y
    if WHOLE_ROWS:
        prediction_offset = b * prediction_stride_b + first * prediction_stride_l + e
        target_offset += lx.to(tl.int64) * (3 * P) + within
    else:
        of_token = e - lx * (3 * P * P * Q)
        prediction_offset = b * prediction_stride_b + (first + lx) * prediction_stride_l + of_token
        target_offset += (
            tl.minimum(x, width - 1).to(tl.int64) * target_stride_x + (within % 3).to(tl.int64) * target_stride_c
        )
    prediction = tl.load(prediction_ptr + prediction_offset, mask=real, other=0.0).to(tl.float32)
    target = tl.load(target_ptr + target_offset, mask=real, other=0).to(tl.float32)
    return prediction - (target * scale + shift), inside, e


@triton.jit
def pixel_loss_forward_kernel(
    prediction_ptr,
    target_ptr,
    partial_ptr,
    frames,
    height,
    width,
    rows_t,
    rows_y,
    row_elements,
    prediction_stride_b,
    prediction_stride_l,
    target_stride_b,
    target_stride_t,
    target_stride_y,
    target_stride_x,
    target_stride_c,
    scale,
    shift,
    eps_squared,
    Q: tl.constexpr,
    P: tl.constexpr,
    KIND: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partial[token_row, block] = sum of f(d) over one block of elements of one token row."""
    d, inside, _ = _difference(
        prediction_ptr, target_ptr, frames, height, width, rows_t, rows_y, row_elements, prediction_stride_b,
        prediction_stride_l, target_stride_b, target_stride_t, target_stride_y, target_stride_x, target_stride_c,
        scale, shift, Q, P, WHOLE_ROWS, BLOCK,
    )  # fmt: skip
    if KIND == 0:
        distance = tl.abs(d)
    elif KIND == 1:
        distance = d * d
    else:
        distance = tl.sqrt(d * d + eps_squared)
    total = tl.sum(tl.where(inside, distance, 0.0))
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1), total)


@triton.jit
def pixel_loss_sum_kernel(partial_ptr, loss_ptr, count, weight, BLOCK: tl.constexpr):
    """loss[b] = weight * sum of partial[b, :count], in an order that is always the same."""
    b = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)  # [BLOCK]
        total += tl.load(partial_ptr + b.to(tl.int64) * count + at, mask=at < count, other=0.0)
    tl.store(loss_ptr + b, tl.sum(total) * weight)


@triton.jit
def pixel_loss_backward_kernel(
    grad_ptr,
    prediction_ptr,
    target_ptr,
    grad_prediction_ptr,
    frames,
    height,
    width,
    rows_t,
    rows_y,
    row_elements,
    grad_stride,
    prediction_stride_b,
    prediction_stride_l,
    target_stride_b,
    target_stride_t,
    target_stride_y,
    target_stride_x,
    target_stride_c,
    scale,
    shift,
    eps_squared,
    weight,
    Q: tl.constexpr,
    P: tl.constexpr,
    KIND: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad_prediction = grad[b] * weight * f'(d), 0 beyond the clip; f' is sign(d), 2 d or d / sqrt(d^2 + eps^2)."""
    d, inside, e = _difference(
        prediction_ptr, target_ptr, frames, height, width, rows_t, rows_y, row_elements, prediction_stride_b,
        prediction_stride_l, target_stride_b, target_stride_t, target_stride_y, target_stride_x, target_stride_c,
        scale, shift, Q, P, WHOLE_ROWS, BLOCK,
    )  # fmt: skip
    token_row = tl.program_id(0)
    grad = tl.load(grad_ptr + (token_row // rows_y // rows_t).to(tl.int64) * grad_stride) * weight
    if KIND == 0:
        value = tl.where(d > 0, grad, tl.where(d < 0, -grad, 0.0))
    elif KIND == 1:
        value = (d + d) * grad
    else:
        value = d / tl.sqrt(d * d + eps_squared) * grad
    value = tl.where(inside, value, 0.0).to(grad_prediction_ptr.dtype.element_ty)
    tl.store(grad_prediction_ptr + token_row.to(tl.int64) * row_elements + e, value, mask=e < row_elements)


def _geometry(prediction: torch.Tensor, target: torch.Tensor, q: int, p: int) -> tuple[int, int, int, bool]:
    """Token rows in time and height, elements of a token row, and what WHOLE_ROWS may promise."""
    _, frames, height, width, _ = target.shape
    row_elements = triton.cdiv(width, p) * q * p * p * 3
    neighbouring = target.stride(3) == 3 and target.stride(4) == 1 and prediction.stride(1) == q * p * p * 3
    return triton.cdiv(frames, q), triton.cdiv(height, p), row_elements, neighbouring and width % p == 0


def pixel_loss_forward(
    prediction: torch.Tensor,
    target: torch.Tensor,
    loss: torch.Tensor,
    q: int,
    p: int,
    kind: str,
    eps: float,
    scale: float,
    shift: float,
) -> None:
    """Fill loss [B] from a prediction whose elements neighbour within a token and a target of any strides."""
    batch, frames, height, width, _ = target.shape
    rows_t, rows_y, row_elements, whole_rows = _geometry(prediction, target, q, p)
    blocks = triton.cdiv(row_elements, BLOCK)
    partial = torch.empty(batch, rows_t * rows_y * blocks, dtype=torch.float32, device=prediction.device)
    pixel_loss_forward_kernel[(batch * rows_t * rows_y, blocks)](
        prediction,
        target,
        partial,
        frames,
        height,
        width,
        rows_t,
        rows_y,
        row_elements,
        prediction.stride(0),
        prediction.stride(1),
        target.stride(0),
        target.stride(1),
        target.stride(2),
        target.stride(3),
        target.stride(4),
        float(scale),
        float(shift),
        float(eps * eps),
        Q=q,
        P=p,
        KIND=KINDS[kind],
        WHOLE_ROWS=whole_rows,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    pixel_loss_sum_kernel[(batch,)](
        partial,
        loss,
        partial.shape[1],
        1.0 / (3.0 * frames * height * width),
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )


def pixel_loss_backward(
    grad: torch.Tensor,
    prediction: torch.Tensor,
    target: torch.Tensor,
    grad_prediction: torch.Tensor,
    q: int,
    p: int,
    kind: str,
    eps: float,
    scale: float,
    shift: float,
) -> None:
    """Fill grad_prediction, contiguous and of the prediction's shape, from grad [B] of any stride."""
    batch, frames, height, width, _ = target.shape
    rows_t, rows_y, row_elements, whole_rows = _geometry(prediction, target, q, p)
    pixel_loss_backward_kernel[(batch * rows_t * rows_y, triton.cdiv(row_elements, BLOCK))](
        grad,
        prediction,
        target,
        grad_prediction,
        frames,
        height,
        width,
        rows_t,
        rows_y,
        row_elements,
        grad.stride(0),
        prediction.stride(0),
        prediction.stride(1),
        target.stride(0),
        target.stride(1),
        target.stride(2),
        target.stride(3),
        target.stride(4),
        float(scale),
        float(shift),
        float(eps * eps),
        1.0 / (3.0 * frames * height * width),
        Q=q,
        P=p,
        KIND=KINDS[kind],
        WHOLE_ROWS=whole_rows,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
