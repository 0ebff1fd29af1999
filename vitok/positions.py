"""Where a token is: explicit (t, y, x) coordinates, and the rotary and sinusoidal tables made from them.

Tables are computed from the coordinates in every call and never kept: they are tiny beside the model, any size of clip
works, and nothing mutable stands in the way of torch.compile or a CUDA graph.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vitok.errors import InputError


def coordinates(grid: tuple[int, int, int], device: torch.device | str | None = None) -> Tensor:
    """Token coordinates of a (t, h, w) grid in row-major order: int64 [t * h * w, 3], columns (t, y, x)."""
    axes = [torch.arange(n, device=device) for n in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def axis_channels(kind: str, head_dim: int) -> tuple[int, int, int]:
    """Head channels rotated by (t, y, x). For "3d", y and x get 8 * ceil(d / 24) each and t the rest."""
    if kind == "2d":
        split = (0, head_dim // 2, head_dim // 2)
    else:
        spatial = 8 * math.ceil(head_dim / 24)
        split = (head_dim - 2 * spatial, spatial, spatial)
    if min(split) < 0 or any(n % 2 for n in split):
        raise InputError(f"rope {kind!r} cannot split a head of {head_dim} channels; use a head_dim of at least 16")
    return split


def rope_table(coords: Tensor, grid: tuple[int, int, int], head_dim: int, kind: str, theta: float) -> Tensor | None:
    """Cosines and sines for `vitok.ops.qk_norm_rope`: float32 [2, L, head_dim / 2], or None for kind "none".

    Channel i of the first half of a head is rotated against channel i of its second half. "3d" and "2d" give each axis
    its share of the pairs (t first, then y, then x) with frequencies theta^(-2i/n), n the axis's channels; "1d" rotates
    every pair by the flattened row-major index (ViTok, arXiv:2501.09755; Su et al., arXiv:2104.09864).
    """
    if kind == "none":
        return None
    if kind == "1d":
        t, y, x = coords.unbind(-1)
        angles = _angles((t * grid[1] + y) * grid[2] + x, head_dim, theta)
    else:
        angles = axis_angles(coords, head_dim, kind, theta)
    return torch.stack((angles.cos(), angles.sin()))


def axis_angles(coords: Tensor, head_dim: int, kind: str, theta: float) -> Tensor:
    """By which "3d" and "2d" of `rope_table` rotate a head's pairs at coordinates [L, 3]: float32 [L, head_dim / 2]."""
    split = axis_channels(kind, head_dim)
    return torch.cat([_angles(coords[:, axis], n, theta) for axis, n in enumerate(split)], dim=-1)


def sincos_table(coords: Tensor, width: int, theta: float = 10000.0) -> Tensor:
    """Fixed absolute positions added to the tokens: float32 [L, width].

    A third of the width (rounded down to an even number) belongs to each axis, half sines and half cosines; what is
    left over stays zero.
    """
    per_axis = width // 6 * 2
    parts = [f(_angles(coords[:, axis], per_axis, theta)) for axis in range(3) for f in (torch.sin, torch.cos)]
    return torch.nn.functional.pad(torch.cat(parts, dim=-1), (0, width - 3 * per_axis))


def _angles(position: Tensor, channels: int, theta: float) -> Tensor:
    exponents = torch.arange(0, channels, 2, dtype=torch.float32, device=position.device) / max(channels, 1)
    return position.float()[:, None] * theta**-exponents
