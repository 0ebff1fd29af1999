"""The native CPU attention against a formula in float64: every instruction set, dtype, width, length and mask."""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitok import _native
from vitok.ops import attention, qk_norm_rope

_C = _native.library()
if _C is None:
    pytest.skip(f"no native library: {_native.reason()}", allow_module_level=True)

from vitok.ops import _attention_native as native  # noqa: E402

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CSRC = Path(__file__).parents[2] / "csrc"
BAND = 4096  # bytes before and behind everything that the kernels are given to write


def guarded(size: int) -> tuple[Tensor, Tensor]:
    """`size` bytes of which every float is NaN, and the whole memory with a band on both sides."""
    memory = torch.full((size + 2 * BAND,), 255, dtype=torch.uint8)
    return memory[BAND : BAND + size], memory


@pytest.fixture(autouse=True)
def _guarded_memory(_poisoned_memory, monkeypatch):
    """Outputs and scratch are full of NaN and lie between bands that nobody may touch."""
    made = []

    def new_empty(like, size, *, dtype=None, **_):
        dtype = dtype or like.dtype
        inside, memory = guarded(math.prod(size) * dtype.itemsize)
        made.append(memory)
        return inside.view(dtype).view(size)

    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    yield
    for memory in made:
        assert (memory[:BAND] == 255).all() and (memory[-BAND:] == 255).all()


def make(batch, length, heads, width, dtype, *, norm=True, rope=True, seed=0):
    """qkv, q_weight, k_weight, table."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    qkv = normal(batch, length, 3, heads, width).to(dtype)
    weights = [(1 + 0.3 * normal(width)).float().to(dtype) if norm else None for _ in range(2)]
    angles = 6 * normal(length, width // 2).float()
    return qkv, *weights, torch.stack((angles.cos(), angles.sin())) if rope else None


def visible(length, window=-1, causal_block=0, cu_seqlens=None):
    """Which keys each query sees, [L, L], one pair at a time in words of the definition."""
    ends = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    sees = torch.zeros(length, length, dtype=torch.bool)
    for begin, end in itertools.pairwise(ends):
        i, j = torch.arange(end - begin)[:, None], torch.arange(end - begin)[None]
        inside = torch.ones(end - begin, end - begin, dtype=torch.bool)
        if window >= 0:
            inside &= (i - j).abs() <= window
        if causal_block:
            inside &= j < (i // causal_block + 1) * causal_block
        sees[begin:end, begin:end] = inside
    return sees


def formula(qkv, q_weight, k_weight, table, eps=1e-6, narrow=None, **masks):
    """Out and lse of whole matrices in the dtype of qkv; `narrow` rounds q and k after norm and rotation."""
    if q_weight is not None or table is not None:
        qkv = qk_norm_rope(qkv, q_weight, k_weight, table, eps=eps, impl="reference")
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = (q @ k.mT) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~visible(qkv.shape[1], **masks), -math.inf)
    wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    out = scores.softmax(-1, dtype=wide).to(v.dtype) @ v
    return out.transpose(1, 2), scores.to(wide).logsumexp(-1)


def run(qkv, q_weight, k_weight, table, grad=None, *, eps=1e-6, window=-1, causal_block=0, cu_seqlens=None):
    """out, lse and, for an incoming gradient, dqkv, dq_weight, dk_weight."""
    masks = (cu_seqlens, eps, window, causal_block)
    out, lse = native.forward(qkv, q_weight, k_weight, table, *masks)
    if grad is None:
        return out, lse
    return out, lse, *native.backward(grad, out, lse, qkv, q_weight, k_weight, table, *masks)


def compare(judge, inputs, grad, **masks):
    """Output and gradients of the kernel as near to the formula in float64 as the formula in the dtype is."""
    qkv, q_weight, _, table = inputs
    ours = run(*inputs, grad, **masks)
    results = []
    for dtype in (qkv.dtype, torch.float64):
        leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs[:3]]
        wide_table = table.double() if table is not None and dtype == torch.float64 else table
        out, lse = formula(*leaves, wide_table, **masks)
        grads = torch.autograd.grad(out, [x for x in leaves if x is not None], grad.to(dtype))
        results.append([out.detach(), *grads])
        oracle_lse = lse.detach()
    used = [x for x in (ours[0], *ours[2:]) if x.numel()]
    for actual, baseline, oracle in zip(used, *results, strict=True):
        if qkv.dtype == torch.float64:  # the baseline is the oracle
            torch.testing.assert_close(actual, oracle, rtol=1e-12, atol=1e-12)
        else:
            judge(actual, baseline, oracle)
    tolerance = 1e-9 if qkv.dtype == torch.float64 else 1e-5
    if qkv.dtype in (torch.float64, torch.float32) or (q_weight is None and table is None):
        torch.testing.assert_close(ours[1].double(), oracle_lse, rtol=tolerance, atol=tolerance)


def some_grad(inputs, seed=9):
    b, length, _, heads, width = inputs[0].shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((b, length, heads, width), dtype=torch.float64, generator=generator).to(inputs[0].dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("length", "width"),
    [(1, 64), (5, 8), (63, 64), (64, 72), (65, 96), (130, 80), (130, 128), (300, 64), (70, 256), (40, 16), (33, 24)],
)
def test_lengths_and_widths(isa, usable_isas, dtype, length, width, judge):
    if dtype == torch.float64 and isa != usable_isas[-1]:
        pytest.skip("one scalar path serves every level")
    inputs = make(2, length, 2, width, dtype, seed=length)
    compare(judge, inputs, some_grad(inputs))


MASKS = {
    "self": {"window": 0},
    "window": {"window": 7},
    "wide_window": {"window": 150},
    "huge_window": {"window": 2**30},
    "causal": {"causal_block": 1},
    "frames": {"causal_block": 64},
    "odd_frames": {"causal_block": 49},
    "huge_frames": {"causal_block": 2**30},
    "window_causal": {"window": 40, "causal_block": 1},
    "window_frames": {"window": 100, "causal_block": 30},
    "segments": {"cu_seqlens": torch.tensor([0, 1, 65, 65, 200, 420])},
    "segments_window_frames": {"cu_seqlens": torch.tensor([0, 97, 300, 420]), "window": 33, "causal_block": 10},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("dtype", "fused"), [(torch.float32, True), (torch.bfloat16, False)], ids=str)
def test_masks(isa, mask, dtype, fused, judge):
    inputs = make(1, 420, 2, 40, dtype, norm=fused, rope=fused)
    compare(judge, inputs, some_grad(inputs), **MASKS[mask])


@pytest.mark.parametrize("mask", MASKS)
def test_masks_in_float64(mask, judge):
    inputs = make(1, 420, 1, 6, torch.float64)
    compare(judge, inputs, some_grad(inputs), **MASKS[mask])


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 230),
    heads=st.integers(1, 3),
    width=st.sampled_from([8, 24, 64, 72, 136]),
    window=st.integers(-1, 60),
    causal_block=st.integers(0, 70),
    cuts=st.none() | st.lists(st.integers(0, 230), max_size=4),
    seed=st.integers(0, 99),
)
def test_random_shapes_and_masks(length, heads, width, window, causal_block, cuts, seed):
    inputs = make(1, length, heads, width, torch.float32, seed=seed)
    ends = None if cuts is None else torch.tensor([0, *sorted(min(c, length) for c in cuts), length])
    masks = {"window": window, "causal_block": causal_block, "cu_seqlens": ends}
    out, lse = run(*inputs, **masks)
    expected = formula(*(x.double() for x in inputs), **masks)
    torch.testing.assert_close(out.double(), expected[0], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("ends", [[0, 9, 9, 20], [-7, 30, 4, 12, 99], [5, 9], [30, 40], [20, 0], [-9, -3], [2**62, 1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_segment_ends_that_make_no_sense_touch_nothing_outside(ends, dtype):
    """Ends are clamped to the sequence and to the end before; a token of no segment gives and gets nothing."""
    inputs = make(1, 20, 2, 16, dtype)
    ours = run(*inputs, some_grad(inputs), cu_seqlens=torch.tensor(ends))
    low, sees = 0, torch.zeros(20, dtype=torch.bool)
    bounds = []
    for end in ends:
        low = max(low, min(max(end, 0), 20))
        bounds.append(low)
    sees[bounds[0] : bounds[-1]] = True
    assert not any(x.isnan().any() for x in ours)
    assert not ours[0][0, ~sees].any() and not ours[2][0, ~sees].any()
    if sees.any():
        expected = formula(*(x.double() for x in inputs), cu_seqlens=torch.tensor(bounds))[0]
        torch.testing.assert_close(ours[0][0, sees].double(), expected[0, sees], rtol=1e-5, atol=1e-5)


LAYOUTS = {
    "heads_first": lambda x: x.permute(0, 3, 2, 1, 4).contiguous().permute(0, 3, 2, 1, 4),
    "three_first": lambda x: x.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4),
    "wider": lambda x: torch.nn.functional.pad(x, (3, 5), value=math.nan)[..., 3:-5],
    "every_second_token": lambda x: torch.stack((x, x * math.nan), 2).flatten(1, 2)[:, ::2],
    "one_head_for_all": lambda x: x[:, :, :, :1].expand_as(x),
    "turned": lambda x: x.mT.contiguous().mT,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_strides(isa, layout, dtype):
    inputs = make(2, 37, 3, 24, dtype)
    grad = some_grad(inputs)
    strided = LAYOUTS[layout](inputs[0])
    strided_grad = LAYOUTS[layout](grad[:, :, None].expand(-1, -1, 3, -1, -1))[:, :, 1]
    expected = run(strided.contiguous(), *inputs[1:], strided_grad.contiguous())
    kept = strided.clone(), strided_grad.clone()
    for actual, wanted in zip(run(strided, *inputs[1:], strided_grad), expected, strict=True):
        assert torch.equal(actual, wanted) and actual.is_contiguous()
    assert torch.equal(strided, kept[0]) and torch.equal(strided_grad, kept[1])


def test_expanded_gradient(isa):
    inputs = make(1, 20, 2, 64, torch.float32)
    ones = torch.ones(()).expand(1, 20, 2, 64)
    for actual, wanted in zip(run(*inputs, ones), run(*inputs, ones.contiguous()), strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("weight", [torch.float32, torch.float64])
def test_weights_of_another_dtype(isa, weight, judge):
    qkv, q_weight, k_weight, table = make(1, 50, 2, 64, torch.bfloat16)
    grad = some_grad((qkv,))
    same = run(qkv, q_weight.float(), k_weight.float(), table, grad)
    mixed = run(qkv, q_weight.to(weight), k_weight, table, grad)
    assert mixed[3].dtype == weight and mixed[4].dtype == torch.bfloat16 and mixed[0].dtype == torch.bfloat16
    for actual, wanted in zip(mixed, same, strict=True):
        torch.testing.assert_close(actual.float(), wanted.float(), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("mask", ["huge_window", "frames", "segments"])
@pytest.mark.parametrize("heads", [1, 3])
def test_the_same_bits_for_any_number_of_threads(isa, heads, mask):
    """Whole heads to a thread or blocks of one head to many, ten times over."""
    inputs = make(1, 420, heads, 32, torch.bfloat16)
    grad, threads, first = some_grad(inputs), torch.get_num_threads(), None
    try:
        for count in (1, 2, 3, 5, 1, 2, 4, 2, 7, 2):
            torch.set_num_threads(count)
            made = run(*inputs, grad, **MASKS[mask])
            first = first or made
            assert all(torch.equal(a, b) for a, b in zip(made, first, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_a_sample_does_not_depend_on_its_batch(isa):
    inputs = make(3, 70, 2, 64, torch.float32)
    whole, alone = run(*inputs)[0], run(inputs[0][1:2], *inputs[1:])[0]
    assert torch.equal(whole[1:2], alone)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("masks", [{}, {"window": 3, "causal_block": 2}, {"cu_seqlens": torch.tensor([0, 3, 9])}])
def test_gradcheck(fused, masks):
    qkv, q_weight, k_weight, table = make(1, 9, 2, 6, torch.float64, norm=fused, rope=fused)
    leaves = [x.requires_grad_() for x in (qkv, q_weight, k_weight) if x is not None]

    def out(qkv, q_weight=None, k_weight=None):
        names = {"window": masks.get("window"), "causal_block": masks.get("causal_block")}
        return attention(qkv, q_weight, k_weight, table, **names, cu_seqlens=masks.get("cu_seqlens"), impl="native")

    assert torch.autograd.gradcheck(out, leaves)


def test_a_query_with_one_key_gives_no_gradient_to_either(isa):
    inputs = make(1, 100, 2, 40, torch.bfloat16)
    dqkv = run(*inputs, some_grad(inputs), window=0)[2]
    assert not dqkv[:, :, :2].any() and torch.equal(dqkv[:, :, 2], some_grad(inputs))


def test_large_and_equal_scores(isa):
    """Scores far apart: the running maximum moves by more than fp32 holds as a power; all equal: the mean of v."""
    qkv = make(1, 500, 1, 64, torch.float32, norm=False, rope=False)[0]
    qkv[:, :, :2] *= 30
    out = run(qkv, None, None, None)[0]
    torch.testing.assert_close(out.double(), formula(qkv.double(), None, None, None)[0], rtol=1e-3, atol=1e-3)
    qkv[:, :, 0] = 0
    out = run(qkv, None, None, None)[0]
    torch.testing.assert_close(out, qkv[:, :, 2].mean(1, keepdim=True).expand_as(out), rtol=1e-5, atol=1e-6)


def test_not_a_number_stays_in_its_row_and_column(isa):
    qkv = make(1, 100, 1, 64, torch.float32, norm=False, rope=False)[0]
    qkv[0, 7, 0, 0, 3] = math.nan  # a query
    assert run(qkv, None, None, None)[0].isnan().all(-1).flatten().nonzero().flatten().tolist() == [7]
    qkv[0, 7, 0, 0, 3] = 0
    qkv[0, 50, 2, 0, 9] = math.nan  # an element of a value
    nan = run(qkv, None, None, None)[0].isnan()
    assert nan[..., 9].all() and nan.sum() == 100
    qkv[0, 50, 1, 0, 9] = math.nan  # a key
    assert run(qkv, None, None, None)[0].isnan().all()


def test_nothing_to_do():
    for shape in [(0, 5, 3, 2, 16), (2, 0, 3, 2, 16)]:
        qkv = torch.zeros(shape)
        weight = torch.ones(16)
        made = run(qkv, weight, weight, None, torch.zeros(shape[0], shape[1], 2, 16))
        assert made[0].shape == (*shape[:2], 2, 16) and made[1].shape == (shape[0], 2, shape[1])
        assert made[2].shape == shape and not made[3].any() and not made[4].any()


def test_offsets_past_int32(isa):
    """Tokens 2^28 elements apart: address space only, of which a few pages are ever touched."""
    stride = 2**28
    try:
        memory = torch.frombuffer(mmap.mmap(-1, (11 * stride + 512) * 2), dtype=torch.bfloat16)
    except OSError as error:
        pytest.skip(f"the system gives no such address space: {error}")
    inputs = make(1, 12, 2, 64, torch.bfloat16)
    far = memory.as_strided((1, 12, 3, 2, 64), (0, stride, 128, 64, 1))
    far.copy_(inputs[0])
    grad = some_grad(inputs)
    far_grad = far[:, :, 2]
    expected = run(inputs[0], *inputs[1:], inputs[0][:, :, 2].contiguous())
    assert all(torch.equal(a, b) for a, b in zip(run(far, *inputs[1:], far_grad), expected, strict=True))
    assert grad.shape == far_grad.shape


VALID = {
    "qkv": 64, "dtype": "float32", "sizes": (1, 4, 2, 16), "strides": (384, 96, 32, 16), "q_weight": 0, "k_weight": 0,
    "weight_dtype": "float32", "table": 0, "eps": 1e-6, "window": -1, "causal_block": 0, "cu_seqlens": 0,
    "segments": 0, "lse": 64, "scratch": 64, "scratch_bytes": 10**9, "slots": 1,
}  # fmt: skip
VALID_FORWARD = VALID | {"out": 64}
VALID_BACKWARD = VALID | {
    "out": 64, "grad": 64, "grad_strides": (128, 32, 16), "dqkv": 64, "dq_weight": 0, "dk_weight": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "uint8"}, "must be float types"),
        ({"weight_dtype": "uint8"}, "must be float types"),
        ({"sizes": (-1, 4, 2, 16)}, "sizes must be"),
        ({"sizes": (1, 4, 0, 16)}, "sizes must be"),
        ({"sizes": (1, 2**60, 2, 16)}, "at most 2^48"),
        ({"sizes": (1, 4, 2, 12)}, "multiple of 8 up to 256"),
        ({"sizes": (1, 4, 2, 264)}, "multiple of 8 up to 256"),
        ({"strides": (384, -96, 32, 16)}, "strides must not be negative"),
        ({"strides": (384, 2**62, 32, 16)}, "64-bit offsets"),
        ({"sizes": (2**40, 2**40, 2, 16)}, "64-bit offsets"),
        ({"q_weight": 64}, "q_weight and k_weight must both"),
        ({"dtype": "float64", "sizes": (1, 4, 2, 15), "table": 64}, "D must be even"),
        ({"window": -2}, "window must be at least -1"),
        ({"causal_block": -1}, "causal_block must not be negative"),
        ({"sizes": (2, 4, 2, 16), "cu_seqlens": 64, "segments": 1}, "B must be 1"),
        ({"cu_seqlens": 64, "segments": -1}, "segments must not be negative"),
        ({"slots": 0}, "slots must be at least 1"),
        ({"slots": 2**62}, "64-bit offsets"),
        ({"qkv": 0}, "qkv and scratch must not be null"),
        ({"scratch": 0}, "qkv and scratch must not be null"),
        ({"scratch_bytes": 1000}, "scratch_bytes is less"),
        ({"out": 0}, "must not be null"),
    ],
)
def test_refused_arguments(change, message):
    for kernel, valid in ((_C.attention_forward_cpu, VALID_FORWARD), (_C.attention_backward_cpu, VALID_BACKWARD)):
        with pytest.raises(ValueError, match=message.replace("^", r"\^")):
            kernel(**(valid | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_strides": (128, -32, 16)}, "grad_strides must not be negative"),
        ({"grad_strides": (2**62, 2**62, 16)}, "64-bit offsets"),
        ({"q_weight": 64, "k_weight": 64}, "dq_weight and dk_weight must be given where the weights are"),
        ({"lse": 0}, "out, grad, dqkv and lse must not be null"),
    ],
)
def test_refused_arguments_of_the_backward(change, message):
    with pytest.raises(ValueError, match=message):
        _C.attention_backward_cpu(**(VALID_BACKWARD | change))


@pytest.mark.parametrize("width", [12, 264])
def test_refuses_says_why(width, one_sentence):
    with pytest.raises(ValueError) as error:
        attention(torch.zeros(1, 2, 3, 1, width), impl="native")
    one_sentence(error.value, f"head_dim must be a multiple of 8 up to 256, got {width}")


def test_scratch_is_linear_in_the_length(monkeypatch):
    sizes = []
    scratch = native._scratch
    monkeypatch.setattr(native, "_scratch", lambda *args: sizes.append(scratch(*args).numel()) or scratch(*args))
    for length in (768, 1536):
        inputs = make(1, length, 1, 16, torch.float32)
        run(*inputs, some_grad(inputs))
    assert sizes[2] <= 2 * sizes[0] and sizes[3] <= 2 * sizes[1]


INPUTS = [
    ("qkv", ctypes.c_void_p), ("dtype", ctypes.c_int), ("sizes", ctypes.c_int64 * 4), ("strides", ctypes.c_int64 * 4),
    ("q_weight", ctypes.c_void_p), ("k_weight", ctypes.c_void_p), ("weight_dtype", ctypes.c_int),
    ("table", ctypes.c_void_p), ("eps", ctypes.c_double), ("window", ctypes.c_int64), ("causal_block", ctypes.c_int64),
    ("cu_seqlens", ctypes.c_void_p), ("segments", ctypes.c_int64), ("lse", ctypes.c_void_p),
    ("scratch", ctypes.c_void_p), ("scratch_bytes", ctypes.c_int64), ("slots", ctypes.c_int64),
]  # fmt: skip


class Forward(ctypes.Structure):
    """AttentionForward of csrc/common/attention.h."""

    _fields_ = [*INPUTS, ("out", ctypes.c_void_p)]


class Backward(ctypes.Structure):
    """AttentionBackward of csrc/common/attention.h."""

    _fields_ = [
        *INPUTS, ("out", ctypes.c_void_p), ("grad", ctypes.c_void_p), ("grad_strides", ctypes.c_int64 * 3),
        ("dqkv", ctypes.c_void_p), ("dq_weight", ctypes.c_void_p), ("dk_weight", ctypes.c_void_p),
    ]  # fmt: skip


EMULATED = """
#include "common/attention.h"
namespace vitok::avx512 {
void attention_forward(const AttentionForward&);
void attention_backward(const AttentionBackward&);
}
extern "C" void attention_forward(const vitok::AttentionForward* g) { vitok::avx512::attention_forward(*g); }
extern "C" void attention_backward(const vitok::AttentionBackward* g) { vitok::avx512::attention_backward(*g); }
"""


@pytest.fixture(scope="module")
def emulated_library(compile_emulating):
    return compile_emulating(EMULATED, sorted(CSRC.glob("cpu/attention_*.cpp")))


@pytest.fixture
def emulated(emulated_library, monkeypatch):
    """`run` calls the kernels with bf16 dot products emulated, those of the forward by tiles too."""
    dtypes = {"float16": 1, "bfloat16": 2, "float32": 3, "float64": 4}

    def call(name, like, *values):
        arguments = {"attention_forward": Forward, "attention_backward": Backward}[name]()
        for (field, kind), value in zip(arguments._fields_, values, strict=True):
            value = dtypes[value] if isinstance(value, str) else value
            setattr(arguments, field, kind(*value) if isinstance(value, tuple) else value)
        getattr(emulated_library, name)(ctypes.byref(arguments))

    monkeypatch.setattr(_native, "run", call)


@pytest.mark.long
@pytest.mark.parametrize("mask", [None, *MASKS])
@pytest.mark.parametrize(("length", "width"), [(1, 64), (5, 8), (65, 72), (130, 128), (420, 64), (420, 40), (70, 256)])
def test_emulated(emulated, length, width, mask, judge):
    masks = MASKS[mask] if mask else {}
    if "cu_seqlens" in masks and length < 420:
        masks = {"cu_seqlens": masks["cu_seqlens"].clamp(max=length)}
    for fused in (False, True):
        inputs = make(1, length, 2, width, torch.bfloat16, norm=fused, rope=fused)
        compare(judge, inputs, some_grad(inputs), **masks)


@pytest.mark.long
def test_a_query_with_one_key_gives_no_gradient_to_either_emulated(emulated):
    inputs = make(1, 101, 2, 40, torch.bfloat16)
    dqkv = run(*inputs, some_grad(inputs), window=0)[2]
    assert not dqkv[:, :, :2].any() and torch.equal(dqkv[:, :, 2], some_grad(inputs))
