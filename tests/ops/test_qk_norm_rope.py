"""qk_norm_rope against rotation by hand, and the properties that make it a position."""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitok import InputError, _native
from vitok.ops import qk_norm_rope
from vitok.ops._registry import ImplementationError
from vitok.positions import coordinates, rope_table

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
NATIVE = _native.library()
needs_native = pytest.mark.skipif(NATIVE is None, reason=f"no native library: {_native.reason()}")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def formula(qkv, q_weight, k_weight, table, eps):
    """Pair by pair, with complex numbers: channel i is the real part, channel i + d/2 the imaginary one."""
    out = qkv.clone()
    half = qkv.shape[-1] // 2
    for which, weight in enumerate((q_weight, k_weight)):
        x = qkv[:, :, which]
        if weight is not None:
            x = x / (x**2).mean(-1, keepdim=True).add(eps).sqrt() * weight
        if table is not None:
            rotation = torch.complex(*table.to(qkv.dtype))[None, :, None]
            turned = torch.complex(x[..., :half].contiguous(), x[..., half:].contiguous()) * rotation
            x = torch.cat((turned.real, turned.imag), -1)
        out[:, :, which] = x
    return out


def table_of(grid, head_dim, kind="3d", offset=(0, 0, 0)):
    return rope_table(coordinates(grid) + torch.tensor(offset), grid, head_dim, kind, 10000.0)


@pytest.mark.parametrize("head_dim", [16, 64, 72, 128])
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_formula(head_dim, rotate, normalise):
    qkv = torch.randn(2, 12, 3, 2, head_dim, dtype=torch.float64)
    weights = [torch.randn(head_dim, dtype=torch.float64) for _ in range(2)] if normalise else [None, None]
    table = table_of((1, 3, 4), head_dim) if rotate else None
    actual = qk_norm_rope(qkv, *weights, table, eps=1e-6)
    torch.testing.assert_close(actual, formula(qkv, *weights, table, 1e-6), rtol=1e-12, atol=1e-12)
    assert torch.equal(actual[:, :, 2], qkv[:, :, 2]), "v passes through"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types_compute_wide(dtype):
    qkv = torch.randn(2, 12, 3, 2, 64).to(dtype)
    weights = [torch.randn(64).to(dtype) for _ in range(2)]
    table = table_of((1, 3, 4), 64)
    oracle = formula(qkv.double(), *[w.double() for w in weights], table, 1e-6)
    actual = qk_norm_rope(qkv, *weights, table)
    assert actual.dtype == dtype
    # one rounding at the end and a few in float32: half a unit in the last place of each value, and a little
    spacing = torch.finfo(dtype).eps * oracle.abs().clamp(min=1e-2)
    assert ((actual.double() - oracle).abs() <= 0.5 * spacing + 4e-6).all()


def test_gradients():
    qkv = torch.randn(1, 4, 3, 2, 16, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(16, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    table = table_of((1, 2, 2), 16)
    assert torch.autograd.gradcheck(lambda x, q, k: qk_norm_rope(x, q, k, table), (qkv, *weights))


def one_hot(channel, head_dim):
    return torch.eye(head_dim, dtype=torch.float64)[channel].view(1, 1, 1, 1, -1).expand(1, 12, 3, 1, -1)


@pytest.mark.parametrize("head_dim", [64, 72])
def test_pairs_are_halves_apart(head_dim):
    table = table_of((2, 2, 3), head_dim)
    for channel in range(head_dim // 2):
        q = qk_norm_rope(one_hot(channel, head_dim), table=table)[0, -1, 0, 0]
        touched = set(q.nonzero().flatten().tolist())
        assert touched <= {channel, channel + head_dim // 2}
        torch.testing.assert_close(q[channel + head_dim // 2], table[1, -1, channel].double())


seeds, steps = st.integers(0, 2**32), st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))


def random_qkv(seed, tokens, head_dim=64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, tokens, 3, 2, head_dim, dtype=torch.float64, generator=generator)


@settings(max_examples=20, deadline=None)
@given(seeds, steps, st.sampled_from(["3d", "2d", "1d"]))
def test_keeps_norms_and_is_undone_by_minus_x(seed, offset, kind):
    qkv = random_qkv(seed, 12)
    table = table_of((1, 3, 4), 64, kind, offset)
    turned = qk_norm_rope(qkv, table=table)
    torch.testing.assert_close(turned.norm(dim=-1), qkv.norm(dim=-1), rtol=3e-7, atol=0)
    back = qk_norm_rope(turned, table=torch.stack((table[0], -table[1])))
    torch.testing.assert_close(back, qkv, rtol=0, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seeds, steps, st.sampled_from(["3d", "2d", "1d"]))
def test_scores_depend_on_relative_position_only(seed, offset, kind):
    def scores(shift):
        q, k, _ = qk_norm_rope(random_qkv(seed, 12), table=table_of((1, 3, 4), 64, kind, shift)).unbind(2)
        return torch.einsum("bihd,bjhd->bhij", q, k)

    # float32 angles of positions up to some hundreds are good to about 1e-5
    torch.testing.assert_close(scores(offset), scores((0, 0, 0)), rtol=0, atol=5e-3 if kind == "1d" else 5e-4)
    if kind == "3d":
        assert (scores((0, 0, 0)) - scores((0, 0, 0)).transpose(2, 3)).abs().max() > 0.1


def interleaved(x, angles):
    """The other convention: channels 2i and 2i + 1 are rotated by angle i; x [..., L, d], angles [L, d/2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


@pytest.mark.parametrize("head_dim", [64, 72])
def test_1d_equals_interleaved_pairs_after_permuting_channels(head_dim):
    """theta^(-2i / head_dim) times the flattened index, as author-v1 has it."""
    grid = (2, 3, 5)
    x = torch.randn(30, head_dim, dtype=torch.float64)
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    expected = interleaved(x, torch.arange(30).double()[:, None] * frequencies)
    order = torch.cat((torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)))
    qkv = x[:, order].view(1, 30, 1, 1, head_dim).expand(1, 30, 3, 1, head_dim)
    actual = qk_norm_rope(qkv, table=table_of(grid, head_dim, "1d"))[0, :, 0, 0]
    torch.testing.assert_close(actual, expected[:, order], rtol=0, atol=2e-5)


def test_2d_equals_interleaved_halves_after_permuting_channels():
    """First half of the head by row, second by column, theta^(-2i / (head_dim / 2)), as the v2 weights have it."""
    grid, d = (1, 4, 5), 64
    x = torch.randn(20, d, dtype=torch.float64)
    frequencies = 10000.0 ** (-torch.arange(0, d // 2, 2, dtype=torch.float64) / (d // 2))
    row, column = torch.arange(20) // 5, torch.arange(20) % 5
    expected = torch.cat(
        [
            interleaved(half, at.double()[:, None] * frequencies)
            for half, at in zip(x.chunk(2, -1), (row, column), strict=True)
        ],
        -1,
    )
    order = torch.cat((torch.arange(0, d, 2), torch.arange(1, d, 2)))
    qkv = x[:, order].view(1, 20, 1, 1, d).expand(1, 20, 3, 1, d)
    actual = qk_norm_rope(qkv, table=table_of(grid, d, "2d"))[0, :, 0, 0]
    torch.testing.assert_close(actual, expected[:, order], rtol=0, atol=2e-6)


def random_table(length, head_dim):
    angles = torch.randn(length, head_dim // 2)
    return torch.stack((angles.cos(), angles.sin()))


def run(impl, qkv, weights, table, grad, eps=1e-6, layout=lambda x: x):
    """Output and gradients of qkv and the weights; `layout` gives qkv the strides under test."""
    qkv = qkv.detach().clone().requires_grad_()
    weights = [w if w is None else w.detach().clone().requires_grad_() for w in weights]
    out = qk_norm_rope(layout(qkv), *weights, table, eps=eps, impl=impl)
    out.backward(grad)
    return [out.detach(), qkv.grad, *[w.grad for w in weights if w is not None]]


def wide(x):
    return x if x is None else x.double()


def agrees(judge, impl, qkv, weights, table, grad=None, layout=lambda x: x, eps=1e-6):
    """Output and every gradient of `impl` as near to float64 as the eager composition is."""
    if grad is None:
        grad = torch.randn(layout(qkv).shape, device=qkv.device).to(qkv.dtype)
    actual = run(impl, qkv, weights, table, grad, eps, layout)
    baseline = run("reference", qkv, weights, table, grad, eps, layout)
    oracle = run("reference", wide(qkv), [wide(w) for w in weights], table, grad.double(), eps, layout)
    for ours, theirs, exact in zip(actual, baseline, oracle, strict=True):
        if exact.numel():
            judge(ours, theirs, exact)
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert actual[0].is_contiguous()
    part = layout(qkv)[:, :, 2]
    assert torch.equal(actual[0][:, :, 2], part), "v passes through bit for bit"
    return actual


def random_case(dtype, batch, length, heads, head_dim, norms, rotates, weight_dtype=None, device="cpu"):
    qkv = torch.randn(batch, length, 3, heads, head_dim, device=device).to(dtype)
    weights = [None, None]
    if norms:
        weights = [(1 + torch.randn(head_dim, device=device) / 2).to(weight_dtype or dtype) for _ in range(2)]
    return qkv, weights, random_table(length, head_dim).to(device) if rotates else None


NATIVE_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SWITCHES = [(True, True), (False, True), (True, False), (False, False)]


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize(("norms", "rotates"), SWITCHES)
def test_native_at_every_level(isa, dtype, norms, rotates, judge):
    # Halves below, at and above a vector of 4, 8 and 16 lanes, the head_dims in use, and 72 with its rest of 4.
    for head_dim in (2, 6, 8, 10, 16, 24, 30, 32, 34, 64, 72, 80, 96, 128, 1024):
        agrees(judge, "native", *random_case(dtype, 2, 5, 2, head_dim, norms, rotates))


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_native_norm_of_any_width(isa, dtype, judge):
    for head_dim in (1, 3, 7, 15, 17, 33, 75):
        agrees(judge, "native", *random_case(dtype, 1, 3, 2, head_dim, True, False))


# Tokens around the 16 of a work item and of a partial sum; 12 heads of 64 are enough to go parallel.
@needs_native
@pytest.mark.parametrize("tokens", [(1, 1), (1, 15), (3, 11), (2, 16), (1, 65), (5, 13)])
def test_native_around_its_blocks(tokens, judge):
    for dtype, weight_dtype in itertools.product((torch.bfloat16, torch.float32), repeat=2):
        agrees(judge, "native", *random_case(dtype, *tokens, 12, 64, True, True, weight_dtype))


@needs_native
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_native_takes_weights_of_another_dtype(weight_dtype):
    qkv, weights, table = random_case(torch.bfloat16, 2, 5, 2, 64, True, True, weight_dtype)
    grad = torch.randn_like(qkv)
    for ours, theirs in zip(*(run(i, qkv, weights, table, grad) for i in ("native", "reference")), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("norms", "rotates"), SWITCHES)
def test_triton(dtype, norms, rotates, judge):
    for head_dim in (64, 72) if norms else (72,):
        agrees(judge, "triton", *random_case(dtype, 2, 3, 2, head_dim, norms, rotates, torch.float32))


# Rows one below, at and above a tile: 1024 / 64 = 16 rows backward, 2048 / 64 = 32 rows forward for head_dim 128.
@needs_triton
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 31, 32, 33])
def test_triton_around_its_tiles(rows, judge):
    agrees(judge, "triton", *random_case(torch.float32, 1, rows, 1, 128, True, True))


@needs_triton
@pytest.mark.parametrize("head_dim", [1, 2, 7, 50, 80, 96])
def test_triton_other_widths(head_dim, judge):
    agrees(judge, "triton", *random_case(torch.float32, 1, 3, 2, head_dim, True, head_dim % 2 == 0))


@needs_triton
@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU: the interpreter's bfloat16 is wrong")
def test_triton_bfloat16(judge):
    for head_dim in (64, 72, 80, 96, 128):
        agrees(judge, "triton", *random_case(torch.bfloat16, 2, 77, 5, head_dim, True, True, torch.float32, "cuda"))


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")
@needs_native
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_native_cuda(dtype, judge):
    for head_dim, (norms, rotates) in itertools.product((1, 7, 24, 50, 64, 72, 80, 96, 128, 256, 264, 1024), SWITCHES):
        case = random_case(dtype, 2, 77, 5, head_dim, norms, rotates and head_dim % 2 == 0, torch.float32, "cuda")
        agrees(judge, "native", *case)


LAYOUTS = {
    "heads_first": lambda x: x.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4),
    "window": lambda x: torch.nn.functional.pad(x, (3, 5, 1, 0, 0, 0, 2, 1))[:, 2:-1, :, 1:, 3:-5],
    "every_second_token": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "one_head_for_all": lambda x: x[:, :, :, :1].expand(-1, -1, -1, 3, -1),
    "one_sample_for_all": lambda x: x[:1].expand(2, -1, -1, -1, -1),
    "channels_apart": lambda x: x.transpose(1, 4).contiguous().transpose(1, 4),
    "one_number": lambda x: x[:1, :1, :1, :1, :1].expand(2, 5, 3, 3, 72),
}


@pytest.mark.parametrize(
    "impl", [pytest.param("native", marks=needs_native), pytest.param("triton", marks=needs_triton)]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_input_and_gradient(impl, layout, judge):
    qkv, weights, table = random_case(torch.float32, 2, 5, 3, 72, True, True)
    laid = LAYOUTS[layout]
    assert impl == "triton" or not laid(qkv).is_contiguous()
    before, grad = laid(qkv).clone(), laid(torch.randn(2, 5, 3, 3, 72))
    kept = grad.clone()
    assert grad.shape == before.shape == (2, 5, 3, 3, 72)
    agrees(judge, impl, qkv, weights, table, grad, laid)
    assert torch.equal(grad, kept), "the incoming gradient is left alone"


@needs_native
def test_strided_weights_and_table(judge):
    qkv, weights, table = random_case(torch.float32, 2, 5, 2, 64, True, True)
    strided = [torch.stack((w, w), -1)[:, 0] for w in weights]
    turned = table.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    shifted = torch.nn.functional.pad(table, (3, 2))[:, :, 3:-2]
    expected = qk_norm_rope(qkv, *weights, table, impl="native")
    for other in (turned, shifted):
        assert torch.equal(qk_norm_rope(qkv, *strided, other, impl="native"), expected)
    still = table[:, :1].expand(-1, 5, -1)
    agrees(judge, "native", qkv, weights, still)


@pytest.mark.parametrize(
    "impl", [pytest.param("native", marks=needs_native), pytest.param("triton", marks=needs_triton)]
)
@pytest.mark.parametrize("shape", [(0, 4, 3, 2, 8), (2, 0, 3, 2, 8), (2, 4, 3, 0, 8)])
def test_empty(impl, shape):
    weights = [torch.ones(8, requires_grad=True) for _ in range(2)]
    qkv = torch.ones(shape, requires_grad=True)
    for chosen in (weights, [None, None]):
        out = qk_norm_rope(qkv, *chosen, random_table(shape[1], 8), impl=impl)
        assert out.shape == shape
        out.sum().backward()
        assert qkv.grad.shape == shape
    assert all(torch.equal(w.grad, torch.zeros(8)) for w in weights)


@needs_native
@pytest.mark.parametrize(("norms", "rotates"), SWITCHES)
@pytest.mark.parametrize("head_dim", [6, 7])
def test_gradcheck_native(norms, rotates, head_dim):
    qkv, weights, table = random_case(torch.float64, 2, 3, 2, head_dim, norms, rotates and head_dim % 2 == 0)
    leaves = [x.requires_grad_() for x in (qkv, *weights) if x is not None]

    def function(qkv, *weights):
        return qk_norm_rope(qkv, *(weights or (None, None)), table, impl="native")

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@needs_native
def test_only_the_gradients_asked_for():
    qkv, (q_weight, k_weight), table = random_case(torch.float32, 2, 3, 2, 64, True, True)
    out = qk_norm_rope(qkv, q_weight, k_weight.requires_grad_(), table.requires_grad_(), impl="native")
    out.sum().backward()
    assert k_weight.grad is not None and qkv.grad is None and q_weight.grad is None and table.grad is None
    with torch.no_grad():
        assert not qk_norm_rope(qkv, q_weight, k_weight, table, impl="native").requires_grad


@needs_native
def test_rotation_alone_saves_no_activation():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        qkv, _, table = random_case(torch.float32, 2, 3, 2, 64, False, True)
        qk_norm_rope(qkv.requires_grad_(), table=table, impl="native")
    assert [x.shape for x in saved] == [table.shape]


@needs_native
def test_same_bits_every_time_and_for_any_number_of_threads():
    qkv, weights, table = random_case(torch.bfloat16, 3, 70, 12, 72, True, True)
    grad = torch.randn_like(qkv)
    first = run("native", qkv, weights, table, grad)
    try:
        for turn in range(10):
            torch.set_num_threads(1 + turn % 3)
            again = run("native", qkv, weights, table, grad)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(1)


@needs_native
def test_a_token_does_not_depend_on_its_batch(isa):
    qkv, weights, table = random_case(torch.bfloat16, 3, 33, 2, 72, True, True)
    whole = qk_norm_rope(qkv, *weights, table, impl="native")
    assert torch.equal(whole[1:2], qk_norm_rope(qkv[1:2], *weights, table, impl="native"))


@needs_native
def test_numbers_that_are_not_finite_stay_in_their_row():
    qkv, weights, table = random_case(torch.float32, 1, 4, 2, 72, True, True)
    expected = qk_norm_rope(qkv, *weights, table, impl="native")
    qkv[0, 1, 0, 1, 71] = torch.inf
    qkv[0, 2, 1, 0, 3] = torch.nan
    actual = qk_norm_rope(qkv, *weights, table, impl="native")
    same = torch.isclose(actual, expected, rtol=0, atol=0).all(-1)
    assert (~same).nonzero().tolist() == [[0, 1, 0, 1], [0, 2, 1, 0]]


@needs_native
def test_zeros_and_eps_zero():
    qkv = torch.zeros(1, 2, 3, 1, 64)
    assert not qk_norm_rope(qkv, torch.ones(64), torch.ones(64), random_table(2, 64), impl="native").any()
    tiny = torch.full((1, 2, 3, 1, 64), 1e-15)
    out = run("native", tiny, [torch.ones(64)] * 2, None, torch.randn(1, 2, 3, 1, 64), eps=0.0)
    torch.testing.assert_close(out[0][:, :, :2], torch.ones(1, 2, 2, 1, 64))
    assert all(x.isfinite().all() for x in out)


def random_head(seed, head_dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 7, 3, 2, head_dim, generator=generator).to(dtype)


@needs_native
@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from([2, 6, 64, 72, 80, 96, 128]), st.sampled_from(NATIVE_DTYPES))
def test_native_keeps_norms_and_is_undone_by_minus_x(seed, head_dim, dtype):
    qkv, table = random_head(seed, head_dim, dtype), random_table(7, head_dim)
    turned = qk_norm_rope(qkv, table=table, impl="native")
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(turned.double().norm(dim=-1), qkv.double().norm(dim=-1), rtol=rounding, atol=0)
    back = qk_norm_rope(turned, table=torch.stack((table[0], -table[1])), impl="native")
    torch.testing.assert_close(back.double(), qkv.double(), rtol=0, atol=rounding * qkv.abs().max().item())


@needs_native
@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from([1, 7, 64, 72, 128]), st.integers(-8, 8))
def test_norm_does_not_see_the_scale(seed, head_dim, power):
    qkv, weights = random_head(seed, head_dim), torch.randn(2, head_dim)
    plain, scaled = (qk_norm_rope(s * qkv, *weights, eps=0.0, impl="native") for s in (1.0, 2.0**power))
    assert torch.equal(plain[:, :, :2], scaled[:, :, :2]), "powers of two scale without rounding"


@needs_native
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 3), st.integers(1, 9), st.integers(1, 3), st.integers(1, 90), st.booleans(), seeds)
def test_native_of_any_shape(batch, length, heads, head_dim, norms, seed):
    torch.manual_seed(seed)
    qkv, weights, table = random_case(torch.float32, batch, length, heads, head_dim, norms, head_dim % 2 == 0)
    grad = torch.randn_like(qkv)
    ours, theirs = (run(impl, qkv, weights, table, grad) for impl in ("native", "reference"))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


@needs_native
@pytest.mark.parametrize(("norms", "rotates"), SWITCHES)
def test_opcheck(norms, rotates):
    qkv, weights, table = random_case(torch.float32, 2, 3, 2, 16, norms, rotates)
    for layout in [LAYOUTS["heads_first"], LAYOUTS["channels_apart"]][: 1 + (norms and rotates)]:
        forward = ("native", layout(qkv), *weights, table, 1e-6)
        torch.library.opcheck(torch.ops.vitok.qk_norm_rope_forward, forward)
        backward = ("native", layout(qkv), layout(qkv) if norms else None, *weights, table, 1e-6)
        torch.library.opcheck(torch.ops.vitok.qk_norm_rope_backward, backward)


@needs_native
def test_compiles_whole_with_one_graph_for_many_sizes():
    torch.compiler.reset()
    weights, graphs = [torch.randn(16, requires_grad=True) for _ in range(2)], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x, table: qk_norm_rope(x, *weights, table), fullgraph=True, backend=backend, dynamic=True
    )
    for batch, length in [(4, 5), (5, 7), (7, 9)]:  # no two sizes alike, or they are taken for one
        qkv, _, table = random_case(torch.float32, batch, length, 6, 16, False, True)
        torch.testing.assert_close(compiled(qkv, table), qk_norm_rope(qkv, *weights, table))
    assert len(graphs) == 1


@needs_native
def test_trains_under_aot():
    torch.compiler.reset()
    qkv, weights, table = random_case(torch.float32, 2, 5, 3, 16, True, True)
    grad = torch.randn_like(qkv)
    expected = run("native", qkv, weights, table, grad)
    leaves = [x.requires_grad_() for x in (qkv, *weights)]
    compiled = torch.compile(
        lambda *x: qk_norm_rope(*x, table, impl="native"), fullgraph=True, backend="aot_eager", dynamic=True
    )
    out = compiled(*leaves)
    out.backward(grad)
    for ours, theirs in zip([out, *(x.grad for x in leaves)], expected, strict=True):
        assert torch.equal(ours, theirs)


@needs_native
def test_native_refuses_what_it_does_not_take(one_sentence):
    cases = [
        (torch.ones(1, 1, 3, 1, 2000), None, "at most 1024 channels, got 2000"),
        (torch.ones(1, 1, 3, 1, 8), torch.ones(2, 1, 4, dtype=torch.float64), "table is float32, got torch.float64"),
    ]
    for qkv, table, message in cases:
        with pytest.raises(ImplementationError) as error:
            qk_norm_rope(qkv, table=table, impl="native")
        one_sentence(error.value, "'native'", message)
        assert torch.equal(qk_norm_rope(qkv, table=table)[:, :, 2], qkv[:, :, 2])


@needs_native
def test_native_guards_its_arguments():
    qkv, out = torch.ones(1, 2, 3, 1, 8), torch.ones(1, 2, 3, 1, 8)

    def call(**changes):
        arguments = {
            "qkv": qkv.data_ptr(), "dtype": "float32", "sizes": (1, 2, 1, 8), "strides": qkv.stride()[:4],
            "q_weight": 0, "k_weight": 0, "weight_dtype": "float32", "table": 0, "table_strides": (0, 0), "eps": 1e-6,
            "out": out.data_ptr(),
        }  # fmt: skip
        NATIVE.qk_norm_rope_forward_cpu(**(arguments | changes))

    call()
    for changes, message in [
        ({"sizes": (1, -2, 1, 8)}, "must not be negative"),
        ({"sizes": (1, 2, 1, 0)}, "head_dim must be from 1 to 1024"),
        ({"sizes": (1, 2, 1, 1025)}, "head_dim must be from 1 to 1024"),
        ({"sizes": (2**40, 2**20, 1, 8)}, "more elements than 64 bits can address"),
        ({"strides": (0, 2**62, 8, 8)}, "lead past what 64 bits can address"),
        ({"strides": (0, -24, 8, 8)}, "strides must not be negative"),
        ({"q_weight": qkv.data_ptr()}, "must both be given"),
        ({"sizes": (1, 2, 1, 7), "table": qkv.data_ptr()}, "must be even"),
        ({"dtype": "uint8"}, "must be a float type"),
        ({"out": 0}, "must not be null"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(**changes)


@pytest.mark.skipif(NATIVE is not None, reason="the native library is there")
def test_native_by_name_says_why_it_is_absent(one_sentence):
    with pytest.raises(ImplementationError) as error:
        qk_norm_rope(torch.ones(1, 1, 3, 1, 8), impl="native")
    one_sentence(error.value, "'native'", _native.reason())


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 4, 2, 2, 8), {}, "qkv must be [B, L, 3, heads, head_dim], got [1, 4, 2, 2, 8]"),
        ((1, 4, 3, 16), {}, "qkv must be [B, L, 3, heads, head_dim], got [1, 4, 3, 16]"),
        ((1, 4, 3, 2, 0), {}, "qkv must have a head_dim of at least 1, got [1, 4, 3, 2, 0]"),
        ((1, 4, 3, 2, 7), {"table": torch.ones(2, 4, 3)}, "qkv must have an even head_dim for a rotation, got 7"),
        ((1, 4, 3, 2, 8), {"table": torch.ones(2, 4, 8)}, "table must be [2, 4, 4] for this qkv, got [2, 4, 8]"),
        ((1, 4, 3, 2, 8), {"table": torch.ones(2, 1, 4)}, "table must be [2, 4, 4] for this qkv, got [2, 1, 4]"),
        ((1, 4, 3, 2, 8), {"table": torch.ones(2, 4, 4).half()}, "float32 or float64, got torch.float16"),
        ((1, 4, 3, 2, 8), {"table": torch.ones(2, 4, 4, device="meta")}, "table must be on the device of qkv, cpu"),
        ((1, 4, 3, 2, 8), {"q_weight": torch.ones(8)}, "got q_weight without k_weight"),
        ((1, 4, 3, 2, 8), {"k_weight": torch.ones(8)}, "got k_weight without q_weight"),
        (
            (1, 4, 3, 2, 8),
            {"q_weight": torch.ones(8), "k_weight": torch.ones(2, 8)},
            "k_weight must be [8] for this qkv, got [2, 8]",
        ),
        (
            (1, 4, 3, 2, 8),
            {"q_weight": torch.ones(4), "k_weight": torch.ones(8)},
            "q_weight must be [8] for this qkv, got [4]",
        ),
        (
            (1, 4, 3, 2, 8),
            {"q_weight": torch.ones(8), "k_weight": torch.ones(8).half()},
            "k_weight must have the dtype of q_weight, torch.float32, got torch.float16",
        ),
        (
            (1, 4, 3, 2, 8),
            {"q_weight": torch.ones(8, dtype=torch.int32), "k_weight": torch.ones(8)},
            "q_weight must be float32, bfloat16, float16 or float64, got torch.int32",
        ),
        (
            (1, 4, 3, 2, 8),
            {"q_weight": torch.ones(8, device="meta"), "k_weight": torch.ones(8)},
            "q_weight must be on the device of qkv, cpu, got meta",
        ),
        ((1, 4, 3, 2, 8), {"impl": "cuda"}, "no implementation 'cuda'; it has native, triton, reference"),
    ],
)
def test_bad_arguments(shape, options, message, one_sentence):
    with pytest.raises(InputError) as error:
        qk_norm_rope(torch.ones(shape), **options)
    one_sentence(error.value, message)


def test_integers_are_refused(one_sentence):
    with pytest.raises(InputError) as error:
        qk_norm_rope(torch.ones(1, 4, 3, 2, 8, dtype=torch.int64))
    one_sentence(error.value, "qkv must be float32, bfloat16, float16 or float64, got torch.int64")
