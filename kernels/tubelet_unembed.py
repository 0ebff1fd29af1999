"""Tubelet unembed: tokens to pixels as one matrix product that writes into the clip.

    out[b, lt*q + i, ly*p + j, lx*p + k, ch] = to_pixel(sum_c weight[e, c] * tokens[b, (lt, ly, lx), c] + bias[e])

with e = (i, j, k, ch). Fused: permutation, crop and, for uint8, clamp, scale, round and cast into the epilogue of the
product. The columns of a tile are taken in the order of the clip's memory, which costs nothing (a column is a row of
the weight, loaded whole wherever it stands) and makes the stores contiguous. Against a library product and a scatter it
saves 2 + 2 bytes an element of a 16-bit type: at width 768 and 16 x 16 patches 3 KB a token, 0.7 ns at 4.3 TB/s beside
the product's 1.5 ns at 770 TFLOP/s; it wins where this kernel reaches more than 0.7 of the library's rate.

tokens  [B, L, C]        float16, bfloat16 or float32, any strides; L = ceil(T/q) * ceil(H/p) * ceil(W/p)
weight  [q*p*p*3, C]     the tokens' dtype, any strides
bias    [q*p*p*3]        any of these, or absent
out     [B, 3, T, H, W] or [B, T, H, W, 3]  contiguous; the tokens' dtype or uint8

The backward gathers the gradient of the clip into rows (kernels/tubelet_gather.py); library products do the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vitok.kernels.tubelet_embed import options, tiles
from vitok.kernels.tubelet_scatter import to_byte

# In the order of tubelet_embed's tiles, for 16-bit clips that cut columns: every element has a store of its own, with
# an address and a mask, so a thread takes 16; with 32 sums it spills, with LARGE's 64 it does by the hundred.
CROPPED = (64, 64, 64, 8, 4)


@triton.jit
def tubelet_unembed_forward_kernel(
    tokens_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    tokens_of_clip,
    channels,
    frames,
    height,
    width,
    rows_y,
    columns,
    tokens_stride_b,
    tokens_stride_l,
    tokens_stride_c,
    weight_stride_e,
    weight_stride_c,
    Q: tl.constexpr,
    P: tl.constexpr,
    CROP_ROWS: tl.constexpr,
    CROP_COLUMNS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """pixel(m, n) = sum_c tokens[m, c] * weight[element(n), c] + bias[element(n)] for one block of tokens and elements.

    CROP_ROWS and CROP_COLUMNS: the last frames or rows, or columns, are cut; only the latter costs wide stores.
    """
    N: tl.constexpr = Q * P * P * 3
    # Blocks of elements go fastest: those that share tokens run together, and the weight stays in the cache.
    blocks_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    m = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_m, inside_n = m < tokens, n < N
    b = (m // tokens_of_clip).to(tl.int64)  # [BLOCK_M]
    at = (m % tokens_of_clip).to(tl.int64)
    if CHANNELS_LAST:
        ch, k, j, i = n % 3, n // 3 % P, n // (3 * P) % P, n // (3 * P * P)  # [BLOCK_N]
        element = n
    else:
        k, j, i, ch = n % P, n // P % P, n // (P * P) % Q, n // (P * P * Q)
        element = ((i * P + j) * P + k) * 3 + ch

    token_offset = b * tokens_stride_b + at * tokens_stride_l
    weight_offset = element.to(tl.int64) * weight_stride_e
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, channels, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        inside_c = c < channels
        c = c.to(tl.int64)
        token = tl.load(
            tokens_ptr + token_offset[:, None] + c[None, :] * tokens_stride_c,
            mask=inside_m[:, None] & inside_c[None, :],
            other=0.0,
        )
        weight = tl.load(
            weight_ptr + weight_offset[None, :] + c[:, None] * weight_stride_c,
            mask=inside_c[:, None] & inside_n[None, :],
            other=0.0,
        )
        total = tl.dot(token, weight, total, input_precision=PRECISION)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + element, mask=inside_n, other=0.0).to(tl.float32)[None, :]

    lx, ly, lt = at % columns, at // columns % rows_y, at // columns // rows_y
    if CHANNELS_LAST:
        corner = ((b * frames + lt * Q) * height + ly * P) * width * 3 + lx * (3 * P)
        inner = (i.to(tl.int64) * height + j) * width * 3 + n % (3 * P)
    else:
        corner = ((b * 3 * frames + lt * Q) * height + ly * P) * width + lx * P
        inner = ((ch.to(tl.int64) * frames + i) * height + j) * width + k
    inside = inside_m[:, None] & inside_n[None, :]
    if CROP_ROWS:
        inside = inside & (lt[:, None] * Q + i[None, :] < frames) & (ly[:, None] * P + j[None, :] < height)
    if CROP_COLUMNS:
        inside = inside & (lx[:, None] * P + k[None, :] < width)
    target = out_ptr + corner[:, None] + inner[None, :]
    if out_ptr.dtype.element_ty == tl.uint8:
        tl.store(target, to_byte(total), mask=inside)
    else:
        tl.store(target, total.to(out_ptr.dtype.element_ty), mask=inside)


def tubelet_unembed(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    q: int,
    p: int,
    size: tuple[int, int, int],
    dtype: torch.dtype,
    channels_last: bool,
) -> torch.Tensor:
    """Launch the kernel on tokens [B, L, C] of any strides for clips of size (T, H, W).

    Returns a contiguous [B, T, H, W, 3] tensor when channels_last, else [B, 3, T, H, W]; of `dtype`, where uint8 is
    rounded from the fp32 sums. fp32 obeys torch.set_float32_matmul_precision.
    """
    batch, tokens_of_clip, channels = tokens.shape
    frames, height, width = size
    shape = (batch, *size, 3) if channels_last else (batch, 3, *size)
    out = torch.empty(shape, dtype=dtype, device=tokens.device)
    if batch == 0:
        return out
    rows_y, columns = triton.cdiv(height, p), triton.cdiv(width, p)
    elements = len(weight)
    crop_columns = width % p != 0
    choice = tiles(batch * tokens_of_clip, elements, tokens.dtype)
    if crop_columns and tokens.dtype != torch.float32:
        choice = CROPPED
    blocks = triton.cdiv(batch * tokens_of_clip, choice[0]) * triton.cdiv(elements, choice[1])
    tubelet_unembed_forward_kernel[(blocks,)](
        tokens,
        weight,
        bias if bias is None else bias.contiguous(),
        out,
        batch * tokens_of_clip,
        tokens_of_clip,
        channels,
        frames,
        height,
        width,
        rows_y,
        columns,
        tokens.stride(0),
        tokens.stride(1),
        tokens.stride(2),
        weight.stride(0),
        weight.stride(1),
        Q=q,
        P=p,
        CROP_ROWS=frames % q != 0 or height % p != 0,
        CROP_COLUMNS=crop_columns,
        CHANNELS_LAST=channels_last,
        **options(choice),
    )
    return out
