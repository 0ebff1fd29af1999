"""The pre-pass of attention, and its backward: q and k of the packed projection normalised and rotated.

    n = x rstd weight,  rstd = 1 / sqrt(mean(x^2) + eps)
    y[c] = n[c] cos - n[c + D/2] sin,  y[c + D/2] = n[c + D/2] cos + n[c] sin      for c < D/2

qkv       [B, L, 3, H, D]   16-bit or float32, unit stride in D, any other strides
rotated   [2, B, H, L, D]   dtype of qkv, contiguous: a block of keys is one run of memory for the kernels that follow
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vitok.kernels.attention_parts import unit
from vitok.kernels.qk_norm_rope_parts import turn, turn_back

# Pairs a program: 16 a thread of 4 warps, two 16-byte loads from each half of a 16-bit type. Not measured yet.
PAIRS = 2048
NUM_WARPS = 4


@triton.jit
def token_block(heads, blocks, BLOCK: tl.constexpr):
    """(batch, tokens, head) of a program; neighbouring programs take neighbouring heads, which lie side by side."""
    program = tl.program_id(0)
    tokens = program // heads % blocks * BLOCK + tl.arange(0, BLOCK)
    return (program // heads // blocks).to(tl.int64), tokens, (program % heads).to(tl.int64)


@triton.jit
def halves_of(row, HALF: tl.constexpr, mask):
    """The two halves of rows of 2 * HALF channels, in float32."""
    return (
        tl.load(row, mask=mask, other=0.0).to(tl.float32),
        tl.load(row + HALF, mask=mask, other=0.0).to(tl.float32),
    )


@triton.jit
def weight_of(which, q_weight_ptr, k_weight_ptr, channels, HALF: tl.constexpr):
    """Both halves of the weight of q (which = 0) or k (1)."""
    inside = channels < HALF
    first = tl.load(q_weight_ptr + channels, mask=inside & (which == 0), other=0.0).to(tl.float32)
    first += tl.load(k_weight_ptr + channels, mask=inside & (which == 1), other=0.0).to(tl.float32)
    second = tl.load(q_weight_ptr + HALF + channels, mask=inside & (which == 0), other=0.0).to(tl.float32)
    second += tl.load(k_weight_ptr + HALF + channels, mask=inside & (which == 1), other=0.0).to(tl.float32)
    return first[None, :], second[None, :]


@triton.jit
def rotate_forward_kernel(
    qkv_ptr,
    rotated_ptr,
    q_weight_ptr,
    k_weight_ptr,
    table_ptr,
    length,
    heads,
    blocks,
    batches,
    qkv_stride_b,
    qkv_stride_l,
    qkv_stride_n,
    qkv_stride_h,
    eps,
    UNIT: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """The formula above, for a block of tokens of one head of q (grid axis 1 = 0) or k (1)."""
    batch, tokens, head = token_block(heads, blocks, BLOCK)
    which = tl.program_id(1)
    channels = tl.arange(0, BLOCK_HALF)
    mask = (tokens < length)[:, None] & (channels < HALF)[None, :]
    wide_tokens = tokens.to(tl.int64)[:, None]

    qkv_ptr += (batch * qkv_stride_b + which.to(tl.int64) * qkv_stride_n + head * qkv_stride_h) * UNIT
    first, second = halves_of(qkv_ptr + wide_tokens * (qkv_stride_l * UNIT) + channels[None, :], HALF, mask)
    if q_weight_ptr is not None:
        rstd = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + eps)[:, None]
        weight_first, weight_second = weight_of(which, q_weight_ptr, k_weight_ptr, channels, HALF)
        first = first * rstd * weight_first
        second = second * rstd * weight_second
    if table_ptr is not None:
        angles = table_ptr + wide_tokens * HALF + channels[None, :]
        cosine = tl.load(angles, mask=mask, other=0.0)
        sine = tl.load(angles + length.to(tl.int64) * HALF, mask=mask, other=0.0)
        first, second = turn(first, second, cosine, sine)
    rotated_ptr += ((which * batches + batch) * heads + head) * length * (2 * HALF)
    row = rotated_ptr + wide_tokens * (2 * HALF) + channels[None, :]
    tl.store(row, first.to(rotated_ptr.dtype.element_ty), mask=mask)
    tl.store(row + HALF, second.to(rotated_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rotate_backward_kernel(
    qkv_ptr,
    dqkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    table_ptr,
    partial_ptr,
    length,
    heads,
    blocks,
    qkv_stride_b,
    qkv_stride_l,
    qkv_stride_n,
    qkv_stride_h,
    eps,
    UNIT: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Gradients of rotated q and k, in dqkv, become those of q and k in the same place.

    dn[c] = dy[c] cos + dy[c + D/2] sin,  dn[c + D/2] = dy[c + D/2] cos - dy[c] sin
    dx = rstd (dn weight - x rstd^2 mean(dn weight x)),  dweight = sum over tokens and heads of dn x rstd
    """
    batch, tokens, head = token_block(heads, blocks, BLOCK)
    which = tl.program_id(1)
    channels = tl.arange(0, BLOCK_HALF)
    mask = (tokens < length)[:, None] & (channels < HALF)[None, :]
    wide_tokens = tokens.to(tl.int64)[:, None]

    stride = heads.to(tl.int64) * (2 * HALF)
    dqkv_ptr += batch * length * 3 * stride + which * stride + head * (2 * HALF)
    gradient_row = dqkv_ptr + wide_tokens * (3 * stride) + channels[None, :]
    first, second = halves_of(gradient_row, HALF, mask)
    if table_ptr is not None:
        angles = table_ptr + wide_tokens * HALF + channels[None, :]
        cosine = tl.load(angles, mask=mask, other=0.0)
        sine = tl.load(angles + length.to(tl.int64) * HALF, mask=mask, other=0.0)
        first, second = turn_back(first, second, cosine, sine)
    if q_weight_ptr is not None:
        qkv_ptr += (batch * qkv_stride_b + which.to(tl.int64) * qkv_stride_n + head * qkv_stride_h) * UNIT
        x_first, x_second = halves_of(qkv_ptr + wide_tokens * (qkv_stride_l * UNIT) + channels[None, :], HALF, mask)
        rstd = tl.rsqrt((tl.sum(x_first * x_first, 1) + tl.sum(x_second * x_second, 1)) / (2 * HALF) + eps)[:, None]
        x_first *= rstd
        x_second *= rstd
        partial = partial_ptr + (which.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (2 * HALF) + channels
        tl.store(partial, tl.sum(first * x_first, 0), mask=channels < HALF)
        tl.store(partial + HALF, tl.sum(second * x_second, 0), mask=channels < HALF)
        weight_first, weight_second = weight_of(which, q_weight_ptr, k_weight_ptr, channels, HALF)
        first *= weight_first
        second *= weight_second
        mean = ((tl.sum(first * x_first, 1) + tl.sum(second * x_second, 1)) / (2 * HALF))[:, None]
        first = rstd * (first - x_first * mean)
        second = rstd * (second - x_second * mean)
    tl.store(gradient_row, first.to(dqkv_ptr.dtype.element_ty), mask=mask)
    tl.store(gradient_row + HALF, second.to(dqkv_ptr.dtype.element_ty), mask=mask)


def _geometry(qkv: torch.Tensor) -> tuple[int, dict[str, int]]:
    """Blocks of tokens, and the tile sizes."""
    block_half = triton.next_power_of_2(qkv.shape[-1] // 2)
    block = PAIRS // block_half
    constants = {"UNIT": unit(qkv), "HALF": qkv.shape[-1] // 2, "BLOCK": block, "BLOCK_HALF": block_half}
    return triton.cdiv(qkv.shape[1], block), constants


def _small(x: torch.Tensor | None) -> torch.Tensor | None:
    """A weight or table as the kernels read it."""
    return None if x is None else x.contiguous()


def rotate(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    table: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """q and k, normalised if there are weights and rotated if there is a table: [2, B, H, L, D]."""
    batch, length, _, heads, head_dim = qkv.shape
    rotated = torch.empty((2, batch, heads, length, head_dim), dtype=qkv.dtype, device=qkv.device)
    blocks, constants = _geometry(qkv)
    rotate_forward_kernel[(batch * blocks * heads, 2)](
        qkv,
        rotated,
        _small(q_weight),
        _small(k_weight),
        _small(table),
        length,
        heads,
        blocks,
        batch,
        *(stride // constants["UNIT"] for stride in qkv.stride()[:4]),
        eps,
        **constants,
        num_warps=NUM_WARPS,
    )
    return rotated


def rotate_backward(
    dqkv: torch.Tensor,
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    table: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn the q and k parts of the contiguous dqkv, gradients of `rotate`'s result, into gradients of qkv in place.

    Returns the gradients of both weights in their dtypes, [0] where there are none.
    """
    batch, length, _, heads, head_dim = qkv.shape
    blocks, constants = _geometry(qkv)
    programs = batch * blocks * heads
    partial = torch.empty(
        (2, programs if q_weight is not None else 0, head_dim), dtype=torch.float32, device=qkv.device
    )
    rotate_backward_kernel[(programs, 2)](
        qkv,
        dqkv,
        _small(q_weight),
        _small(k_weight),
        _small(table),
        partial,
        length,
        heads,
        blocks,
        *(stride // constants["UNIT"] for stride in qkv.stride()[:4]),
        eps,
        **constants,
        num_warps=NUM_WARPS,
    )
    if q_weight is None or k_weight is None:
        return qkv.new_empty((0,)), qkv.new_empty((0,))
    # The second pass: a sum over programs in torch's fixed order.
    return partial[0].sum(0).to(q_weight.dtype), partial[1].sum(0).to(k_weight.dtype)
