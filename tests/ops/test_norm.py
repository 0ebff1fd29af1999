"""norm against its formula in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitok import InputError
from vitok.ops import norm


def formula(x, weight, bias, kind, eps):
    centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    y = centred / (centred**2).mean(-1, keepdim=True).add(eps).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("width", [1, 72, 768, 2050])
@pytest.mark.parametrize("affine", ["none", "weight", "both"])
def test_formula(kind, width, affine):
    x = torch.randn(3, 5, width, dtype=torch.float64) * 3 + 1
    weight = torch.randn(width, dtype=torch.float64) if affine != "none" else None
    bias = torch.randn(width, dtype=torch.float64) if affine == "both" else None
    actual = norm(x, weight, bias, kind=kind, eps=1e-5)
    torch.testing.assert_close(actual, formula(x, weight, bias, kind, 1e-5), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types_keep_wide_statistics(kind, dtype, judge):
    x, weight = (torch.randn(64, 768) * 30).to(dtype), torch.randn(768).to(dtype)
    oracle = formula(x.double(), weight.double(), None, kind, 1e-5)
    judge(norm(x, weight, kind=kind, eps=1e-5), oracle.to(dtype), oracle)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_gradients(kind):
    tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in [(3, 6), (6,), (6,)]]
    assert torch.autograd.gradcheck(lambda x, w, b: norm(x, w, b, kind=kind, eps=1e-5), tensors)


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-3, 1e3), st.integers(0, 2**32))
def test_rms_norm_does_not_see_scale(scale, seed):
    x = torch.randn(4, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    scaled = norm(scale * x, None, kind="rms", eps=0.0)
    torch.testing.assert_close(scaled, norm(x, None, kind="rms", eps=0.0), rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(-10, 10), st.integers(0, 2**32))
def test_layer_norm_sees_neither_scale_nor_shift(scale, shift, seed):
    x = torch.randn(4, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    moved = norm(scale * (x + shift), None, kind="layer", eps=0.0)
    torch.testing.assert_close(moved, norm(x, None, kind="layer", eps=0.0), rtol=1e-10, atol=1e-10)


def test_rows_of_a_strided_view_and_no_rows():
    x = torch.randn(6, 8, 5).transpose(1, 2)
    for kind in ("layer", "rms"):
        expected = norm(x.contiguous(), None, kind=kind, eps=1e-5)
        torch.testing.assert_close(norm(x, None, kind=kind, eps=1e-5), expected, rtol=1e-6, atol=1e-6)
        assert norm(torch.empty(0, 8), None, kind=kind, eps=1e-5).shape == (0, 8)


def test_unknown_kind(one_sentence):
    with pytest.raises(InputError) as error:
        norm(torch.ones(2, 4), None, kind="batch", eps=1e-5)
    one_sentence(error.value, "kind must be 'layer' or 'rms', got 'batch'")
