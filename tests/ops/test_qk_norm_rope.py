"""qk_norm_rope against rotation by hand, and the properties that make it a position."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitok import InputError
from vitok.ops import qk_norm_rope
from vitok.positions import coordinates, rope_table


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


@pytest.mark.parametrize(
    ("shape", "table", "message"),
    [
        ((1, 4, 2, 2, 8), None, "qkv must be [B, L, 3, heads, head_dim]"),
        ((1, 4, 3, 16), None, "qkv must be [B, L, 3, heads, head_dim]"),
        ((1, 4, 3, 2, 8), (2, 4, 8), "table must be [2, 4, 4]"),
        ((1, 4, 3, 2, 8), (2, 1, 4), "table must be [2, 4, 4]"),
    ],
)
def test_bad_shapes(shape, table, message, one_sentence):
    with pytest.raises(InputError) as error:
        qk_norm_rope(torch.ones(shape), table=None if table is None else torch.ones(table))
    one_sentence(error.value, message)
