"""What the forward and the backward of QK norm and RoPE share: the formulas, and a head's row as two halves.

A half is cut into a power of two and a rest, 36 = 32 + 4, instead of padded to 64. `turn` and `turn_back` serve
attention's pre-pass too.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl


@triton.jit
def turn(first, second, cos, sin):
    """The pairs (first, second) turned by their angles."""
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def turn_back(first, second, cos, sin):
    """The transpose of `turn`: turned by minus the angles."""
    return first * cos + second * sin, second * cos - first * sin


@triton.jit
def square_sum(first, second):
    """[R] sums of the squares of the rows of two [R, N] tiles."""
    return tl.sum(first * first + second * second, axis=1)


@triton.jit
def head_rstd(squares, width, eps):
    """1 / sqrt(mean(x^2) + eps) from the sum of the squares of `width` channels."""
    return tl.rsqrt(squares / width + eps)


@triton.jit
def rms_backward(weighted, unit, rstd, mean):
    """dx of n = x rstd weight: weighted = dn weight, unit = x rstd, mean = mean(weighted unit) over the head."""
    return rstd * (weighted - unit * mean)


@triton.jit
def load_halves(ptr, at, inside, START: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr):
    """[R, BLOCK] channels from START of the first halves of rows at `at`, and their partners; zero past the half."""
    HALF: tl.constexpr = (D + 1) // 2
    i = START + tl.arange(0, BLOCK)
    ptrs = ptr + at[:, None] + i[None, :]
    first = tl.load(ptrs, mask=inside[:, None] & (i < HALF)[None, :], other=0.0)
    second = tl.load(ptrs + HALF, mask=inside[:, None] & (i < D - HALF)[None, :], other=0.0)
    return first, second


@triton.jit
def store_halves(ptr, at, inside, first, second, START: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr):
    HALF: tl.constexpr = (D + 1) // 2
    i = START + tl.arange(0, BLOCK)
    ptrs = ptr + at[:, None] + i[None, :]
    tl.store(ptrs, first.to(ptr.dtype.element_ty), mask=inside[:, None] & (i < HALF)[None, :])
    tl.store(ptrs + HALF, second.to(ptr.dtype.element_ty), mask=inside[:, None] & (i < D - HALF)[None, :])


@triton.jit
def load_angles(ptr, at, stride_part, inside, START: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr):
    """[R, BLOCK] cosines and sines of rows whose token's row of the table is at `at`."""
    i = START + tl.arange(0, BLOCK)
    ptrs = ptr + at[:, None] + i[None, :]
    mask = inside[:, None] & (i < D // 2)[None, :]
    return tl.load(ptrs, mask=mask, other=1.0), tl.load(ptrs + stride_part, mask=mask, other=0.0)


@triton.jit
def load_weights(q_ptr, k_ptr, part, START: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr):
    """[1, BLOCK] weights of the same channels and their partners, of q for part 0 and of k for part 1, in fp32."""
    HALF: tl.constexpr = (D + 1) // 2
    i = START + tl.arange(0, BLOCK)
    if part == 0:
        first = tl.load(q_ptr + i, mask=i < HALF, other=0.0)
        second = tl.load(q_ptr + HALF + i, mask=i < D - HALF, other=0.0)
    else:
        first = tl.load(k_ptr + i, mask=i < HALF, other=0.0)
        second = tl.load(k_ptr + HALF + i, mask=i < D - HALF, other=0.0)
    return first.to(tl.float32)[None, :], second.to(tl.float32)[None, :]


@triton.jit
def locate(row, rows, length, heads, stride_b, stride_l, stride_part, stride_head, part, ALIGN: tl.constexpr):
    """int64 offsets of rows (b, l, h) of a part by strides, all multiples of ALIGN; rows past the end are at row 0."""
    row = tl.where(row < rows, row, 0)
    token = row // heads
    b = token // length
    at = b.to(tl.int64) * stride_b + (token - b * length).to(tl.int64) * stride_l
    at += (row - token * heads).to(tl.int64) * stride_head + part.to(tl.int64) * stride_part
    return tl.multiple_of(at, ALIGN)


@triton.jit
def locate_angles(row, rows, length, heads, stride_l, ALIGN: tl.constexpr):
    return tl.multiple_of((tl.where(row < rows, row, 0) // heads % length).to(tl.int64) * stride_l, ALIGN)


@triton.jit
def locate_packed(row, rows, heads, part, D: tl.constexpr):
    """Offsets of the rows in a contiguous packed tensor."""
    row = tl.where(row < rows, row, 0)
    token = row // heads
    return ((token.to(tl.int64) * 3 + part) * heads + row - token * heads) * D


@triton.jit
def copy_halves(from_ptr, to_ptr, source, target, inside, START: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr):
    first, second = load_halves(from_ptr, source, inside, START, BLOCK, D)
    store_halves(to_ptr, target, inside, first, second, START, BLOCK, D)


def segments(head_dim: int) -> tuple[int, int]:
    """(MAIN, REST): a half of the head as a power of two and the power of two that holds what is left, or 0."""
    half = (head_dim + 1) // 2
    main = 1 << (half.bit_length() - 1)
    return main, triton.next_power_of_2(half - main) if half > main else 0


def alignment(*strides: int) -> int:
    """The largest of 16, 8, 4, 2 and 1 that divides all strides. Triton itself sees 16 only, and a head may be 72."""
    return math.gcd(16, *strides)
