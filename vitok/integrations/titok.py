"""The calls of TiTok, MaskGen and RAR (github.com/bytedance/1d-tokenizer): pixels in [0, 1], a row of token ids."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from vitok.errors import InputError
from vitok.integrations.tokens import DiscreteAdapter
from vitok.model import ViTok


class TiTokTokenizer(DiscreteAdapter):
    """`tok.encode(x)[1]["min_encoding_indices"]` and `tok.decode_tokens(ids)`.

    Args:
        model: a model of token ids, or what `vitok.load` takes.
        grid: (h, w) of the tokens, or (t, h, w), which a row of them does not tell; by default it is a square.

    Tokens are in row-major order. Raises InputError for a model of continuous latents.
    """

    def __init__(self, model: ViTok | str | Path, grid: tuple[int, ...] | None = None) -> None:
        super().__init__(model)
        self.grid = grid

    def encode(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Pixels [B, 3, H, W] in [0, 1] to latents [B, c, 1, L] and {"min_encoding_indices": int64 [B, 1, L]}."""
        posterior = self.model.encode(x * 2 - 1, layout="channels_first")
        ids: Tensor = posterior.ids  # type: ignore[union-attr]
        return posterior.mode().flatten(2).unsqueeze(2), {"min_encoding_indices": ids.flatten(1).unsqueeze(1)}

    def decode(self, z_quantized: Tensor) -> Tensor:
        """Latents [B, c, 1, L] to pixels [B, 3, H, W] in about [0, 1]."""
        latents = z_quantized.flatten(2)
        return (self.model.decode(latents.unflatten(2, self._grid(latents.shape[2]))) + 1) / 2

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """Token ids [B, 1, L] or [B, L] to pixels [B, 3, H, W] in about [0, 1]."""
        if tokens.dim() not in (2, 3) or (tokens.dim() == 3 and tokens.shape[1] != 1):
            raise InputError(f"tokens must be [B, 1, L] or [B, L], got {list(tokens.shape)}")
        return self.decode(self.lookup(tokens.flatten(1)).unsqueeze(2))

    def _grid(self, tokens: int) -> tuple[int, ...]:
        grid = self.grid or (math.isqrt(tokens),) * 2
        if math.prod(grid) != tokens:
            raise InputError(f"{tokens} tokens do not fill a grid of {grid}; name theirs by grid=(h, w)")
        return grid
