"""gated_mlp_act: every implementation against the formula in float64, values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitok import InputError, _native
from vitok.ops import _triton, gated_mlp_act
from vitok.ops import gated_mlp_act as op
from vitok.ops._registry import ImplementationError

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
GATES = ["silu", "gelu"]
needs_native = pytest.mark.skipif(_native.library() is None, reason=f"no native library: {_native.reason()}")
needs_triton = pytest.mark.skipif(bool(_triton.MISSING), reason=_triton.MISSING or "triton is there")
native = pytest.param("native", marks=needs_native)
fast_impls = pytest.mark.parametrize("impl", [native, pytest.param("triton", marks=needs_triton)])
impls = pytest.mark.parametrize("impl", ["reference", native, pytest.param("triton", marks=needs_triton)])
gates = pytest.mark.parametrize("gate", GATES)

# The ends of the CPU's vectors (4 to 32 elements), of a Triton tile (1024), and sizes found in the wild.
WIDTHS = [1, 3, 15, 16, 17, 31, 32, 33, 63, 65, 2050, 3075]


def formula(gate_up, gate):
    first, second = gate_up.double().chunk(2, -1)
    distribution = 0.5 * torch.special.erfc(-first * 0.5**0.5) if gate == "gelu" else torch.sigmoid(first)
    return first * distribution * second


def with_gradient(function, x, seed):
    leaf = x.detach().requires_grad_()
    out = function(leaf)
    (gradient,) = torch.autograd.grad(out, leaf, seed.to(out.dtype))
    return out.detach(), gradient


def check(judge, impl, gate, x, seed):
    """The output and the gradient of one implementation, both judged."""
    ours = with_gradient(lambda x: gated_mlp_act(x, gate=gate, impl=impl), x, seed)
    eager = with_gradient(lambda x: gated_mlp_act(x, gate=gate, impl="reference"), x, seed)
    exact = with_gradient(lambda x: formula(x, gate), x.double(), seed.double())
    for actual, baseline, oracle in zip(ours, eager, exact, strict=True):
        judge(actual, baseline, oracle)


@needs_native
@gates
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_native_cpu_at_every_level(isa, dtype, gate, judge):
    for width in WIDTHS:
        x = (3 * torch.randn(3, 2 * width)).to(dtype)
        check(judge, "native", gate, x, torch.randn(3, width).to(dtype))


@needs_triton
@gates
@pytest.mark.parametrize(
    ("device", "dtype"),
    [(d, t) for d in DEVICES for t in (torch.float32, torch.float16, torch.bfloat16) if d == "cuda" or t.itemsize != 2]
    + [("cpu", torch.float16)],
    ids=str,
)
def test_triton(device, dtype, gate, judge):
    for width in [1, 33, 1023, 1024, 1025, 2050, 3075]:
        x = (3 * torch.randn(2, 2 * width)).to(device, dtype)
        check(judge, "triton", gate, x, torch.randn(2, width).to(device, dtype))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@needs_native
@gates
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_native_cuda(dtype, gate, judge):
    for width in WIDTHS:
        x = (3 * torch.randn(3, 2 * width)).to("cuda", dtype)
        check(judge, "native", gate, x, torch.randn(3, width).to("cuda", dtype))


LAYOUTS = {
    "slice of a wider projection": lambda x: torch.cat((x[..., :5], x), -1)[..., 5:],
    "every second row": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "one row for all": lambda x: x[:1, :1].expand(x.shape),
    "permuted": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns apart": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "one number for all": lambda x: x[:1, :1, :1].expand(x.shape),
}


@fast_impls
@gates
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("device", DEVICES)
def test_layouts_of_input_and_gradient(impl, gate, layout, device):
    packed, seed = torch.randn(2, 3, 68, device=device), torch.randn(2, 3, 34, device=device)
    x, strided_seed = LAYOUTS[layout](packed), LAYOUTS[layout](seed)
    before = x.clone(), strided_seed.clone()
    got = with_gradient(lambda x: gated_mlp_act(x, gate=gate, impl=impl), x, strided_seed)
    expected = with_gradient(lambda x: gated_mlp_act(x, gate=gate, impl=impl), before[0], before[1])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert got[0].is_contiguous()
    assert torch.equal(x, before[0]) and torch.equal(strided_seed, before[1])


@impls
def test_gradient_reaches_a_projection_through_its_slice(impl):
    projection = torch.randn(4, 50, dtype=torch.float32, requires_grad=True)
    gated_mlp_act(projection[:, 10:], impl=impl).sum().backward()
    assert not projection.grad[:, :10].any() and projection.grad[:, 10:].all()


@impls
@gates
def test_far_out_values_give_what_the_formula_gives(impl, gate):
    far = [-1e30, -1e4, -200.0, -89.0, -88.2, -40.0, -14.0, -0.0, 0.0, 14.0, 89.0, 200.0, 1e30, torch.inf]
    x = torch.stack((torch.tensor(far), torch.ones(len(far))), -1)
    out, gradient = with_gradient(lambda x: gated_mlp_act(x, gate=gate, impl=impl), x, torch.ones(len(far), 1))
    expected = x[:, 0].clamp(min=0)
    torch.testing.assert_close(out[:, 0], expected, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(gradient[:, 1], expected, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(gradient[2:-1, 0], formula_slope(x[2:-1, 0], gate), rtol=1e-6, atol=1e-6)
    nan = gated_mlp_act(torch.tensor([[torch.nan, 1.0]]), gate=gate, impl=impl)
    assert nan.isnan().all()


def formula_slope(x, gate):
    leaf = x.double().requires_grad_()
    return torch.autograd.grad(formula(torch.stack((leaf, torch.ones_like(leaf)), -1), gate).sum(), leaf)[0].float()


@needs_native
def test_gelu_keeps_digits_far_below_zero():
    x = torch.linspace(-8, 0, 4001)
    gates = torch.stack((x, torch.ones_like(x)), -1)
    expected = formula(gates, "gelu")
    ours = (gated_mlp_act(gates, gate="gelu", impl="native").double() / expected - 1)[:-1].abs().max()
    assert ours < 4e-6  # the eager expression, 1 + erf, has lost them all at -6


@gates
@pytest.mark.parametrize("impl", ["reference", native])
def test_gradcheck(impl, gate):
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gated_mlp_act(x, gate=gate, impl=impl), x)


@impls
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0), (0, 0)])
def test_empty(impl, shape):
    x = torch.ones(shape, requires_grad=True)
    out = gated_mlp_act(x, impl=impl)
    out.sum().backward()
    assert out.shape == (*shape[:-1], shape[-1] // 2) and x.grad.shape == shape


@impls
def test_one_row_and_one_element(impl):
    assert gated_mlp_act(torch.tensor([0.0, 5.0]), impl=impl).tolist() == [0.0]
    assert gated_mlp_act(torch.ones(6), impl=impl).shape == (3,)


@fast_impls
def test_the_backward_pass_keeps_its_input_alone(impl):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        x = torch.randn(2, 8, requires_grad=True)
        gated_mlp_act(x, impl=impl)
    assert len(kept) == 1 and kept[0].data_ptr() == x.data_ptr()


@needs_native
@gates
def test_same_bits_from_run_to_run_and_for_any_number_of_threads(gate):
    x, seed = torch.randn(64, 2 * 515).bfloat16(), torch.randn(64, 515).bfloat16()
    threads = torch.get_num_threads()
    results = []
    try:
        for run in range(10):
            torch.set_num_threads(1 + run % 3)
            results.append(with_gradient(lambda x: gated_mlp_act(x, gate=gate, impl="native"), x, seed))
    finally:
        torch.set_num_threads(threads)
    for out, gradient in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(gradient, results[0][1])


@fast_impls
@settings(max_examples=15, deadline=None)
@given(width=st.integers(1, 80), rows=st.integers(1, 4), scale=st.floats(-4, 4), gate=st.sampled_from(GATES))
def test_is_linear_in_up_and_positive_with_its_gate(impl, width, rows, scale, gate):
    x = torch.randn(rows, 2 * width)
    scaled = torch.cat((x[:, :width], 2 ** round(scale) * x[:, width:]), 1)
    out = gated_mlp_act(x, gate=gate, impl=impl)
    assert torch.equal(gated_mlp_act(scaled, gate=gate, impl=impl), 2 ** round(scale) * out)
    assert torch.equal(out.sign(), x[:, :width].sign() * x[:, width:].sign())


@fast_impls
def test_opcheck(impl):
    for x in (torch.randn(2, 3, 10), torch.randn(2, 3, 14)[..., 4:]):
        grad = torch.randn(2, 3, 5)
        torch.library.opcheck(torch.ops.vitok.gated_mlp_act_forward, (impl, x, "gelu"))
        torch.library.opcheck(torch.ops.vitok.gated_mlp_act_backward, (impl, grad, x, "gelu"))


@pytest.mark.parametrize("impl", ["auto", native])
def test_compiles_whole_with_one_graph_for_many_sizes(impl):
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def loss(x):
        return gated_mlp_act(x, impl=impl).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=True)
    for batch in (2, 3, 5):
        x = torch.randn(batch, 7, 20, requires_grad=True)
        compiled(x).backward()
        expected = torch.autograd.grad(loss(x), x)[0]
        torch.testing.assert_close(x.grad, expected)
    assert len(graphs) == 1


@needs_native
def test_compiles_ahead_of_time():
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: gated_mlp_act(x, gate="gelu", impl="native"), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for batch in (2, 3):
        x, seed = torch.randn(batch, 20, requires_grad=True), torch.randn(batch, 10)
        got = torch.autograd.grad(compiled(x), x, seed)[0]
        assert torch.equal(got, torch.autograd.grad(gated_mlp_act(x, gate="gelu", impl="native"), x, seed)[0])


@pytest.mark.skipif(_native.library() is not None, reason="the native library is there")
def test_native_by_name_says_why_it_is_absent(one_sentence):
    with pytest.raises(ImplementationError) as error:
        gated_mlp_act(torch.ones(2, 4), impl="native")
    one_sentence(error.value, "'native'", _native.reason())


@needs_triton
def test_triton_by_name_never_falls_back(one_sentence):
    with pytest.raises(ImplementationError) as error:
        gated_mlp_act(torch.ones(2, 4, dtype=torch.float64), impl="triton")
    one_sentence(error.value, "'triton'", "computes in float32")


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.ones(2, 4), {"gate": "relu"}, "one of silu, gelu, got 'relu'"),
        (torch.ones(2, 5), {}, "even last dimension, got [2, 5]"),
        (torch.ones(()), {}, "even last dimension, got []"),
        (
            torch.ones(2, 4, dtype=torch.int32),
            {},
            "gate_up must be float32, bfloat16, float16 or float64, got torch.int32",
        ),
        (torch.ones(2, 4), {"impl": "cuda"}, "no implementation 'cuda'; it has native, triton, reference"),
    ],
)
def test_bad_arguments(x, options, message, one_sentence):
    with pytest.raises(InputError) as error:
        op(x, **options)
    one_sentence(error.value, message)


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_up": 0}, "gate_up and out must not be null"),
        ({"rows": 2**62}, "exceeds 2^58 elements"),
        ({"row_stride": 2**60}, "exceeds 2^58 elements"),
        ({"row_stride": -1}, "must not be negative"),
        ({"dtype": "uint8"}, "must be a float type"),
    ],
)
def test_the_kernel_refuses_what_would_leave_memory(change, message):
    x, out = torch.ones(2, 4), torch.ones(2, 2)
    arguments = {"gate_up": x.data_ptr(), "dtype": "float32", "rows": 2, "hidden": 2, "row_stride": 4, "gelu": False}
    with pytest.raises(ValueError, match=message.replace("^", r"\^")):
        _native.library().gated_mlp_act_forward_cpu(**(arguments | {"out": out.data_ptr()} | change))
