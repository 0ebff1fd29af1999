"""gated_mlp_act against its formula in float64."""

from __future__ import annotations

import pytest
import torch

from vitok import InputError
from vitok.ops import gated_mlp_act

FORMULAS = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
}


@pytest.mark.parametrize("gate", FORMULAS)
@pytest.mark.parametrize("hidden", [1, 64, 2050, 3075])
def test_formula(gate, hidden):
    x = 4 * torch.randn(2, 3, 2 * hidden, dtype=torch.float64)
    expected = FORMULAS[gate](x[..., :hidden]) * x[..., hidden:]
    torch.testing.assert_close(gated_mlp_act(x, gate=gate), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", FORMULAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types(gate, dtype):
    x = torch.randn(64, 96).to(dtype)
    oracle = FORMULAS[gate](x[..., :48].double()) * x[..., 48:].double()
    error = (gated_mlp_act(x, gate=gate).double() - oracle).abs().max()
    assert error <= 2 * torch.finfo(dtype).eps * oracle.abs().max()


@pytest.mark.parametrize("gate", FORMULAS)
def test_gradients(gate):
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gated_mlp_act(x, gate=gate), x)


def test_strided_and_empty():
    x = torch.randn(8, 5).T
    assert torch.equal(gated_mlp_act(x), gated_mlp_act(x.contiguous()))
    assert gated_mlp_act(torch.empty(0, 8)).shape == (0, 4)


@pytest.mark.parametrize(
    ("shape", "gate", "message"),
    [((2, 4), "relu", "one of silu, gelu, got 'relu'"), ((2, 5), "silu", "even last dimension, got [2, 5]")],
)
def test_bad_arguments(shape, gate, message, one_sentence):
    with pytest.raises(InputError) as error:
        gated_mlp_act(torch.ones(shape), gate=gate)
    one_sentence(error.value, message)
