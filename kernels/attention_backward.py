"""Attention backward: gradients of the packed projection and of the norm's weights, without atomics.

    P = exp(scale Q' K'^T - lse),  dV = P^T dO,  dS = P * (dO V^T - delta),  delta = rowsum(dO * O)
    dQ' = scale dS K',  dK' = scale dS^T Q'

P is recomputed from lse, twice: one kernel walks the keys of a block of queries for dQ' (and leaves delta), one the
queries of a block of keys for dK' and dV. That is 7 matrix products instead of 5, and every sum has one fixed order:
the same bits from run to run. Rotation and norm are undone in place by attention_rotate.py.

grad, out  [B, L, H, D]     dtype of qkv; grad of any strides, copied if the last is not 1
lse        [B, H, L]        float32
dqkv       [B, L, 3, H, D]  contiguous, dtype of qkv
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vitok.kernels.attention_parts import (
    LOG2_E,
    Tiles,
    block_ranges,
    key_bounds,
    load_tile,
    mask_arguments,
    pieces,
    program_block,
    query_bounds,
    store_tile,
    tiles,
    unit,
)
from vitok.kernels.attention_rotate import rotate, rotate_backward

# By (generation, widest head_dim); chosen from compiled registers and shared memory, not measured yet: the largest
# blocks that do not spill, as two accumulators and two products are alive at once. 256 channels leave registers for 32
# rows only, too few for the wide matrix instruction of sm_90.
QUERY_TILES = {
    (80, 64): Tiles(128, 32, 8, 2),
    (80, 96): Tiles(128, 32, 8, 2),
    (80, 128): Tiles(64, 32, 4, 2),
    (80, 256): Tiles(32, 32, 4, 1),
    (90, 64): Tiles(128, 64, 8, 2, 128),
    (90, 96): Tiles(128, 64, 8, 2),
    (90, 128): Tiles(128, 64, 8, 2),
    (90, 256): Tiles(32, 32, 8, 1),
    (100, 64): Tiles(128, 64, 8, 2),
    (100, 96): Tiles(128, 64, 8, 2),
    (100, 128): Tiles(128, 64, 8, 2),
    (100, 256): Tiles(64, 32, 8, 1),
}
KEY_TILES = {
    (80, 64): Tiles(128, 32, 8, 2),
    (80, 96): Tiles(64, 32, 8, 2),
    (80, 128): Tiles(64, 32, 8, 2),
    (80, 256): Tiles(32, 32, 8, 1),
    (90, 64): Tiles(128, 64, 8, 2),
    (90, 96): Tiles(128, 64, 8, 2),
    (90, 128): Tiles(128, 64, 8, 2),
    (90, 256): Tiles(32, 32, 8, 1),
    (100, 64): Tiles(128, 64, 8, 2),
    (100, 96): Tiles(128, 64, 8, 2),
    (100, 128): Tiles(128, 64, 8, 2),
    (100, 256): Tiles(64, 32, 8, 1),
}


@triton.jit
def gather_queries(
    dq0, dq1, q0, q1, grad0, grad1, lse, delta, k_ptr, v_ptr, k_stride, v_stride, first, last, start, end, skip_at,
    skip, length, scale_log2,
    HEAD_DIM: tl.constexpr, PIECE0: tl.constexpr, PIECE1: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """dQ' += dS K' over the key blocks of [start, end), those from `skip_at` on moved by `skip`."""
    for block in range(start, end, BLOCK_N):
        at = block
        if MASK:
            at = tl.where(block < skip_at, block, block + skip)
        keys = at + tl.arange(0, BLOCK_N)
        k0 = load_tile(k_ptr, keys, length, k_stride, 0, PIECE0, HEAD_DIM, MASK)
        v0 = load_tile(v_ptr, keys, length, v_stride, 0, PIECE0, HEAD_DIM, MASK)
        scores = tl.dot(q0, tl.trans(k0), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        dp = tl.dot(grad0, tl.trans(v0), input_precision="ieee")
        if PIECE1:
            k1 = load_tile(k_ptr, keys, length, k_stride, PIECE0, PIECE1, HEAD_DIM, MASK)
            v1 = load_tile(v_ptr, keys, length, v_stride, PIECE0, PIECE1, HEAD_DIM, MASK)
            scores = tl.dot(q1, tl.trans(k1), scores, input_precision="ieee")
            dp = tl.dot(grad1, tl.trans(v1), dp, input_precision="ieee")
        p = tl.exp2(scores * scale_log2 - lse[:, None])
        if MASK:
            p = tl.where((keys[None, :] >= first[:, None]) & (keys[None, :] < last[:, None]), p, 0.0)
        ds = (p * (dp - delta[:, None])).to(k_ptr.dtype.element_ty)
        dq0 = tl.dot(ds, k0, dq0, input_precision="ieee")
        if PIECE1:
            dq1 = tl.dot(ds, k1, dq1, input_precision="ieee")
    return dq0, dq1


@triton.jit
def gather_keys(
    dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_ptr, grad_ptr, lse_ptr, delta_ptr, q_stride, grad_stride, first, last, start,
    end, skip_at, skip, length, scale_log2,
    HEAD_DIM: tl.constexpr, PIECE0: tl.constexpr, PIECE1: tl.constexpr, BLOCK_M: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """dV += P^T dO, dK' += dS^T Q' over the query blocks of [start, end), those from `skip_at` on moved by `skip`."""
    for block in range(start, end, BLOCK_M):
        at = block
        if MASK:
            at = tl.where(block < skip_at, block, block + skip)
        rows = at + tl.arange(0, BLOCK_M)
        q0 = load_tile(q_ptr, rows, length, q_stride, 0, PIECE0, HEAD_DIM, MASK)
        grad0 = load_tile(grad_ptr, rows, length, grad_stride, 0, PIECE0, HEAD_DIM, MASK)
        scores = tl.dot(k0, tl.trans(q0), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        dp = tl.dot(v0, tl.trans(grad0), input_precision="ieee")
        if PIECE1:
            q1 = load_tile(q_ptr, rows, length, q_stride, PIECE0, PIECE1, HEAD_DIM, MASK)
            grad1 = load_tile(grad_ptr, rows, length, grad_stride, PIECE0, PIECE1, HEAD_DIM, MASK)
            scores = tl.dot(k1, tl.trans(q1), scores, input_precision="ieee")
            dp = tl.dot(v1, tl.trans(grad1), dp, input_precision="ieee")
        if MASK:
            lse = tl.load(lse_ptr + rows, mask=rows < length, other=0.0) * LOG2_E
            delta = tl.load(delta_ptr + rows, mask=rows < length, other=0.0)
        else:
            lse = tl.load(lse_ptr + rows) * LOG2_E
            delta = tl.load(delta_ptr + rows)
        p = tl.exp2(scores * scale_log2 - lse[None, :])
        if MASK:
            p = tl.where((rows[None, :] >= first[:, None]) & (rows[None, :] < last[:, None]), p, 0.0)
        narrow = p.to(grad_ptr.dtype.element_ty)
        dv0 = tl.dot(narrow, grad0, dv0, input_precision="ieee")
        ds = (p * (dp - delta[None, :])).to(q_ptr.dtype.element_ty)
        dk0 = tl.dot(ds, q0, dk0, input_precision="ieee")
        if PIECE1:
            dv1 = tl.dot(narrow, grad1, dv1, input_precision="ieee")
            dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")
    return dk0, dk1, dv0, dv1


@triton.jit
def attention_backward_query_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    dqkv_ptr,
    cu_seqlens_ptr,
    length,
    heads,
    blocks,
    q_stride_b,
    q_stride_l,
    q_stride_h,
    k_stride_b,
    k_stride_l,
    k_stride_h,
    v_stride_b,
    v_stride_l,
    v_stride_h,
    grad_stride_b,
    grad_stride_l,
    grad_stride_h,
    segments,
    window,
    causal_block,
    scale_log2,
    scale,
    STEPS: tl.constexpr,
    MASKED: tl.constexpr,
    BORDER: tl.constexpr,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PIECE0: tl.constexpr,
    PIECE1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dQ' and delta of one block of queries of one head."""
    batch, head, block = program_block(heads, blocks, MASKED)  # the last queries of a causal mask have the most keys
    q_ptr += (batch * q_stride_b + head * q_stride_h) * UNIT
    k_ptr += (batch * k_stride_b + head * k_stride_h) * UNIT
    v_ptr += (batch * v_stride_b + head * v_stride_h) * UNIT
    grad_ptr += (batch * grad_stride_b + head * grad_stride_h) * UNIT
    out_ptr += (batch * length * heads + head) * HEAD_DIM
    dqkv_ptr += (batch * length * heads * 3 + head) * HEAD_DIM
    lse_ptr += (batch * heads + head) * length
    delta_ptr += (batch * heads + head) * length

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q0 = load_tile(q_ptr, rows, length, q_stride_l * UNIT, 0, PIECE0, HEAD_DIM, True)
    grad0 = load_tile(grad_ptr, rows, length, grad_stride_l * UNIT, 0, PIECE0, HEAD_DIM, True)
    out0 = load_tile(out_ptr, rows, length, heads * HEAD_DIM, 0, PIECE0, HEAD_DIM, True)
    delta = tl.sum(grad0.to(tl.float32) * out0.to(tl.float32), 1)
    dq0 = tl.zeros((BLOCK_M, PIECE0), tl.float32)
    q1, grad1, dq1 = q0, grad0, dq0
    if PIECE1:
        q1 = load_tile(q_ptr, rows, length, q_stride_l * UNIT, PIECE0, PIECE1, HEAD_DIM, True)
        grad1 = load_tile(grad_ptr, rows, length, grad_stride_l * UNIT, PIECE0, PIECE1, HEAD_DIM, True)
        out1 = load_tile(out_ptr, rows, length, heads * HEAD_DIM, PIECE0, PIECE1, HEAD_DIM, True)
        delta += tl.sum(grad1.to(tl.float32) * out1.to(tl.float32), 1)
        dq1 = tl.zeros((BLOCK_M, PIECE1), tl.float32)
    tl.store(delta_ptr + rows, delta, mask=rows < length)
    lse = tl.load(lse_ptr + rows, mask=rows < length, other=0.0) * LOG2_E

    first = rows * 0
    last = first + length
    start, whole, whole_end, end = 0, 0, length // BLOCK_N * BLOCK_N, length
    if MASKED:
        at = tl.minimum(rows, length - 1)
        first, last = key_bounds(at, cu_seqlens_ptr, length, segments, window, causal_block, STEPS)
        start, whole, whole_end, end = block_ranges(first, last, BLOCK_N)
    dq0, dq1 = gather_queries(
        dq0, dq1, q0, q1, grad0, grad1, lse, delta, k_ptr, v_ptr, k_stride_l * UNIT, v_stride_l * UNIT, first, last,
        whole, whole_end, 0, 0, length, scale_log2, HEAD_DIM, PIECE0, PIECE1, BLOCK_N, False,
    )  # fmt: skip
    if BORDER:
        dq0, dq1 = gather_queries(
            dq0, dq1, q0, q1, grad0, grad1, lse, delta, k_ptr, v_ptr, k_stride_l * UNIT, v_stride_l * UNIT, first,
            last, start, end - (whole_end - whole), whole, whole_end - whole, length, scale_log2, HEAD_DIM, PIECE0,
            PIECE1, BLOCK_N, True,
        )  # fmt: skip
    store_tile(dqkv_ptr, dq0 * scale, rows, length, 3 * heads * HEAD_DIM, 0, PIECE0, HEAD_DIM)
    if PIECE1:
        store_tile(dqkv_ptr, dq1 * scale, rows, length, 3 * heads * HEAD_DIM, PIECE0, PIECE1, HEAD_DIM)


@triton.jit
def attention_backward_key_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    dqkv_ptr,
    cu_seqlens_ptr,
    length,
    heads,
    blocks,
    q_stride_b,
    q_stride_l,
    q_stride_h,
    k_stride_b,
    k_stride_l,
    k_stride_h,
    v_stride_b,
    v_stride_l,
    v_stride_h,
    grad_stride_b,
    grad_stride_l,
    grad_stride_h,
    segments,
    window,
    causal_block,
    scale_log2,
    scale,
    STEPS: tl.constexpr,
    MASKED: tl.constexpr,
    BORDER: tl.constexpr,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PIECE0: tl.constexpr,
    PIECE1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dK' and dV of one block of keys of one head; needs the delta of every query."""
    batch, head, block = program_block(heads, blocks, False)  # the first keys of a causal mask have the most queries
    q_ptr += (batch * q_stride_b + head * q_stride_h) * UNIT
    k_ptr += (batch * k_stride_b + head * k_stride_h) * UNIT
    v_ptr += (batch * v_stride_b + head * v_stride_h) * UNIT
    grad_ptr += (batch * grad_stride_b + head * grad_stride_h) * UNIT
    dqkv_ptr += (batch * length * heads * 3 + head) * HEAD_DIM
    lse_ptr += (batch * heads + head) * length
    delta_ptr += (batch * heads + head) * length

    keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k0 = load_tile(k_ptr, keys, length, k_stride_l * UNIT, 0, PIECE0, HEAD_DIM, True)
    v0 = load_tile(v_ptr, keys, length, v_stride_l * UNIT, 0, PIECE0, HEAD_DIM, True)
    dk0 = tl.zeros((BLOCK_N, PIECE0), tl.float32)
    dv0 = tl.zeros((BLOCK_N, PIECE0), tl.float32)
    k1, v1, dk1, dv1 = k0, v0, dk0, dv0
    if PIECE1:
        k1 = load_tile(k_ptr, keys, length, k_stride_l * UNIT, PIECE0, PIECE1, HEAD_DIM, True)
        v1 = load_tile(v_ptr, keys, length, v_stride_l * UNIT, PIECE0, PIECE1, HEAD_DIM, True)
        dk1 = tl.zeros((BLOCK_N, PIECE1), tl.float32)
        dv1 = tl.zeros((BLOCK_N, PIECE1), tl.float32)

    first = keys * 0
    last = first + length
    start, whole, whole_end, end = 0, 0, length // BLOCK_M * BLOCK_M, length
    if MASKED:
        at = tl.minimum(keys, length - 1)
        first, last = query_bounds(at, cu_seqlens_ptr, length, segments, window, causal_block, STEPS)
        start, whole, whole_end, end = block_ranges(first, last, BLOCK_M)
    dk0, dk1, dv0, dv1 = gather_keys(
        dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_ptr, grad_ptr, lse_ptr, delta_ptr, q_stride_l * UNIT,
        grad_stride_l * UNIT, first, last, whole, whole_end, 0, 0, length, scale_log2, HEAD_DIM, PIECE0, PIECE1,
        BLOCK_M, False,
    )  # fmt: skip
    if BORDER:
        dk0, dk1, dv0, dv1 = gather_keys(
            dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_ptr, grad_ptr, lse_ptr, delta_ptr, q_stride_l * UNIT,
            grad_stride_l * UNIT, first, last, start, end - (whole_end - whole), whole, whole_end - whole, length,
            scale_log2, HEAD_DIM, PIECE0, PIECE1, BLOCK_M, True,
        )  # fmt: skip
    dqkv_ptr += heads * HEAD_DIM
    store_tile(dqkv_ptr, dk0 * scale, keys, length, 3 * heads * HEAD_DIM, 0, PIECE0, HEAD_DIM)
    store_tile(dqkv_ptr + heads * HEAD_DIM, dv0, keys, length, 3 * heads * HEAD_DIM, 0, PIECE0, HEAD_DIM)
    if PIECE1:
        store_tile(dqkv_ptr, dk1 * scale, keys, length, 3 * heads * HEAD_DIM, PIECE0, PIECE1, HEAD_DIM)
        store_tile(dqkv_ptr + heads * HEAD_DIM, dv1, keys, length, 3 * heads * HEAD_DIM, PIECE0, PIECE1, HEAD_DIM)


def backward(
    grad: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    table: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    eps: float,
    window: int,
    causal_block: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch; returns dqkv and the gradients of both weights in their dtypes ([0] where there are none)."""
    batch, length, _, heads, head_dim = qkv.shape
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if qkv.numel() == 0:
        return dqkv, *(qkv.new_empty((0,)) if w is None else torch.zeros_like(w) for w in (q_weight, k_weight))
    q, k, v = qkv.unbind(2)
    changed = q_weight is not None or table is not None
    if changed:
        q, k = rotate(qkv, q_weight, k_weight, table, eps).transpose(2, 3)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    delta = torch.empty_like(lse)
    piece0, piece1 = pieces(head_dim)
    stride_unit = unit(q, k, v, grad)
    masked = window >= 0 or causal_block > 0 or cu_seqlens is not None
    shared = {
        **mask_arguments(cu_seqlens, window, causal_block),
        "scale_log2": LOG2_E.value * head_dim**-0.5,
        "scale": head_dim**-0.5,
        "MASKED": masked,
        "UNIT": stride_unit,
        "HEAD_DIM": head_dim,
        "PIECE0": piece0,
        "PIECE1": piece1,
    }
    strides = [stride // stride_unit for x in (q, k, v, grad) for stride in x.stride()[:3]]
    ends = None if cu_seqlens is None else cu_seqlens.contiguous()
    choice = tiles(QUERY_TILES, qkv)
    blocks = triton.cdiv(length, choice.resident)
    border = masked or length % choice.streamed > 0
    attention_backward_query_kernel[(batch * heads * blocks,)](
        q,
        k,
        v,
        out,
        grad,
        lse,
        delta,
        dqkv,
        ends,
        length,
        heads,
        blocks,
        *strides,
        **shared,
        BORDER=border,
        BLOCK_M=choice.resident,
        BLOCK_N=choice.streamed,
        **choice.options(border),
    )
    choice = tiles(KEY_TILES, qkv)
    blocks = triton.cdiv(length, choice.resident)
    border = masked or length % choice.streamed > 0
    attention_backward_key_kernel[(batch * heads * blocks,)](
        q,
        k,
        v,
        grad,
        lse,
        delta,
        dqkv,
        ends,
        length,
        heads,
        blocks,
        *strides,
        **shared,
        BORDER=border,
        BLOCK_M=choice.streamed,
        BLOCK_N=choice.resident,
        **choice.options(border),
    )
    if changed:
        return dqkv, *rotate_backward(dqkv, qkv, q_weight, k_weight, table, eps)
    return dqkv, qkv.new_empty((0,)), qkv.new_empty((0,))
