"""Tubelet embed: pixels to tokens as one implicit matrix product.

    out[b, (lt, ly, lx), n] = sum_e weight[n, e] * normalise(pixels[b, lt*q + i, ly*p + j, lx*p + k, ch]) + bias[n]

with e = (i, j, k, ch) and normalise(x) = x * 2/255 - 1 for uint8, x for floats. Fused: the whole gather into the load
of the product's left operand, so that the patch rows (6 bytes a pixel written and 6 read, in a 16-bit type) never
exist; 3 bytes of uint8 a pixel are read from memory, and from the second-level cache for every further block of
features.

pixels  [B, T, H, W, 3]  uint8, float16, bfloat16 or float32; rows interleaved or in planes, other strides any
weight  [N, q*p*p*3]     float16, bfloat16 or float32, any strides
bias    [N]              any of these, or absent
out     [B, T/q * H/p * W/p, N]  in the weight's dtype, contiguous

The backward needs the patch rows for the weight's gradient and the scatter for the pixels': kernels of their own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

# (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages), none measured yet.
# LARGE: 128 x 128 sums are 64 registers a thread over two warpgroups, which leaves room for converting the bytes; 64
# deep is four instructions' worth on sm_90. A 128 x 64 operand costs a warp scheduler about 260 cycles of conversion
# beside the 490 that its products take.
# SMALL: when LARGE would leave multiprocessors of an H200 (132) without a block.
# EXACT: fp32 without tensor cores; 16 sums a thread. Twice the tile spills, and so do two stages on sm_80; Triton 3.7
# gives tiles of 64 tokens to the tensor cores of sm_100 when the pixels are bytes, whatever precision is asked for.
LARGE = (128, 128, 64, 8, 3)
SMALL = (64, 64, 64, 4, 4)
EXACT = (32, 64, 32, 4, 3)


def tiles(tokens: int, features: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """The tile choice for an output of tokens x features."""
    if dtype == torch.float32:
        return EXACT
    large = triton.cdiv(tokens, LARGE[0]) * triton.cdiv(features, LARGE[1])
    return LARGE if large >= 128 else SMALL


def options(choice: tuple[int, int, int, int, int]) -> dict[str, Any]:
    """A tile choice as keywords of a launch. fp32 obeys torch.set_float32_matmul_precision."""
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return {**dict(zip(names, choice, strict=True)), "PRECISION": precision, "enable_fp_fusion": False}


@triton.jit
def tubelet_embed_forward_kernel(
    pixels_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    features,
    rows_t,
    rows_y,
    columns,
    pixels_stride_b,
    pixels_stride_t,
    pixels_stride_y,
    pixels_stride_c,
    weight_stride_n,
    weight_stride_e,
    scale,
    shift,
    Q: tl.constexpr,
    P: tl.constexpr,
    PLANES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[m, n] = sum_e normalise(pixels[m, e]) * weight[n, e] + bias[n] for one block of tokens and features.

    Interleaved rows hold 3P neighbouring elements of a tubelet. PLANES takes e as (ch, i, j, k), the order in memory;
    the weight comes with its columns in that order.
    """
    K: tl.constexpr = Q * P * P * 3
    WEIGHT_TYPE = weight_ptr.dtype.element_ty
    # Blocks of features go fastest: those that share pixels run together, and the weight stays in the cache.
    blocks_n = tl.cdiv(features, BLOCK_N)
    m = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_m, inside_n = m < tokens, n < features
    lx = (m % columns).to(tl.int64)  # [BLOCK_M]
    ly = (m // columns % rows_y).to(tl.int64)
    lt = (m // columns // rows_y % rows_t).to(tl.int64)
    token = (m // columns // rows_y // rows_t).to(tl.int64) * pixels_stride_b
    token += lt * Q * pixels_stride_t + ly * P * pixels_stride_y + lx * (P if PLANES else 3 * P)

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        e = start + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        inside_e = e < K
        if PLANES:
            k, j, i, ch = e % P, e // P % P, e // (P * P) % Q, e // (P * P * Q)
            along_x = k + ch.to(tl.int64) * pixels_stride_c
        else:
            j, i = e // (3 * P) % P, e // (3 * P * P)
            along_x = (e % (3 * P)).to(tl.int64)
        element = along_x + i.to(tl.int64) * pixels_stride_t + j.to(tl.int64) * pixels_stride_y
        pixel = tl.load(
            pixels_ptr + token[:, None] + element[None, :],
            mask=inside_m[:, None] & inside_e[None, :],
            other=0,
        )
        value = pixel.to(tl.float32) * scale + shift if pixels_ptr.dtype.element_ty == tl.uint8 else pixel
        weight_offset = n[None, :].to(tl.int64) * weight_stride_n + e[:, None].to(tl.int64) * weight_stride_e
        weight = tl.load(weight_ptr + weight_offset, mask=inside_e[:, None] & inside_n[None, :], other=0.0)
        total = tl.dot(value.to(WEIGHT_TYPE), weight, total, input_precision=PRECISION)

    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    out_offset = m[:, None].to(tl.int64) * features + n[None, :]
    tl.store(out_ptr + out_offset, total.to(out_ptr.dtype.element_ty), mask=inside_m[:, None] & inside_n[None, :])


def fits(pixels: torch.Tensor, q: int, p: int) -> bool:
    """Whether the kernel takes these pixels: whole tubelets, interleaved colours or planes, wide loads.

    Otherwise the left operand would be loaded byte by byte, again for every block of features: the gather is better.
    """
    _, frames, height, width, _ = pixels.shape
    whole = frames % q == 0 and height % p == 0 and width % p == 0
    interleaved = pixels.stride(3) == 3 and pixels.stride(4) == 1
    aligned = all(stride % 16 == 0 for stride in (*pixels.stride()[:3], 16 if interleaved else pixels.stride(4)))
    return whole and aligned and (p == 4 or p % 8 == 0) and (interleaved or _planes(pixels))


def _planes(pixels: torch.Tensor) -> bool:
    return pixels.stride(3) == 1 and pixels.stride(4) != 1


def tubelet_embed(
    pixels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    q: int,
    p: int,
    scale: float,
    shift: float,
) -> torch.Tensor:
    """Launch the kernel on pixels [B, T, H, W, 3] that `fits` accepts.

    Returns tokens [B, T/q * H/p * W/p, N] in the weight's dtype, contiguous. For planes the weight's columns are put in
    their order, a copy of the weight. fp32 obeys torch.set_float32_matmul_precision.
    """
    batch, frames, height, width, _ = pixels.shape
    rows_t, rows_y, columns = frames // q, height // p, width // p
    features, tokens = len(weight), batch * rows_t * rows_y * columns
    out = torch.empty(batch, rows_t * rows_y * columns, features, dtype=weight.dtype, device=pixels.device)
    if out.numel() == 0:
        return out
    planes = _planes(pixels)
    if planes:
        weight = weight.unflatten(1, (q * p * p, 3)).transpose(1, 2).flatten(1)
    choice = tiles(tokens, features, weight.dtype)
    tubelet_embed_forward_kernel[(triton.cdiv(tokens, choice[0]) * triton.cdiv(features, choice[1]),)](
        pixels,
        weight,
        bias if bias is None else bias.contiguous(),
        out,
        tokens,
        features,
        rows_t,
        rows_y,
        columns,
        pixels.stride(0),
        pixels.stride(1),
        pixels.stride(2),
        pixels.stride(4),
        weight.stride(0),
        weight.stride(1),
        float(scale),
        float(shift),
        Q=q,
        P=p,
        PLANES=planes,
        **options(choice),
    )
    return out
