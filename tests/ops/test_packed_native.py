"""The native product of rows with a packed weight against a formula in float64: instruction sets, dtypes, sizes."""

from __future__ import annotations

import ctypes
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vitok import _native

_C = _native.library()
if _C is None:
    pytest.skip(f"no native library: {_native.reason()}", allow_module_level=True)

from vitok.ops import _packed_native as native  # noqa: E402

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
PACKED = [torch.float32, torch.bfloat16, torch.int8]
CSRC = Path(__file__).parents[2] / "csrc"
BAND = 4096  # bytes before and behind everything that the kernels are given to write
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu}
# rows, inner, columns, norm, gate, bias, residual
CASES = [
    (1, 1, 1, None, None, True, None),
    (11, 3, 31, "layer", None, False, "apart"),
    (12, 33, 64, "rms", None, True, "in place"),
    (13, 768, 65, None, None, True, "apart"),
    (145, 33, 100, "layer", None, True, None),
    (300, 768, 100, "rms", None, False, "in place"),
    (13, 768, 768, "layer", None, True, "in place"),
    (1, 3, 2, None, "silu", True, None),
    (12, 65, 64, "rms", "gelu", False, None),
    (13, 768, 34, "layer", "silu", True, "apart"),
    (145, 100, 200, None, "gelu", True, "in place"),
    (300, 257, 62, "layer", "gelu", False, None),
]


@pytest.fixture(autouse=True)
def _guarded_memory(_poisoned_memory, monkeypatch):
    """Outputs and scratch are full of NaN and lie between bands that nobody may touch."""
    made = []

    def new_empty(like, size, *, dtype=None, **_):
        dtype = dtype or like.dtype
        memory = torch.full((math.prod(size) * dtype.itemsize + 2 * BAND,), 255, dtype=torch.uint8)
        made.append(memory)
        return memory[BAND:-BAND].view(dtype).view(size)

    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    yield
    for memory in made:
        assert (memory[:BAND] == 255).all() and (memory[-BAND:] == 255).all()


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(dtype, rows, inner, columns, gate=None, bias=True, residual=None, **_):
    """x, weight, bias, residual; none of them packed in memory."""
    weight = (normal(inner, columns, seed=1) * inner**-0.5).float().t()
    width = columns // 2 if gate else columns
    return (
        (0.3 + normal(rows, inner + 5)).to(dtype)[:, 2 : 2 + inner],
        weight,
        normal(columns, seed=2).to(dtype) if bias else None,
        normal(rows, width + 3, seed=3).to(dtype)[:, :width] if residual else None,
    )


def quantised(x):
    """Integers and the scale of each row, in float32 as the kernel does it."""
    top = x.float().abs().amax(-1, keepdim=True)
    return (x.float() * torch.full_like(top, 127).div(top)).round(), (top / 127).to(x.dtype)  # 127 / top rounds twice


def normed(x, norm, eps):
    centred = x - x.mean(-1, keepdim=True) if norm == "layer" else x
    return centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt() if norm else x


def formula(x, weight, bias, residual, packed, norm, gate, eps=1e-6, rounded=False):
    """The op in the dtype of x; `rounded`: with what the norm gives in bfloat16."""
    x = normed(x, norm, eps)
    x = x.bfloat16().to(x.dtype) if rounded else x
    if packed == torch.int8:
        (rows, row_scales), (columns, column_scales) = quantised(x), quantised(weight)
        y = (rows.double() @ columns.double().t()).to(x.dtype) * row_scales * column_scales.to(x.dtype).t()
        y = y if bias is None else y + bias.to(x.dtype)
    else:
        y = F.linear(x, weight.to(packed).to(x.dtype), None if bias is None else bias.to(x.dtype))
    if gate:
        left, right = y.chunk(2, -1)
        y = ACTIVATIONS[gate](left) * right
    return y if residual is None else y + residual.to(x.dtype)


def compare(judge, isa, dtype, packed, rows, inner, columns, norm, gate, bias, residual):
    x, weight, offsets, others = make(dtype, rows, inner, columns, gate, bias, residual)
    made = native.pack(weight, offsets, packed, gate is not None)
    expected = None if others is None else others.clone()
    out = others.contiguous() if residual == "in place" else None
    found = native.run(x, made, columns, packed, norm=norm, gate=gate, residual=others if out is None else out, out=out)
    assert found is out or out is None
    arguments = (weight, offsets, expected, packed, norm, gate)
    rounded = isa in ("avx512_bf16", "amx") and dtype == packed == torch.bfloat16 and norm is not None
    baseline = formula(x.float(), *arguments, rounded=rounded).to(dtype)
    oracle = formula(x.double(), *arguments)
    # Terms of a few units that cancel leave their roundings; a normalised number between two integers may go to either.
    floor = 1e-6 + (weight.abs().max().item() * 4 / 127 if packed == torch.int8 and norm else 0.0)
    judge(found, baseline, oracle, floor)


@pytest.mark.parametrize("packed", PACKED, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(isa, dtype, packed, case, judge):
    compare(judge, isa, dtype, packed, *case)


@pytest.mark.parametrize("packed", PACKED, ids=str)
def test_sizes(isa, packed, judge):
    for rows, inner, columns in itertools.product((1, 6, 7), (1, 3, 33), (1, 31, 64, 65, 100)):
        compare(judge, isa, torch.float32, packed, rows, inner, columns, None, None, True, None)


def test_long_sums_are_as_exact_as_short_ones(isa, judge):
    x, weight, _, _ = make(torch.float32, 13, 8192, 33, bias=False)
    found = native.run(x, native.pack(weight, None, torch.float32, False), 33, torch.float32)
    oracle = x.double() @ weight.double().t()
    judge(found, F.linear(x, weight), oracle)
    assert (found - oracle).square().mean().sqrt() <= 1e-6 * oracle.square().mean().sqrt()


def unpacked(made, columns, inner, dtype, gated):
    """The weight as it lies in the panels, [panels * 64, inner] in their order, and the zeros past its ends."""
    e = native.ELEMENTS[dtype]
    panels = made.panels.view(dtype).view(-1, -(-inner // e), 64, e)
    matrix = panels.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    width = columns // 2 if gated else columns
    if gated:
        gate, up = (matrix.unflatten(0, (-1, 64))[:, part].flatten(0, 1) for part in (slice(32), slice(32, 64)))
        used = torch.cat((gate[:width], up[:width]))
        rest = torch.cat((gate[width:], up[width:]))
    else:
        used, rest = matrix[:width], matrix[width:]
    return used[:, :inner], torch.cat((rest.flatten(), used[:, inner:].flatten()))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("packed", PACKED, ids=str)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_panels(isa, dtype, packed, gated):
    for inner, columns in ((1, 2), (3, 64), (33, 130), (65, 100)):
        weight, bias = normal(columns, inner).to(dtype), normal(columns).to(dtype)
        made = native.pack(weight, bias, packed, gated)
        turned = native.pack(weight.t().contiguous().t(), bias, packed, gated)
        assert all(torch.equal(a, b) for a, b in zip(made, turned, strict=True) if a is not None)
        used, rest = unpacked(made, columns, inner, packed, gated)
        assert not rest.any()
        lines = [None if x is None else unpacked_line(x, columns, gated) for x in made[1:]]
        torch.testing.assert_close(lines[0], bias.float(), rtol=0, atol=0)
        if packed == torch.int8:
            integers, scales = quantised(weight.float())
            assert torch.equal(used.float(), integers) and torch.equal(lines[1], scales[:, 0])
            assert torch.equal(lines[2], used.int().sum(1, dtype=torch.int32))
        else:
            assert torch.equal(used, weight.float().to(packed)) and lines[1:] == [None, None]


def unpacked_line(x, columns, gated):
    if not gated:
        return x[:columns]
    halves = x.view(-1, 2, 32).transpose(0, 1).flatten(1)[:, : columns // 2]
    return halves.flatten()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_int8_has_the_same_bits_on_every_level(usable_isas, dtype):
    results = []
    for level in usable_isas:
        _C.set_cpu_isa(level)
        x, weight, bias, residual = make(dtype, 37, 770, 100, bias=True, residual=True)
        results.append(native.run(x, native.pack(weight, bias, torch.int8, False), 100, torch.int8, residual=residual))
    assert all(torch.equal(x, results[0]) for x in results)


@pytest.mark.parametrize("packed", PACKED, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 100), (25, 300), (300, 34)])
def test_the_same_bits_for_any_number_of_threads(isa, packed, rows, columns, monkeypatch):
    monkeypatch.setattr(native, "PRODUCTS", 1)
    x, weight, bias, _ = make(torch.bfloat16, rows, 96, columns)
    results = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            made = native.pack(weight, bias, packed, True)
            results.append(native.run(x, made, columns, packed, norm="layer", gate="silu"))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(x, results[0]) for x in results)


@pytest.mark.parametrize("packed", PACKED, ids=str)
def test_a_row_does_not_depend_on_the_others(isa, packed):
    x, weight, bias, _ = make(torch.float32, 300, 70, 50)
    made = native.pack(weight, bias, packed, False)
    whole = native.run(x, made, 50, packed, norm="rms")
    assert all(torch.equal(native.run(x[i : i + 1], made, 50, packed, norm="rms")[0], whole[i]) for i in (0, 144, 299))


@pytest.mark.parametrize("packed", PACKED, ids=str)
def test_strides(isa, packed):
    x, weight, bias, _ = make(torch.bfloat16, 6, 40, 33)
    made = native.pack(weight, bias, packed, False)
    expected = native.run(x.contiguous(), made, 33, packed)
    for other in (x, x.t().contiguous().t(), x.repeat_interleave(2, 1)[:, ::2]):
        assert torch.equal(native.run(other, made, 33, packed), expected)
    assert torch.equal(native.run(x[:1].expand(5, 40), made, 33, packed), expected[:1].expand(5, 33))
    assert torch.equal(native.run(x.unflatten(0, (2, 3)), made, 33, packed), expected.unflatten(0, (2, 3)))
    wide = x.new_zeros(6, 50)
    residual = wide[:, 7:40]
    assert torch.equal(native.run(x, made, 33, packed, residual=residual), expected)


@pytest.mark.parametrize("packed", PACKED, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_a_number_stays_in_its_row(isa, packed, bad):
    x, weight, bias, _ = make(torch.float32, 14, 70, 40)
    made = native.pack(weight, bias, packed, False)
    expected = native.run(x, made, 40, packed)
    x = x.clone()
    x[3, 5] = bad
    found = native.run(x, made, 40, packed)
    assert not found[3].isfinite().any()
    keep = torch.arange(14) != 3
    assert torch.equal(found[keep], expected[keep])


@pytest.mark.parametrize("packed", PACKED, ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-38, 1e30])
def test_small_and_large_rows_and_weights(isa, packed, size, judge):
    x, weight, bias, _ = make(torch.float32, 5, 32, 33)
    for scaled, other in ((x * size, weight), (x, weight * size)):
        made = native.pack(other, bias, packed, False)
        found = native.run(scaled, made, 33, packed)
        expected = scaled.double() @ other.double().t() + bias.double()
        assert (found - expected).abs().max() <= 0.02 * max(1.0, expected.abs().max().item())
        zeros = native.run(torch.zeros(3, 32), made, 33, packed, norm="layer")
        assert torch.equal(zeros, bias.expand(3, 33))


def test_sums_beyond_16_bits_are_exact(isa):
    inner = 50_000  # of 127 * 127: beyond 2^29, and with unsigned bytes beyond 2^30
    x, weight = torch.full((2, inner), 127.0), torch.full((3, inner), 127.0)
    x[1], weight[1] = -127.0, -127.0
    found = native.run(x, native.pack(weight, None, torch.int8, False), 3, torch.int8)
    assert torch.equal(found, (x.double() @ weight.double().t()).float())


def test_nothing_to_do(isa):
    weight = normal(6, 4).float()
    made = native.pack(weight, None, torch.float32, False)
    assert native.run(torch.empty(0, 4), made, 6, torch.float32).shape == (0, 6)
    none = native.pack(weight[:0], None, torch.float32, False)
    assert native.run(torch.zeros(3, 4), none, 0, torch.float32).shape == (3, 0)
    for packed in PACKED:
        bias = normal(6).float()
        made = native.pack(weight[:, :0], bias, packed, False)
        assert torch.equal(native.run(torch.zeros(3, 0), made, 6, packed), bias.expand(3, 6))


VALID_PACK = {
    "weight": 64, "dtype": "float32", "columns": 6, "inner": 4, "weight_strides": (4, 1), "bias": 0,
    "bias_dtype": "float32", "gated": False, "packed_dtype": "int8", "packed": 64, "packed_bytes": 256,
    "packed_bias": 0, "scales": 64, "sums": 64, "threads": 1,
}  # fmt: skip
VALID = {
    "x": 64, "dtype": "float32", "rows": 5, "inner": 4, "columns": 6, "x_stride": 4, "norm": 0, "eps": 1e-6,
    "weight": 64, "weight_dtype": "int8", "bias": 0, "scales": 64, "sums": 64, "gate": 0, "residual": 0,
    "residual_stride": 0, "out": 64, "out_stride": 6, "scratch": 64, "scratch_bytes": 10**9, "threads": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "uint8"}, "must be float types"),
        ({"packed_dtype": "float16"}, "packed_dtype is 'float16'; it must be float32, bfloat16 or int8"),
        ({"columns": -1}, "must not be negative"),
        ({"columns": 5, "gated": True}, "columns must be even"),
        ({"columns": 2**40, "inner": 2**40}, "exceeds"),
        ({"inner": 2**17 + 1}, "at most 131072"),
        ({"weight_strides": (2**60, 1)}, "64-bit"),
        ({"weight_strides": (-1, 1)}, "must not be negative"),
        ({"packed_bytes": 255}, "packed_bytes is less"),
        ({"bias": 64}, "packed_bias goes with a bias"),
        ({"scales": 0}, "scales and sums go with int8"),
        ({"weight": 0}, "must not be null"),
        ({"threads": 0}, "threads must be"),
    ],
)
def test_refused_arguments_of_pack(change, message):
    with pytest.raises(ValueError, match=message):
        _C.linear_pack_cpu(**(VALID_PACK | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float64"}, "dtype must be float32, bfloat16 or float16"),
        ({"weight_dtype": "uint8"}, "weight_dtype is 'uint8'"),
        ({"rows": -1}, "rows must not be negative"),
        ({"rows": 2**55}, "64-bit addresses"),
        ({"norm": 3}, "norm must be"),
        ({"gate": 3}, "gate must be"),
        ({"gate": 1, "columns": 5}, "columns must be even"),
        ({"eps": -1.0}, "eps must not be negative"),
        ({"eps": math.nan}, "eps must not be negative"),
        ({"x_stride": -4}, "strides must not be negative"),
        ({"x_stride": 2**60}, "64-bit addresses"),
        ({"out_stride": 5}, "out_stride must be at least"),
        ({"inner": 2**17 + 1}, "at most 131072"),
        ({"x": 0}, "x and weight must not be null"),
        ({"out": 0}, "out and scratch must not be null"),
        ({"sums": 0}, "scales and sums go with int8"),
        ({"weight_dtype": "float32"}, "scales and sums go with int8"),
        ({"scratch_bytes": 1000}, "scratch_bytes is less"),
        ({"threads": 10**6}, "threads must be"),
    ],
)
def test_refused_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        _C.packed_linear_cpu(**(VALID | change))


POINTER, INT64 = ctypes.c_void_p, ctypes.c_int64


class Product(ctypes.Structure):
    """PackedLinear of csrc/common/packed_linear.h."""

    _fields_ = [
        ("x", POINTER), ("dtype", ctypes.c_int), ("rows", INT64), ("inner", INT64), ("columns", INT64),
        ("x_stride", INT64), ("norm", INT64), ("eps", ctypes.c_double), ("weight", POINTER),
        ("weight_dtype", ctypes.c_int), ("bias", POINTER), ("scales", POINTER), ("sums", POINTER), ("gate", INT64),
        ("residual", POINTER), ("residual_stride", INT64), ("out", POINTER), ("out_stride", INT64),
        ("scratch", POINTER), ("scratch_bytes", INT64), ("threads", INT64),
    ]  # fmt: skip


EMULATED = """
#include "common/packed_linear.h"
namespace vitok::avx512 {
void packed_linear(const PackedLinear&);
}
extern "C" void packed_linear(const vitok::PackedLinear* a) { vitok::avx512::packed_linear(*a); }
"""


@pytest.fixture(scope="module")
def emulated_library(compile_emulating):
    return compile_emulating(EMULATED, [CSRC / "cpu" / "packed_linear.cpp"])


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("packed", [torch.bfloat16, torch.int8], ids=str)
def test_emulated(emulated_library, monkeypatch, packed, case, judge):
    """bf16 products of pairs, and of tiles as those of integers."""
    numbers = {"dtype": {"bfloat16": 2}, "weight_dtype": {"bfloat16": 1, "int8": 2}}
    run = _native.run

    def call(kernel, like, *values):
        if kernel != "packed_linear":
            return run(kernel, like, *values)
        arguments = Product()
        for (field, kind), value in zip(Product._fields_, values, strict=True):
            setattr(arguments, field, kind(numbers[field][value] if isinstance(value, str) else value))
        emulated_library.packed_linear(ctypes.byref(arguments))

    monkeypatch.setattr(_native, "run", call)
    compare(judge, "avx512_bf16", torch.bfloat16, packed, *case)
