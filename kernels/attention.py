"""Attention forward: out = softmax(scale Q' K'^T) V over the packed projection, Q' and K' normalised and rotated.

Fused: scores, mask, softmax and the product with V, so that the L x L matrix never exists; masks are intervals of keys
that skip whole blocks. Norm and rotation are a pre-pass (attention_rotate.py) that writes q and k once, 8 bytes a
channel of a 16-bit type beside the 8 that attention moves, where the eager composition moves some 60. They are not in
the prologue, although that saves q's half: an operand that is computed rather than loaded becomes a register operand
of the matrix instruction on sm_90, read again for every block of keys, and ptxas then waits for every single HGMMA (8
waits for 8 instead of 2, compiled both ways). Keys in the prologue would be rotated again by each block of queries.

qkv       [B, L, 3, H, D]   16-bit or float32, unit stride in D, any other strides; D a multiple of 8 up to 256
q_weight  [D], k_weight [D] any float, or None
table     [2, L, D / 2]     cosines and sines, or None
out       [B, L, H, D]      contiguous, dtype of qkv
lse       [B, H, L]         float32, natural logarithm of each row's sum of exponentials
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
    store_tile,
    tiles,
    unit,
)
from vitok.kernels.attention_rotate import rotate

# By (generation, widest head_dim); chosen from compiled registers and shared memory, not measured yet. 128 queries,
# because with 64 each key block would be fetched from L2 twice as often, more than L2 gives at full rate. Up to 96
# channels on sm_90, 64 keys and a cap of 128 registers leave room for two blocks a multiprocessor, so that one's
# softmax runs beside the other's products; the cap costs no spill where it is set. At 128 channels only one fits, and
# 128 keys a step make the most of it. Everywhere 8 warps: with 4 the masked kernels spill.
TILES = {
    (80, 64): Tiles(128, 64, 8, 3),
    (80, 96): Tiles(128, 64, 8, 2),
    (80, 128): Tiles(128, 64, 8, 2),
    (80, 256): Tiles(64, 32, 8, 2),
    (90, 64): Tiles(128, 64, 8, 3, 128, 128),
    (90, 96): Tiles(128, 64, 8, 3, 128),
    (90, 128): Tiles(128, 128, 8, 2),
    (90, 256): Tiles(128, 64, 8, 2),
    (100, 64): Tiles(128, 64, 8, 3),
    (100, 96): Tiles(128, 64, 8, 3),
    (100, 128): Tiles(128, 64, 8, 2),
    (100, 256): Tiles(128, 32, 8, 2),
}


@triton.jit
def attend(
    acc0, acc1, row_max, row_sum, q0, q1, k_ptr, v_ptr, k_stride, v_stride, first, last, start, end, skip_at, skip,
    length, scale_log2,
    HEAD_DIM: tl.constexpr, PIECE0: tl.constexpr, PIECE1: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key blocks of [start, end), those from `skip_at` on moved by `skip`.

    m' = max(m, max s),  l' = l 2^(m - m') + sum 2^(s - m'),  acc' = acc 2^(m - m') + 2^(s - m') V,  s in units of log 2
    """
    for block in range(start, end, BLOCK_N):
        at = block
        if MASK:
            at = tl.where(block < skip_at, block, block + skip)
        keys = at + tl.arange(0, BLOCK_N)
        k0 = load_tile(k_ptr, keys, length, k_stride, 0, PIECE0, HEAD_DIM, MASK)
        scores = tl.dot(q0, tl.trans(k0), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if PIECE1:
            k1 = load_tile(k_ptr, keys, length, k_stride, PIECE0, PIECE1, HEAD_DIM, MASK)
            scores = tl.dot(q1, tl.trans(k1), scores, input_precision="ieee")
        if MASK:
            visible = (keys[None, :] >= first[:, None]) & (keys[None, :] < last[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        p = tl.exp2(scores * scale_log2 - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_max = new_max
        row_sum = row_sum * shrink + tl.sum(p, 1)
        p = p.to(v_ptr.dtype.element_ty)
        v0 = load_tile(v_ptr, keys, length, v_stride, 0, PIECE0, HEAD_DIM, MASK)
        acc0 = tl.dot(p, v0, acc0 * shrink[:, None], input_precision="ieee")
        if PIECE1:
            v1 = load_tile(v_ptr, keys, length, v_stride, PIECE0, PIECE1, HEAD_DIM, MASK)
            acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision="ieee")
    return acc0, acc1, row_max, row_sum


@triton.jit
def attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
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
    segments,
    window,
    causal_block,
    scale_log2,
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
    """One block of queries of one head: blocks of keys that every query sees whole, then those cut by a mask."""
    batch, head, block = program_block(heads, blocks, MASKED)  # the last queries of a causal mask have the most keys
    q_ptr += (batch * q_stride_b + head * q_stride_h) * UNIT
    k_ptr += (batch * k_stride_b + head * k_stride_h) * UNIT
    v_ptr += (batch * v_stride_b + head * v_stride_h) * UNIT

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q0 = load_tile(q_ptr, rows, length, q_stride_l * UNIT, 0, PIECE0, HEAD_DIM, True)
    q1 = q0
    if PIECE1:
        q1 = load_tile(q_ptr, rows, length, q_stride_l * UNIT, PIECE0, PIECE1, HEAD_DIM, True)

    # Finite, so that rows of a block without a visible key stay 0 and become no NaN.
    row_max = tl.full((BLOCK_M,), -3.0e38, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc0 = tl.zeros((BLOCK_M, PIECE0), tl.float32)
    acc1 = row_sum
    if PIECE1:
        acc1 = tl.zeros((BLOCK_M, PIECE1), tl.float32)
    first = rows * 0
    last = first + length
    start, whole, whole_end, end = 0, 0, length // BLOCK_N * BLOCK_N, length
    if MASKED:
        at = tl.minimum(rows, length - 1)
        first, last = key_bounds(at, cu_seqlens_ptr, length, segments, window, causal_block, STEPS)
        start, whole, whole_end, end = block_ranges(first, last, BLOCK_N)
    acc0, acc1, row_max, row_sum = attend(
        acc0, acc1, row_max, row_sum, q0, q1, k_ptr, v_ptr, k_stride_l * UNIT, v_stride_l * UNIT, first, last,
        whole, whole_end, 0, 0, length, scale_log2, HEAD_DIM, PIECE0, PIECE1, BLOCK_N, False,
    )  # fmt: skip
    if BORDER:
        acc0, acc1, row_max, row_sum = attend(
            acc0, acc1, row_max, row_sum, q0, q1, k_ptr, v_ptr, k_stride_l * UNIT, v_stride_l * UNIT, first, last,
            start, end - (whole_end - whole), whole, whole_end - whole, length, scale_log2, HEAD_DIM, PIECE0, PIECE1,
            BLOCK_N, True,
        )  # fmt: skip

    out_ptr += (batch * length * heads + head) * HEAD_DIM
    store_tile(out_ptr, acc0 / row_sum[:, None], rows, length, heads * HEAD_DIM, 0, PIECE0, HEAD_DIM)
    if PIECE1:
        store_tile(out_ptr, acc1 / row_sum[:, None], rows, length, heads * HEAD_DIM, PIECE0, PIECE1, HEAD_DIM)
    lse = (row_max + tl.log2(row_sum)) * 0.6931471805599453
    tl.store(lse_ptr + (batch * heads + head) * length + rows, lse, mask=rows < length)


def forward(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    table: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    eps: float,
    window: int,
    causal_block: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch on qkv of any strides with a unit last one; returns out [B, L, H, D] and lse [B, H, L]."""
    batch, length, _, heads, head_dim = qkv.shape
    out = torch.empty((batch, length, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=qkv.device)
    if out.numel() == 0:
        return out, lse
    q, k, v = qkv.unbind(2)
    if q_weight is not None or table is not None:
        q, k = rotate(qkv, q_weight, k_weight, table, eps).transpose(2, 3)
    choice = tiles(TILES, qkv)
    piece0, piece1 = pieces(head_dim)
    stride_unit = unit(q, k, v)
    blocks = triton.cdiv(length, choice.resident)
    masked = window >= 0 or causal_block > 0 or cu_seqlens is not None
    border = masked or length % choice.streamed > 0
    attention_forward_kernel[(batch * heads * blocks,)](
        q,
        k,
        v,
        out,
        lse,
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        length,
        heads,
        blocks,
        *(stride // stride_unit for x in (q, k, v) for stride in x.stride()[:3]),
        **mask_arguments(cu_seqlens, window, causal_block),
        scale_log2=LOG2_E.value * head_dim**-0.5,
        MASKED=masked,
        BORDER=border,
        UNIT=stride_unit,
        HEAD_DIM=head_dim,
        PIECE0=piece0,
        PIECE1=piece1,
        BLOCK_M=choice.resident,
        BLOCK_N=choice.streamed,
        **choice.options(border),
    )
    return out, lse
