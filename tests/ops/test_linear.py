"""linear: a product of widened 16-bit numbers against float64, values and gradients, and where it is taken."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vitok import InputError, _native, layers, ops
from vitok.ops import linear
from vitok.ops._registry import ImplementationError

MODULE = sys.modules["vitok.ops.linear"]  # the package's attribute of this name is the function
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that has no products of 16-bit floats."""
    monkeypatch.setattr(MODULE, "_EMULATED", True)


def with_gradients(function, tensors, seed):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, seed.to(out.dtype))]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("rows", "inner", "outer"), [((1,), 1, 1), ((7,), 33, 5), ((2, 3), 768, 32), ((3, 0), 8, 4)])
def test_widened(dtype, rows, inner, outer, judge):
    tensors = [torch.randn(s).to(dtype) for s in ((*rows, inner), (outer, inner), (outer,))]
    seed = torch.randn(*rows, outer).to(dtype)
    ours = with_gradients(lambda *t: linear(*t, impl="widened"), tensors, seed)
    eager = with_gradients(lambda *t: linear(*t, impl="reference"), tensors, seed)
    exact = with_gradients(F.linear, [t.double() for t in tensors], seed.double())
    for actual, baseline, oracle in zip(ours, eager, exact, strict=True):
        if oracle.numel():
            judge(actual, baseline, oracle)
        assert actual.shape == baseline.shape and actual.dtype == dtype


@pytest.mark.parametrize("dtype", HALVES)
def test_auto_rounds_once(dtype):
    """What the widened product gives to the bit, which the library's own need not."""
    x, weight, bias = (torch.randn(s).to(dtype) for s in ((4, 300), (6, 300), (6,)))
    assert linear(x, weight, bias).equal(F.linear(x.float(), weight.float(), bias.float()).to(dtype))


def test_layouts_and_missing_gradients():
    x, weight = torch.randn(5, 4, 3).bfloat16(), torch.randn(8, 5).bfloat16()
    permuted = x.permute(2, 1, 0)
    assert linear(permuted, weight.contiguous()).equal(linear(permuted.contiguous(), weight))
    wide = torch.randn(5, 8).bfloat16().t().requires_grad_()
    out = linear(permuted, wide)
    (gradient,) = torch.autograd.grad(out, wide, torch.ones(1).bfloat16().expand_as(out))
    assert gradient.shape == wide.shape


def test_gradients_of_gradients(monkeypatch):
    x, weight = torch.randn(3, 4).bfloat16().requires_grad_(), torch.randn(2, 4).bfloat16().requires_grad_()
    (first,) = torch.autograd.grad(linear(x, weight, impl="widened").square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.float().sum(), weight)
    plain, wide = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(F.linear(plain, wide).square().sum(), plain, create_graph=True)
    (expected,) = torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close(second.double(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


@pytest.mark.parametrize("impl", ["auto", "widened", "reference"])
def test_autocast(impl):
    x, weight, bias = torch.randn(3, 40), torch.randn(5, 40).requires_grad_(), torch.randn(5)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(x, weight, bias, impl=impl)
        (gradient,) = torch.autograd.grad(out.float().sum(), weight)  # the backward pass inside the block as well
    assert out.dtype == torch.bfloat16 and gradient.dtype == torch.float32
    rounded = [t.bfloat16().double() for t in (x, weight.detach(), bias)]
    torch.testing.assert_close(out.double(), F.linear(*rounded), rtol=0.02, atol=0.05)


def test_auto_leaves_other_dtypes_and_machines_alone(monkeypatch):
    select = ops._registry.OPS["linear"].select
    x, weight = torch.randn(2, 3), torch.randn(4, 3)
    assert select("auto", x.bfloat16(), weight.bfloat16(), None).name == "widened"
    for dtype in (torch.float32, torch.float64):
        assert select("auto", x.to(dtype), weight.to(dtype), None).name == "reference"
        assert linear(x.to(dtype), weight.to(dtype)).equal(F.linear(x.to(dtype), weight.to(dtype)))
    assert select("auto", x.bfloat16().to("meta"), weight.bfloat16().to("meta"), None).name == "reference"
    monkeypatch.setattr(MODULE, "_EMULATED", False)
    assert select("auto", x.bfloat16(), weight.bfloat16(), None).name == "reference"


def test_compiles_whole():
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True, dynamic=True)
    weight = torch.randn(5, 8).bfloat16().requires_grad_()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (3, 4):
            x = torch.randn(rows, 8).bfloat16()
            out = compiled(x, weight)
            assert out.equal(linear(x, weight))
            (gradient,) = torch.autograd.grad(out.sum(), weight)
            assert gradient.equal(torch.autograd.grad(linear(x, weight).sum(), weight)[0])


@pytest.mark.skipif(_native.library() is None, reason=f"no native library: {_native.reason()}")
def test_the_model_multiplies_by_it(tiny, monkeypatch):
    """Every linear map of a model in bfloat16, the embedding and the pixels among them, is a product in float32."""
    seen = []
    original = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *args: seen.append(x.dtype) or original(x, *args))
    model = tiny().bfloat16()
    with torch.no_grad():
        model.decode(model.encode(torch.zeros(1, 16, 16, 3, dtype=torch.uint8)).mode())
    linears = [m for m in model.modules() if isinstance(m, (nn.Linear, layers.TubeletEmbed, layers.TubeletUnembed))]
    assert len(seen) == len(linears) and set(seen) == {torch.float32}


@pytest.mark.parametrize(
    ("x", "weight", "bias", "parts"),
    [
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(4, 3), None, ("x", "int64")),
        (torch.tensor(1.0), torch.ones(4, 3), None, ("x", "[..., n]")),
        (torch.ones(2, 3), torch.ones(4, 5), None, ("weight", "[m, 3]", "[4, 5]")),
        (torch.ones(2, 3), torch.ones(3), None, ("weight", "[m, 3]", "[3]")),
        (torch.ones(2, 3), torch.ones(4, 3), torch.ones(3), ("bias", "[4]", "[3]")),
        (torch.ones(2, 3), torch.ones(4, 3, device="meta"), None, ("weight", "cpu", "meta")),
    ],
)
def test_bad_arguments(x, weight, bias, parts, one_sentence):
    with pytest.raises(InputError) as error:
        linear(x, weight, bias)
    one_sentence(error.value, *parts)


def test_unavailable_implementations(monkeypatch, one_sentence):
    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    with pytest.raises(ImplementationError) as error:
        linear(x, weight, impl="widened")
    one_sentence(error.value, "widened", "float32")
    monkeypatch.setattr(MODULE, "_EMULATED", False)
    with pytest.raises(ImplementationError) as error:
        linear(x.bfloat16(), weight.bfloat16(), impl="widened")
    one_sentence(error.value, "widened", "16-bit")
