"""tubelet_unembed: tokens to pixels. tubelet l of clip b = W . tokens[b, l] + bias, written into the clip and cropped.

The transposed convolution with kernel = stride of ViTok (arXiv:2501.09755), section 2, as one matrix product.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from vitok.errors import InputError
from vitok.ops._registry import Implementation, Op


def tubelet_unembed(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    tubelet: tuple[int, int],
    size: tuple[int, int, int],
    impl: str = "auto",
) -> Tensor:
    """Turn every token back into its tubelet of pixels.

    Args:
        tokens: [B, L, width] with L = ceil(T/q) * ceil(H/p) * ceil(W/p), row-major (t, y, x).
        weight: [q * p * p * 3, width], elements in (frame, row, column, colour) order.
        bias: [q * p * p * 3], or [3] for one bias a colour, or None.
        tubelet: (q, p).
        size: (T, H, W) of the clip; what the tubelets hold beyond it is cropped.
        impl: "auto" or "reference".

    Returns: pixels [B, 3, T, H, W], contiguous, in the tokens' dtype, no activation. Differentiable in all tensors.
    Raises InputError when L does not fit the size.

    >>> tubelet_unembed(torch.zeros(1, 4, 8), torch.ones(768, 8), tubelet=(1, 16), size=(1, 30, 32)).shape
    torch.Size([1, 3, 1, 30, 32])
    """
    q, p = tubelet
    grid = tuple(math.ceil(n / step) for n, step in zip(size, (q, p, p), strict=True))
    if tokens.dim() != 3 or tokens.shape[1] != math.prod(grid):
        raise InputError(f"tokens must be [B, {math.prod(grid)}, width] for size {size}, got {list(tokens.shape)}")
    return _OP(impl, tokens, weight, bias, q, p, grid, size)


def reference(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    q: int,
    p: int,
    grid: tuple[int, int, int],
    size: tuple[int, int, int],
) -> Tensor:
    if bias is not None and bias.numel() == 3:
        bias = bias.repeat(q * p * p)
    tubelets = F.linear(tokens, weight, bias).reshape(len(tokens), *grid, q, p, p, 3)
    pixels = tubelets.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(len(tokens), 3, grid[0] * q, grid[1] * p, grid[2] * p)
    return pixels[:, :, : size[0], : size[1], : size[2]].contiguous()


_OP = Op("tubelet_unembed", Implementation("reference", reference))
