"""pack_linear: every implementation, with what stands before and after the product, against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vitok import InputError, _native
from vitok.ops import gated_mlp_act, norm, pack_linear
from vitok.ops._registry import ImplementationError

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
needs_native = pytest.mark.skipif(_native.library() is None, reason=f"no native library: {_native.reason()}")
impls = pytest.mark.parametrize("impl", [pytest.param("native", marks=needs_native), "reference"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
AROUND = [(None, None), ("layer", None), ("rms", "silu"), ("layer", "gelu"), ("silu", None), ("gelu", None)]


def composed(x, weight, bias, before, after):
    """The op by the references of others, in x's dtype."""
    if before in ("layer", "rms"):
        x = norm(x, None, kind=before, eps=1e-6, impl="reference")
    elif before:
        x = gated_mlp_act(x, gate=before, impl="reference")
    out = F.linear(x, weight, bias)
    return gated_mlp_act(out, gate=after, impl="reference") if after else out


def tensors(dtype, device, rows, n, m, before, biased):
    width = 2 * n if before in ("silu", "gelu") else n
    x = torch.randn(*rows, width, device=device).to(dtype)
    weight = (torch.randn(m, n, device=device) * n**-0.5).to(dtype)
    return x, weight, torch.randn(m, device=device).to(dtype) if biased else None


@impls
@dtypes
@pytest.mark.parametrize(("before", "after"), AROUND)
@pytest.mark.parametrize("device", DEVICES)
def test_is_the_composition(judge, impl, dtype, before, after, device):
    if impl == "native" and (before in ("silu", "gelu") or device == "cuda"):
        pytest.skip("the native implementation gates after the product, on the CPU")
    for rows, n, m, biased in [((1,), 1, 2, True), ((2, 7), 33, 34, False), ((40,), 96, 64, True), ((0,), 8, 8, True)]:
        x, weight, bias = tensors(dtype, device, rows, n, m, before, biased)
        packed = pack_linear(weight, bias, dtype=dtype, before=before, after=after, impl=impl)
        out = packed(x)
        exact = composed(x.double(), weight.double(), None if bias is None else bias.double(), before, after)
        assert out.shape == exact.shape and out.is_contiguous()
        if not out.numel():
            continue
        plain = composed(x, weight, bias, before, after)
        judge(out, plain, exact)
        total = torch.randn(exact.shape, device=device).to(dtype)
        added, before_sum = total.clone(), total.double()
        assert packed(x, add_to=added) is added
        judge(added, total + plain, before_sum + exact)


@impls
@pytest.mark.parametrize("quantize", ["int8", "fp8"])
@pytest.mark.parametrize(("before", "after"), AROUND)
@pytest.mark.parametrize("device", DEVICES)
def test_eight_bits(impl, quantize, before, after, device):
    """As far from the exact result as operands of 8 bits make it: each is wrong by half a step, evenly spread."""
    if impl == "native" and (quantize == "fp8" or before in ("silu", "gelu") or device == "cuda"):
        pytest.skip("the native implementation multiplies int8 on the CPU, and gates after the product")
    x, weight, bias = tensors(torch.bfloat16, device, (40,), 96, 64, before, True)
    options = {"dtype": torch.bfloat16, "before": before, "after": after, "impl": impl}
    exact = composed(x.double(), weight.double(), bias.double(), before, after)
    wrong = (pack_linear(weight, bias, quantize=quantize, **options)(x).double() - exact).square().mean().sqrt()
    # e4m3 has 4 significant bits: half a step is up to 1/16, in the mean over a binade about 1/40 of the number.
    assert wrong < (0.02 if quantize == "int8" else 0.06) * exact.square().mean().sqrt()
    assert wrong > 1e-4 * exact.square().mean().sqrt()


@impls
def test_integers_are_multiplied_exactly(impl):
    weight = torch.randint(-127, 128, (32, 64)).float()
    weight[:, 0] = 127
    x = torch.randint(-127, 128, (5, 64)).float()
    x[:, 0] = -127
    packed = pack_linear(weight, dtype=torch.float32, quantize="int8", impl=impl)
    assert torch.allclose(packed(x), x @ weight.T, rtol=1e-6)


@impls
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_rows_may_be_apart(impl, quantize):
    weight, wide = torch.randn(32, 48), torch.randn(4, 6, 60)
    packed = pack_linear(weight, dtype=torch.float32, quantize=quantize, before="layer", impl=impl)
    assert torch.equal(packed(wide[..., 7:55]), packed(wide[..., 7:55].contiguous()))
    assert torch.allclose(packed(wide[:, ::2, 7:55]), packed(wide[..., 7:55])[:, ::2], atol=1e-6)


@impls
def test_the_weight_is_its_own(impl):
    weight, bias, x = torch.randn(16, 16), torch.randn(16), torch.randn(2, 16)
    packed = pack_linear(weight, bias, dtype=torch.float32, impl=impl)
    before = packed(x)
    weight.zero_(), bias.zero_()
    assert torch.equal(packed(x), before)


@pytest.mark.parametrize(
    ("use", "wanted"),
    [
        (lambda: pack_linear(torch.ones(3), dtype=torch.float32), ("weight must be [m, n]", "[3]")),
        (lambda: pack_linear(torch.ones(3, 2).int(), dtype=torch.float32), ("weight", "int32")),
        (lambda: pack_linear(torch.ones(3, 2), torch.ones(2), dtype=torch.float32), ("bias must be [3]", "[2]")),
        (lambda: pack_linear(torch.ones(3, 2), dtype=torch.float64), ("dtype must be", "float64")),
        (lambda: pack_linear(torch.ones(3, 2), dtype=torch.float32, quantize="int4"), ("quantize", "int8", "int4")),
        (lambda: pack_linear(torch.ones(3, 2), dtype=torch.float32, before="norm"), ("before", "layer", "norm")),
        (lambda: pack_linear(torch.ones(3, 2), dtype=torch.float32, after="relu"), ("after", "silu", "relu")),
        (lambda: pack_linear(torch.ones(3, 2), dtype=torch.float32, after="silu"), ("even number of rows", "3")),
        (lambda: pack_linear(torch.ones(3, 2), dtype=torch.float32, before="rms", eps=-1), ("eps", "-1")),
        (lambda: small()(torch.ones(2, 3)), ("x must be torch.float32 [..., 2]", "[2, 3]")),
        (lambda: small()(torch.ones(2, 2).half()), ("x must be torch.float32", "float16")),
        (lambda: small()(torch.ones(2, 2).requires_grad_()), ("gradient",)),
        (lambda: small()(torch.ones(2, 2), add_to=torch.ones(2, 2)), ("add_to", "[2, 3]", "[2, 2]")),
        (lambda: small()(torch.ones(2, 2), add_to=torch.ones(3, 2).T), ("add_to must be contiguous",)),
    ],
)
def test_bad_arguments_are_one_sentence(use, wanted, one_sentence):
    with pytest.raises(InputError) as caught:
        use()
    one_sentence(caught.value, *wanted)


def small():
    return pack_linear(torch.ones(3, 2), dtype=torch.float32)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"quantize": "int8", "impl": "reference"}, "multiples of 16"),
        ({"quantize": "fp8", "impl": "native"}, "native"),
        ({"before": "silu", "impl": "native"}, "native"),
        ({"impl": "cublas"}, "native, reference"),
    ],
)
def test_an_implementation_asked_for_by_name_says_why_not(options, wanted, one_sentence):
    with pytest.raises(ImplementationError) as caught:
        pack_linear(torch.ones(3, 2), dtype=torch.bfloat16, **options)
    one_sentence(caught.value, "packed_linear", wanted)


@needs_native
def test_sums_of_integers_stay_integers(one_sentence):
    with pytest.raises(ImplementationError) as caught:
        pack_linear(torch.ones(3, 2**17 + 1), dtype=torch.bfloat16, quantize="int8", impl="native")
    one_sentence(caught.value, "at most 131072 terms", "131073")
