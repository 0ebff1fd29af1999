"""attention against softmax(Q K' / sqrt(d)) V in float64."""

from __future__ import annotations

import math

import pytest
import torch

from vitok import InputError
from vitok.ops import attention


def formula(qkv):
    out = torch.empty_like(qkv[:, :, 0])
    for b in range(qkv.shape[0]):
        for head in range(qkv.shape[3]):
            q, k, v = qkv[b, :, :, head].unbind(1)
            scores = (q @ k.T / math.sqrt(q.shape[-1])).exp()
            out[b, :, head] = scores / scores.sum(-1, keepdim=True) @ v
    return out


@pytest.mark.parametrize("impl", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("head_dim", [8, 64, 72, 80, 96, 128])
@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_formula(impl, head_dim, tokens):
    qkv = torch.randn(2, tokens, 3, 2, head_dim, dtype=torch.float64)
    torch.testing.assert_close(attention(qkv, impl=impl), formula(qkv), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [15, 64, 130])
def test_fused_is_as_near_as_the_plain_composition(dtype, tokens, judge):
    qkv = (2 * torch.randn(2, tokens, 3, 2, 72)).to(dtype)
    judge(attention(qkv, impl="sdpa"), attention(qkv, impl="reference"), formula(qkv.double()))


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_gradients(impl):
    qkv = torch.randn(1, 4, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: attention(x, impl=impl), qkv)


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_strided_projection(impl):
    qkv = torch.randn(2, 6, 3, 24, 4)[:, :, :, ::2].transpose(3, 4)
    torch.testing.assert_close(attention(qkv, impl=impl), attention(qkv.contiguous(), impl=impl))


def test_large_scores_stay_finite():
    qkv = 300 * torch.ones(1, 5, 3, 1, 8)
    for impl in ("sdpa", "reference"):
        torch.testing.assert_close(attention(qkv, impl=impl), qkv[:, :, 0])


@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (2, 5, 2, 4, 8)])
def test_bad_shapes(shape, one_sentence):
    with pytest.raises(InputError) as error:
        attention(torch.ones(shape))
    one_sentence(error.value, "qkv must be [B, L, 3, heads, head_dim]", str(list(shape)))
