"""Attention forward: out = softmax(scale Q' K'^T) V over the packed projection, Q' and K' normalised and rotated.

Fused: QK-norm and RoPE of q run in the prologue, masks are intervals of keys that skip whole blocks, the L x L matrix
never exists. The keys of a head are read by every block of queries of that head, so rotating them there would repeat
the work L / BLOCK_M times, read fp32 tables beside each key block, and route keys through registers instead of
asynchronous copies to shared memory. A pre-pass writes rotated keys once instead: 4 bytes an element beside the 8 of q,
k, v and out in a 16-bit type. Without norm and table there is no pre-pass and keys are read where they lie.

qkv       [B, L, 3, H, D]   16-bit or float32, unit stride in D, any other strides; D a multiple of 8 up to 256
q_weight  [D], k_weight [D] any float, or None
table     [2, L, D / 2]     cosines and sines, or None
out       [B, L, H, D]      contiguous, dtype of qkv
lse       [B, H, L]         float32, natural logarithm of each row's sum of exponentials

D is split into two pieces of powers of two, 72 = 64 + 8 (masked to 16), where padding to 128 would waste 78%.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

FAR = 2**30  # window and causal_block of "no mask"; lengths stay below, so that sums stay within int32
LOG2_E = math.log2(math.e)


class Tiles(NamedTuple):
    """Rows of the resident block, rows of the streamed block, warps, pipeline stages."""

    resident: int
    streamed: int
    warps: int
    stages: int


# By (compute capability, widest head_dim): reasoned from registers and shared memory, not measured yet.
FORWARD_TILES = {
    (80, 64): Tiles(128, 64, 4, 3),
    (80, 128): Tiles(128, 64, 8, 2),
    (80, 256): Tiles(64, 32, 8, 2),
    (90, 64): Tiles(128, 128, 8, 3),
    (90, 128): Tiles(128, 64, 8, 3),
    (90, 256): Tiles(128, 32, 8, 2),
    (100, 64): Tiles(128, 128, 4, 3),
    (100, 128): Tiles(128, 64, 4, 3),
    (100, 256): Tiles(128, 32, 8, 2),
}
# float32 products run on the plain cores, to the last bit: small tiles keep their operands in registers.
FLOAT32_TILES = Tiles(32, 32, 4, 1)


def tiles(table: dict[tuple[int, int], Tiles], x: torch.Tensor) -> Tiles:
    """The tile choice for x [..., D] on its device; the interpreter takes those of sm_80."""
    if x.dtype == torch.float32:
        return FLOAT32_TILES
    major = torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 8
    capability = 80 if major < 9 else 90 if major == 9 else 100
    return table[capability, next(width for width in (64, 128, 256) if x.shape[-1] <= width)]


def pieces(head_dim: int) -> tuple[int, int]:
    """Powers of two, at least 16, that cover head_dim; the second is 0 where one costs no more."""
    whole = max(16, triton.next_power_of_2(head_dim))
    first = whole // 2
    if head_dim <= first or first < 16:
        return whole, 0
    second = max(16, triton.next_power_of_2(head_dim - first))
    return (first, second) if first + second < whole else (whole, 0)


def unit(*tensors: torch.Tensor) -> int:
    """8 if every stride but the last is a multiple of 8, else 1.

    Strides reach the kernels in this unit: the compiler sees by itself that a number is a multiple of 16, but 72 is
    not, and without a known factor of 8 it would load elements one by one.
    """
    return 8 if all(stride % 8 == 0 for x in tensors for stride in x.stride()[:-1]) else 1


@triton.jit
def segment_bounds(at, cu_seqlens_ptr, length, segments, search_steps):
    """[start, stop) of the segment of each token, by bisection; within [0, length) whatever cu_seqlens holds."""
    low = at * 0
    high = low + segments
    for _ in range(search_steps):
        middle = (low + high) // 2
        below = tl.load(cu_seqlens_ptr + middle) <= at
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    start = tl.load(cu_seqlens_ptr + low).to(tl.int32)
    stop = tl.load(cu_seqlens_ptr + low + 1).to(tl.int32)
    return tl.minimum(tl.maximum(start, 0), at), tl.maximum(tl.minimum(stop, length), at + 1)


@triton.jit
def key_bounds(at, cu_seqlens_ptr, length, segments, search_steps, window, causal_block):
    """First and past-the-last key that each query sees."""
    start = at * 0
    stop = start + length
    if cu_seqlens_ptr is not None:
        start, stop = segment_bounds(at, cu_seqlens_ptr, length, segments, search_steps)
    block_end = start + ((at - start) // causal_block + 1) * causal_block
    return tl.maximum(start, at - window), tl.minimum(tl.minimum(stop, at + window + 1), block_end)


@triton.jit
def query_bounds(at, cu_seqlens_ptr, length, segments, search_steps, window, causal_block):
    """First and past-the-last query that sees each key."""
    start = at * 0
    stop = start + length
    if cu_seqlens_ptr is not None:
        start, stop = segment_bounds(at, cu_seqlens_ptr, length, segments, search_steps)
    block_start = start + (at - start) // causal_block * causal_block
    return tl.maximum(block_start, at - window), tl.minimum(stop, at + window + 1)


@triton.jit
def block_ranges(first, last, BLOCK: tl.constexpr):
    """Of the intervals [first, last) of some rows: blocks that any row sees, [start, end), and the run [whole,
    whole_end) of blocks among them that every row sees whole."""
    start = tl.min(first, 0) // BLOCK * BLOCK
    end = tl.max(last, 0)
    whole = (tl.max(first, 0) + BLOCK - 1) // BLOCK * BLOCK
    whole_end = tl.maximum(tl.min(last, 0) // BLOCK * BLOCK, whole)
    return start, whole, whole_end, end


@triton.jit
def load_tile(ptr, rows, length, stride, COLUMN: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr,
              MASK_ROWS: tl.constexpr):  # fmt: skip
    """[rows, WIDTH] of channels COLUMN onwards, zeros beyond HEAD_DIM and, if MASK_ROWS, beyond length."""
    channels = COLUMN + tl.arange(0, WIDTH)
    address = ptr + rows.to(tl.int64)[:, None] * stride + channels[None, :]
    if COLUMN + WIDTH > HEAD_DIM:
        if MASK_ROWS:
            return tl.load(address, mask=(rows[:, None] < length) & (channels[None, :] < HEAD_DIM), other=0.0)
        return tl.load(address, mask=channels[None, :] < HEAD_DIM, other=0.0)
    if MASK_ROWS:
        return tl.load(address, mask=rows[:, None] < length, other=0.0)
    return tl.load(address)


@triton.jit
def store_tile(ptr, tile, rows, length, stride, COLUMN: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    channels = COLUMN + tl.arange(0, WIDTH)
    address = ptr + rows.to(tl.int64)[:, None] * stride + channels[None, :]
    mask = (rows[:, None] < length) & (channels[None, :] < HEAD_DIM)
    tl.store(address, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def rotated_tile(x, ptr, rows, length, stride, rstd, weight_ptr, table_ptr, COLUMN: tl.constexpr, WIDTH: tl.constexpr,
                 HEAD_DIM: tl.constexpr):  # fmt: skip
    """Norm and rotation of x, the tile of channels COLUMN onwards; the other half of each pair is loaded again.

    y[c] = n[c] cos[c] - n[c + D/2] sin[c],  y[c + D/2] = n[c + D/2] cos[c] + n[c] sin[c],  n = x rstd weight
    """
    channels = COLUMN + tl.arange(0, WIDTH)
    inside = channels < HEAD_DIM
    wide = x.to(tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + channels, mask=inside, other=0.0).to(tl.float32)
        wide = wide * rstd[:, None] * weight[None, :]
    if table_ptr is not None:
        HALF: tl.constexpr = HEAD_DIM // 2
        second = channels >= HALF
        other = tl.where(second, channels - HALF, channels + HALF)
        angle = tl.where(second, channels - HALF, channels)
        mask = (rows[:, None] < length) & inside[None, :]
        partner = tl.load(ptr + rows.to(tl.int64)[:, None] * stride + other[None, :], mask=mask, other=0.0)
        partner = partner.to(tl.float32)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + other, mask=inside, other=0.0).to(tl.float32)
            partner = partner * rstd[:, None] * weight[None, :]
        angles = table_ptr + rows.to(tl.int64)[:, None] * HALF + angle[None, :]
        cosine = tl.load(angles, mask=mask, other=0.0)
        sine = tl.load(angles + length.to(tl.int64) * HALF, mask=mask, other=0.0)
        wide = wide * cosine + tl.where(second, 1.0, -1.0)[None, :] * partner * sine
    return wide.to(x.dtype)


@triton.jit
def rotate_forward_kernel(
    x_ptr,
    y_ptr,
    q_weight_ptr,
    k_weight_ptr,
    table_ptr,
    length,
    heads,
    blocks,
    x_stride_b,
    x_stride_l,
    x_stride_n,
    x_stride_h,
    eps,
    FIRST: tl.constexpr,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Norm and rotation of a block of tokens of one head of q (grid axis 1 + FIRST = 0) or k (1), written head-major."""
    program = tl.program_id(0)
    which = tl.program_id(1)
    head = (program % heads).to(tl.int64)
    rows = program // heads % blocks * BLOCK + tl.arange(0, BLOCK)
    batch = (program // heads // blocks).to(tl.int64)

    channels = tl.arange(0, HALF)
    mask = (rows < length)[:, None] & (channels < HEAD_DIM // 2)[None, :]
    x_ptr += (batch * x_stride_b + (which + FIRST).to(tl.int64) * x_stride_n + head * x_stride_h) * UNIT
    address = x_ptr + rows.to(tl.int64)[:, None] * (x_stride_l * UNIT) + channels[None, :]
    first = tl.load(address, mask=mask, other=0.0).to(tl.float32)  # [BLOCK, HALF]
    second = tl.load(address + HEAD_DIM // 2, mask=mask, other=0.0).to(tl.float32)
    if q_weight_ptr is not None:
        rstd = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / HEAD_DIM + eps)
        weight_ptr = q_weight_ptr
        if which + FIRST == 1:
            weight_ptr = k_weight_ptr
        inside = channels < HEAD_DIM // 2
        first *= rstd[:, None] * tl.load(weight_ptr + channels, mask=inside, other=0.0).to(tl.float32)[None, :]
        weight_ptr += HEAD_DIM // 2
        second *= rstd[:, None] * tl.load(weight_ptr + channels, mask=inside, other=0.0).to(tl.float32)[None, :]
    if table_ptr is not None:
        angles = table_ptr + rows.to(tl.int64)[:, None] * (HEAD_DIM // 2) + channels[None, :]
        cosine = tl.load(angles, mask=mask, other=0.0)
        sine = tl.load(angles + length.to(tl.int64) * (HEAD_DIM // 2), mask=mask, other=0.0)
        first, second = first * cosine - second * sine, second * cosine + first * sine
    batches = tl.num_programs(0) // (heads * blocks)
    y_ptr += ((which * batches + batch) * heads + head) * length * HEAD_DIM
    address = y_ptr + rows.to(tl.int64)[:, None] * HEAD_DIM + channels[None, :]
    tl.store(address, first.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(address + HEAD_DIM // 2, second.to(y_ptr.dtype.element_ty), mask=mask)


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
    q_weight_ptr,
    table_ptr,
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
    search_steps,
    window,
    causal_block,
    scale_log2,
    eps,
    MASKED: tl.constexpr,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PIECE0: tl.constexpr,
    PIECE1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of queries of one head: blocks of keys that every query sees whole, then those cut by a mask."""
    program = tl.program_id(0)
    block = program % blocks
    if MASKED:
        block = blocks - 1 - block  # under a causal mask the last queries have the most keys: they start first
    batch = (program // blocks // heads).to(tl.int64)
    head = (program // blocks % heads).to(tl.int64)
    q_ptr += (batch * q_stride_b + head * q_stride_h) * UNIT
    k_ptr += (batch * k_stride_b + head * k_stride_h) * UNIT
    v_ptr += (batch * v_stride_b + head * v_stride_h) * UNIT

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q0 = load_tile(q_ptr, rows, length, q_stride_l * UNIT, 0, PIECE0, HEAD_DIM, True)
    q1 = q0
    if PIECE1:
        q1 = load_tile(q_ptr, rows, length, q_stride_l * UNIT, PIECE0, PIECE1, HEAD_DIM, True)
    if q_weight_ptr is not None or table_ptr is not None:
        rstd = tl.sum(q0.to(tl.float32) * q0.to(tl.float32), 1)
        if PIECE1:
            rstd += tl.sum(q1.to(tl.float32) * q1.to(tl.float32), 1)
        rstd = tl.rsqrt(rstd / HEAD_DIM + eps)
        q0 = rotated_tile(
            q0, q_ptr, rows, length, q_stride_l * UNIT, rstd, q_weight_ptr, table_ptr, 0, PIECE0, HEAD_DIM
        )
        if PIECE1:
            q1 = rotated_tile(
                q1, q_ptr, rows, length, q_stride_l * UNIT, rstd, q_weight_ptr, table_ptr, PIECE0, PIECE1, HEAD_DIM
            )

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
        first, last = key_bounds(at, cu_seqlens_ptr, length, segments, search_steps, window, causal_block)
        start, whole, whole_end, end = block_ranges(first, last, BLOCK_N)
    acc0, acc1, row_max, row_sum = attend(
        acc0, acc1, row_max, row_sum, q0, q1, k_ptr, v_ptr, k_stride_l * UNIT, v_stride_l * UNIT, first, last,
        whole, whole_end, 0, 0, length, scale_log2, HEAD_DIM, PIECE0, PIECE1, BLOCK_N, False,
    )  # fmt: skip
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


def rotate(
    qkv: torch.Tensor,
    first: int,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    table: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """q and k (first = 0) or k alone (1), normalised and rotated: contiguous [2 - first, B, H, L, D]."""
    batch, length, _, heads, head_dim = qkv.shape
    rotated = torch.empty((2 - first, batch, heads, length, head_dim), dtype=qkv.dtype, device=qkv.device)
    half = triton.next_power_of_2(head_dim // 2)
    block = max(16, 2048 // half)  # 2048 pairs over 4 warps are 16 a thread: two wide loads each of both halves
    blocks = triton.cdiv(length, block)
    stride_unit = unit(qkv)
    rotate_forward_kernel[(batch * blocks * heads, 2 - first)](
        qkv,
        rotated,
        q_weight,
        k_weight,
        table,
        length,
        heads,
        blocks,
        *(stride // stride_unit for stride in qkv.stride()[:4]),
        eps,
        FIRST=first,
        UNIT=stride_unit,
        HEAD_DIM=head_dim,
        HALF=half,
        BLOCK=block,
        num_warps=4,
    )
    return rotated


def prepared(
    q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, table: torch.Tensor | None
) -> list[torch.Tensor | None]:
    """Small operands as the kernels read them: contiguous, the table in float32."""
    weights = [None if w is None else w.contiguous() for w in (q_weight, k_weight)]
    return [*weights, None if table is None else table.float().contiguous()]


def mask_arguments(cu_seqlens: torch.Tensor | None, window: int, causal_block: int) -> dict[str, int]:
    """The runtime numbers of `key_bounds`; window -1 and causal_block 0 mean none."""
    segments = 0 if cu_seqlens is None else len(cu_seqlens) - 1
    return {
        "segments": segments,
        "search_steps": segments.bit_length(),
        "window": FAR if window < 0 else window,
        "causal_block": causal_block or FAR,
    }


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
    q_weight, k_weight, table = prepared(q_weight, k_weight, table)
    q, k, v = qkv.unbind(2)
    if q_weight is not None or table is not None:
        k = rotate(qkv, 1, q_weight, k_weight, table, eps)[0].transpose(1, 2)
    choice = tiles(FORWARD_TILES, qkv)
    piece0, piece1 = pieces(head_dim)
    stride_unit = unit(q, k, v)
    blocks = triton.cdiv(length, choice.resident)
    attention_forward_kernel[(batch * heads * blocks,)](
        q,
        k,
        v,
        out,
        lse,
        q_weight,
        table,
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        length,
        heads,
        blocks,
        *(stride // stride_unit for x in (q, k, v) for stride in x.stride()[:3]),
        **mask_arguments(cu_seqlens, window, causal_block),
        scale_log2=LOG2_E * head_dim**-0.5,
        eps=eps,
        MASKED=window >= 0 or causal_block > 0 or cu_seqlens is not None,
        UNIT=stride_unit,
        HEAD_DIM=head_dim,
        PIECE0=piece0,
        PIECE1=piece1,
        BLOCK_M=choice.resident,
        BLOCK_N=choice.streamed,
        num_warps=choice.warps,
        num_stages=choice.stages,
    )
    return out, lse
