"""What attention's forward and backward share: tile choices, tiles of any head_dim, masks as intervals.

D is split into two pieces of powers of two, 72 = 64 + 8 (masked to 16), where padding to 128 would waste 78%. A mask is
one interval of keys for each query, and one of queries for each key, so that both directions skip whole blocks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

FAR = 2**30  # window and causal_block of "no mask"; lengths stay below, so that sums stay within int32
LOG2_E = tl.constexpr(math.log2(math.e))


class Tiles(NamedTuple):
    """Rows of the resident block and of the streamed one, warps, pipeline stages, and the most registers a thread may
    take, without and with a masked border (None: as many as the compiler likes)."""

    resident: int
    streamed: int
    warps: int
    stages: int
    registers: int | None = None
    border_registers: int | None = None

    def options(self, border: bool) -> dict[str, int | None]:
        """Launch options."""
        registers = self.border_registers if border else self.registers
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": registers}


# float32 products run on the plain cores, to the last bit: small tiles keep their operands in registers, and may take
# all there are. Left alone, the compiler aims at 64 or 80, for more blocks at a time, and spills.
FLOAT32_TILES = {64: Tiles(32, 32, 8, 1, 255, 255), 128: Tiles(16, 16, 8, 1, 255, 255)}


def capability(x: torch.Tensor) -> int:
    """80, 90 or 100: the generation of the GPU that x is on; the interpreter is the first."""
    major = torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 8
    return 80 if major < 9 else 90 if major == 9 else 100


def tiles(table: dict[tuple[int, int], Tiles], x: torch.Tensor) -> Tiles:
    """The tile choice for x [..., D] on its device."""
    if x.dtype == torch.float32:
        return FLOAT32_TILES[64 if x.shape[-1] <= 64 else 128]
    return table[capability(x), next(width for width in (64, 96, 128, 256) if x.shape[-1] <= width)]


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


def mask_arguments(cu_seqlens: torch.Tensor | None, window: int, causal_block: int) -> dict[str, int]:
    """The runtime numbers of `key_bounds`; window -1 and causal_block 0 mean none."""
    segments = 0 if cu_seqlens is None else len(cu_seqlens) - 1
    return {
        "segments": segments,
        "STEPS": -(-segments.bit_length() // 4) * 4,  # in fours, so that few kernels are compiled; more do no harm
        "window": FAR if window < 0 else window,
        "causal_block": causal_block or FAR,
    }


@triton.jit
def program_block(heads, blocks, LAST_FIRST: tl.constexpr):
    """(batch, head, block) of a program, both first ones as int64; LAST_FIRST starts each head with its last block."""
    program = tl.program_id(0)
    block = program % blocks
    if LAST_FIRST:
        block = blocks - 1 - block
    return (program // blocks // heads).to(tl.int64), (program // blocks % heads).to(tl.int64), block


@triton.jit
def segment_bounds(at, cu_seqlens_ptr, length, segments, STEPS: tl.constexpr):
    """[start, stop) of the segment of each token, by bisection; within [0, length) whatever cu_seqlens holds."""
    low = at * 0
    high = low + segments
    # Unrolled: after a loop here the compiler no longer sees that the tiles below are aligned, and loads one by one.
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        below = tl.load(cu_seqlens_ptr + middle) <= at
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    start = tl.load(cu_seqlens_ptr + low).to(tl.int32)
    stop = tl.load(cu_seqlens_ptr + low + 1).to(tl.int32)
    return tl.minimum(tl.maximum(start, 0), at), tl.maximum(tl.minimum(stop, length), at + 1)


@triton.jit
def key_bounds(at, cu_seqlens_ptr, length, segments, window, causal_block, STEPS: tl.constexpr):
    """First and past-the-last key that each query sees."""
    start = at * 0
    stop = start + length
    if cu_seqlens_ptr is not None:
        start, stop = segment_bounds(at, cu_seqlens_ptr, length, segments, STEPS)
    block_end = start + ((at - start) // causal_block + 1) * causal_block
    return tl.maximum(start, at - window), tl.minimum(tl.minimum(stop, at + window + 1), block_end)


@triton.jit
def query_bounds(at, cu_seqlens_ptr, length, segments, window, causal_block, STEPS: tl.constexpr):
    """First and past-the-last query that sees each key."""
    start = at * 0
    stop = start + length
    if cu_seqlens_ptr is not None:
        start, stop = segment_bounds(at, cu_seqlens_ptr, length, segments, STEPS)
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
