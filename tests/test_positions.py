"""Coordinates and rotary tables against the formulas, written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from vitok import InputError
from vitok.positions import axis_channels, coordinates, rope_table, sincos_table


def test_coordinates_are_row_major():
    coords = coordinates((2, 3, 4))
    assert coords.shape == (24, 3) and coords.dtype == torch.int64
    assert coords.tolist() == [[t, y, x] for t in range(2) for y in range(3) for x in range(4)]


@pytest.mark.parametrize(
    ("kind", "head_dim", "split"),
    [
        ("3d", 64, (16, 24, 24)),
        ("3d", 72, (24, 24, 24)),
        ("3d", 128, (32, 48, 48)),
        ("3d", 16, (0, 8, 8)),
        ("3d", 80, (16, 32, 32)),
        ("3d", 96, (32, 32, 32)),
        ("2d", 64, (0, 32, 32)),
        ("2d", 128, (0, 64, 64)),
    ],
)
def test_axis_split(kind, head_dim, split):
    assert axis_channels(kind, head_dim) == split


def test_a_head_too_small_to_split():
    with pytest.raises(InputError, match="cannot split a head of 8 channels"):
        axis_channels("3d", 8)


@pytest.mark.parametrize("kind", ["3d", "2d", "1d"])
@pytest.mark.parametrize("head_dim", [64, 72, 128])
def test_table_follows_the_formula(kind, head_dim):
    """Every pair's angle: position times theta^(-2i / n) for pair i of the n channels of its axis."""
    grid, theta = (3, 4, 5), 10000.0
    table = rope_table(coordinates(grid), grid, head_dim, kind, theta)
    assert table.shape == (2, 60, head_dim // 2) and table.dtype == torch.float32
    for t, y, x in [(0, 0, 0), (1, 2, 3), (2, 3, 4), (0, 3, 0), (2, 0, 0)]:
        row = (t * 4 + y) * 5 + x
        if kind == "1d":
            angles = [row * theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
        else:
            split = axis_channels(kind, head_dim)
            angles = [at * theta ** (-2 * i / n) for at, n in zip((t, y, x), split, strict=True) for i in range(n // 2)]
        expected = torch.tensor([[math.cos(a) for a in angles], [math.sin(a) for a in angles]])
        # float32 angles: a rounding or two of the largest
        torch.testing.assert_close(table[:, row], expected, rtol=0, atol=1e-7 * (2 + 3 * max(angles)))


def test_first_frame_of_a_clip_is_a_picture():
    clip = rope_table(coordinates((4, 3, 5)), (4, 3, 5), 64, "3d", 1e4)
    picture = rope_table(coordinates((1, 3, 5)), (1, 3, 5), 64, "3d", 1e4)
    assert torch.equal(clip[:, :15], picture)
    assert not torch.equal(clip[:, 15:30], picture)


def test_no_positions():
    assert rope_table(coordinates((1, 2, 2)), (1, 2, 2), 64, "none", 1e4) is None


@pytest.mark.parametrize("width", [768, 1152, 40])
def test_sincos(width):
    coords = coordinates((2, 3, 4))
    table = sincos_table(coords, width)
    n = width // 6 * 2
    assert table.shape == (24, width) and table.dtype == torch.float32
    assert torch.equal(table[:, 3 * n :], torch.zeros(24, width - 3 * n))
    for axis in range(3):
        for i in (0, 1, n // 2 - 1):
            angle = coords[:, axis].double() * 10000.0 ** (-2 * i / n)
            torch.testing.assert_close(table[:, axis * n + i].double(), angle.sin(), rtol=0, atol=1e-6)
            torch.testing.assert_close(table[:, axis * n + n // 2 + i].double(), angle.cos(), rtol=0, atol=1e-6)
    assert len(table.unique(dim=0)) == 24, "every token has its own position"
