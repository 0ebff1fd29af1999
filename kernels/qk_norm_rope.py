"""QK norm and RoPE on the packed projection: every head's row x of q and of k, its D channels as two halves,

    n = x / sqrt(mean(x^2) + eps) * weight
    out[i] = n[i] cos[i] - n[i + D/2] sin[i],    out[i + D/2] = n[i + D/2] cos[i] + n[i] sin[i]

and v copied, in one pass. Fused: the split of the packed tensor, the norm, the casts, the rotation and the
concatenation; an element is read once and written once (4 bytes in bf16), where the eager composition passes over q and
k about ten times.

qkv, out  [B, L, 3, H, D]  float16, bfloat16 or float32; qkv by strides with neighbouring channels, out contiguous
weights   [D]              any of these dtypes, or None: no norm
table     [2, L, D/2]      float32 cosines and sines, or None: no rotation
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vitok.kernels.qk_norm_rope_parts import (
    alignment,
    copy_halves,
    head_rstd,
    load_angles,
    load_halves,
    load_weights,
    locate,
    locate_angles,
    locate_packed,
    segments,
    square_sum,
    store_halves,
    turn,
)

# Elements of one half in a tile: 16 a thread, two 16-byte loads of a 16-bit type. Not measured yet.
FORWARD_TILE = 2048
NUM_WARPS = 4


@triton.jit
def _squares(qkv_ptr, source, inside, START: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr):
    first, second = load_halves(qkv_ptr, source, inside, START, BLOCK, D)
    return square_sum(first.to(tl.float32), second.to(tl.float32))


@triton.jit
def _forward(
    qkv_ptr, q_weight_ptr, k_weight_ptr, table_ptr, out_ptr, source, angles, target, inside, part, stride_part, rstd,
    NORM: tl.constexpr, ROTATE: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    first, second = load_halves(qkv_ptr, source, inside, START, BLOCK, D)
    first, second = first.to(tl.float32), second.to(tl.float32)
    if NORM:
        weight, weight_second = load_weights(q_weight_ptr, k_weight_ptr, part, START, BLOCK, D)
        first, second = first * rstd[:, None] * weight, second * rstd[:, None] * weight_second
    if ROTATE:
        cos, sin = load_angles(table_ptr, angles, stride_part, inside, START, BLOCK, D)
        first, second = turn(first, second, cos, sin)
    store_halves(out_ptr, target, inside, first, second, START, BLOCK, D)


@triton.jit
def qk_norm_rope_forward_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    table_ptr,
    out_ptr,
    rows,
    length,
    heads,
    qkv_stride_b,
    qkv_stride_l,
    qkv_stride_part,
    qkv_stride_head,
    table_stride_part,
    table_stride_l,
    eps,
    D: tl.constexpr,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
    TABLE_ALIGN: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_R rows of one part: n = x rstd weight, its pairs turned; v is copied.

    Channels are taken in two segments, MAIN and REST; the compiler merges the two loads of a segment.
    WIDE: row numbers need 64 bits; otherwise the divisions are of 32 bits.
    """
    SEGMENTS: tl.constexpr = 2 if REST else 1
    part = tl.program_id(1)
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    row = program * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    source = locate(row, rows, length, heads, qkv_stride_b, qkv_stride_l, qkv_stride_part, qkv_stride_head, part, ALIGN)
    target = locate_packed(row, rows, heads, part, D)
    if part == 2:
        for seg in tl.static_range(SEGMENTS):
            copy_halves(qkv_ptr, out_ptr, source, target, inside, seg * MAIN, REST if seg else MAIN, D)
    else:
        angles = locate_angles(row, rows, length, heads, table_stride_l, TABLE_ALIGN)
        rstd = tl.zeros((BLOCK_R,), tl.float32)
        if NORM:
            for seg in tl.static_range(SEGMENTS):
                rstd += _squares(qkv_ptr, source, inside, seg * MAIN, REST if seg else MAIN, D)
            rstd = head_rstd(rstd, D, eps)
        for seg in tl.static_range(SEGMENTS):
            _forward(
                qkv_ptr, q_weight_ptr, k_weight_ptr, table_ptr, out_ptr, source, angles, target, inside, part,
                table_stride_part, rstd, NORM, ROTATE, seg * MAIN, REST if seg else MAIN, D,
            )  # fmt: skip


def qk_norm_rope_forward(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    table: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """Launch the forward kernel on qkv [B, L, 3, H, D], by strides of which the last is 1; the result is contiguous."""
    batch, length, _, heads, head_dim = qkv.shape
    out = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    rows = batch * length * heads
    if rows == 0:
        return out
    main, rest = segments(head_dim)
    block = max(1, FORWARD_TILE // main)
    qk_norm_rope_forward_kernel[(triton.cdiv(rows, block), 3)](
        qkv,
        q_weight,
        k_weight,
        table,
        out,
        rows,
        length,
        heads,
        *qkv.stride()[:4],
        *(table.stride()[:2] if table is not None else (0, 0)),
        float(eps),
        D=head_dim,
        NORM=q_weight is not None,
        ROTATE=table is not None,
        WIDE=rows + block >= 2**31,
        ALIGN=alignment(*qkv.stride()[:4]),
        TABLE_ALIGN=alignment(*table.stride()[:2]) if table is not None else 1,
        MAIN=main,
        REST=rest,
        BLOCK_R=block,
        num_warps=NUM_WARPS,
    )
    return out
