"""The native CPU product of rows with a weight packed once: how a weight is packed, and the call.

A packed weight has the same bytes for every instruction set, see csrc/common/packed_linear.h. In bfloat16 it is half
as large as in float32, in int8 a quarter; int8 also quantises the rows as they are read, and multiplies several times
faster where the processor has products of bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitok import _native
from vitok.ops._tensors import address, as_rows

ELEMENTS = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}  # that lie side by side in a column of a panel
COLUMNS, ROWS, TILE, PART = 64, 512, 32, 768  # as csrc/common/packed_linear.h has them
MAX_INT8_INNER = 2**17  # so many products of bytes fit an int32
NORMS = {None: 0, "rms": 1, "layer": 2}
GATES = {None: 0, "silu": 1, "gelu": 2}
# Below this many products for each of them threads cost more than they save.
PRODUCTS = 1 << 20


class Packed(NamedTuple):
    """A weight [columns, inner] in panels of 64 columns, [panels, ceil(inner / e), 64, e] elements as bytes.

    The others are [panels * 32] in the order of the packed columns. With a gate, each panel has 32 columns of it and
    then the 32 that they gate.
    """

    panels: Tensor
    bias: Tensor | None  # float32
    scales: Tensor | None  # float32, with int8: of a column
    sums: Tensor | None  # int32, with int8: of a column's integers


def count_panels(columns: int, gated: bool) -> int:
    return -(-columns // 2 // (COLUMNS // 2)) if gated else -(-columns // COLUMNS)


def pack(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, gated: bool) -> Packed:
    """Pack weight [columns, inner] of any strides and bias [columns], both of any float dtype, in float32, bfloat16 or
    int8. With `gated` the first half of the columns is the gate of the second half."""
    columns, inner = weight.shape
    panels = count_panels(columns, gated)
    packed = weight.new_empty((panels * -(-inner // ELEMENTS[dtype]) * COLUMNS * 4,), dtype=torch.uint8)

    def line(kind: torch.dtype, wanted: bool) -> Tensor | None:
        return weight.new_empty((panels * COLUMNS,), dtype=kind) if wanted else None

    integers = dtype == torch.int8
    found = Packed(
        packed, line(torch.float32, bias is not None), line(torch.float32, integers), line(torch.int32, integers)
    )
    bias = None if bias is None else bias.contiguous()
    _native.run(
        "linear_pack", weight,
        weight.data_ptr(), _native.DTYPE[weight.dtype], columns, inner, weight.stride(),
        address(bias), "float32" if bias is None else _native.DTYPE[bias.dtype], gated,
        str(dtype).removeprefix("torch."), packed.data_ptr(), packed.numel(),
        address(found.bias), address(found.scales), address(found.sums), torch.get_num_threads(),
    )  # fmt: skip
    return found


def run(
    x: Tensor,
    packed: Packed,
    columns: int,
    dtype: torch.dtype,
    *,
    norm: str | None = None,
    eps: float = 1e-6,
    gate: str | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """residual + gate(norm(x) @ weight.T + bias) in the dtype of x, [..., columns], or with a gate [..., columns / 2].

    Args:
        x: [..., inner]; rows of neighbouring elements are read by their stride.
        packed: made by `pack` of a weight [columns, inner] in `dtype`, gated if there is a gate here.
        norm: None, "rms" or "layer", without weights, of each row of x.
        gate: None, "silu" or "gelu".
        residual: like the result.
        out: the result's memory, contiguous; it may be the residual itself.
    """
    inner = x.shape[-1]
    width = columns if gate is None else columns // 2
    if out is None:
        out = x.new_empty((*x.shape[:-1], width))
    if out.numel() == 0:
        return out
    count = x.numel() // inner if inner else out.numel() // width
    rows, x_stride = as_rows(x) if inner else (x, 0)
    residual_stride = 0
    if residual is not None:
        residual, residual_stride = as_rows(residual)
    threads = max(1, min(torch.get_num_threads(), count * inner * columns // PRODUCTS))
    line = -(-inner // 64) * 64 + 16
    whole = dtype == torch.int8 or inner <= PART
    sums = TILE * COLUMNS if whole else ROWS * COLUMNS * count_panels(columns, gate is not None)
    scratch_bytes = threads * (4 * ((ROWS + 1 + COLUMNS) * line + sums) + 64)
    scratch = x.new_empty((scratch_bytes,), dtype=torch.uint8)
    _native.run(
        "packed_linear", x,
        rows.data_ptr(), _native.DTYPE[x.dtype], count, inner, columns, x_stride, NORMS[norm], eps,
        packed.panels.data_ptr(), str(dtype).removeprefix("torch."),
        address(packed.bias), address(packed.scales), address(packed.sums),
        GATES[gate], address(residual), residual_stride, out.data_ptr(), width,
        scratch.data_ptr(), scratch_bytes, threads,
    )  # fmt: skip
    return out
