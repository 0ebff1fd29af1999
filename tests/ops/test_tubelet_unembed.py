"""tubelet_unembed against the transposed convolution that it replaces."""

from __future__ import annotations

import pytest
import torch

from vitok import InputError
from vitok.ops import tubelet_unembed


@pytest.mark.parametrize(
    ("q", "p", "size"), [(1, 4, (1, 8, 12)), (2, 4, (3, 5, 9)), (4, 2, (1, 1, 1)), (1, 1, (1, 2, 3))]
)
@pytest.mark.parametrize("bias", ["none", "colour", "element"])
def test_equals_conv_transpose(q, p, size, bias):
    grid = [-(-n // step) for n, step in zip(size, (q, p, p), strict=True)]
    tokens = torch.randn(2, grid[0] * grid[1] * grid[2], 6, dtype=torch.float64)
    kernel = torch.randn(6, 3, q, p, p, dtype=torch.float64)
    per_colour, per_element = torch.randn(3).double(), torch.randn(q, p, p, 3).double()
    given = {"none": None, "colour": per_colour, "element": per_element.flatten()}[bias]
    full = torch.nn.functional.conv_transpose3d(tokens.mT.unflatten(-1, grid), kernel, stride=(q, p, p))
    if bias == "colour":
        full = full + per_colour.view(3, 1, 1, 1)
    if bias == "element":
        full = full + per_element.permute(3, 0, 1, 2).repeat(1, *grid)
    expected = full[:, :, : size[0], : size[1], : size[2]]
    weight = kernel.permute(2, 3, 4, 1, 0).flatten(0, 3)
    actual = tubelet_unembed(tokens, weight, given, tubelet=(q, p), size=size)
    assert actual.shape == (2, 3, *size) and actual.is_contiguous()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_gradients():
    shapes = [(1, 4, 2), (1 * 9 * 3, 2), (27,)]
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda x, w, b: tubelet_unembed(x, w, b, tubelet=(1, 3), size=(1, 4, 6)), tensors)


def test_no_clips():
    assert tubelet_unembed(torch.zeros(0, 4, 8), torch.ones(48, 8), tubelet=(1, 4), size=(1, 7, 7)).shape == (
        0,
        3,
        1,
        7,
        7,
    )


@pytest.mark.parametrize(
    ("shape", "size"), [((1, 4, 8), (1, 8, 9)), ((1, 4, 8), (1, 4, 8)), ((4, 8), (1, 8, 8)), ((1, 4, 8), (2, 8, 8))]
)
def test_tokens_that_do_not_fit(shape, size, one_sentence):
    with pytest.raises(InputError) as error:
        tubelet_unembed(torch.zeros(shape), torch.ones(48, 8), tubelet=(1, 4), size=size)
    one_sentence(error.value, "tokens must be [B, ", str(size), str(list(shape)))
