"""The calls of LlamaGen and GigaTok's VQ models (github.com/FoundationVision/LlamaGen): pixels in [-1, 1], flat ids."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vitok.errors import InputError
from vitok.integrations.tokens import DiscreteAdapter


class LlamaGenTokenizer(DiscreteAdapter):
    """`_, _, [_, _, ids] = vq.encode(x)` and `vq.decode_code(ids, shape)`; InputError for continuous latents."""

    def encode(self, x: Tensor) -> tuple[Tensor, tuple[None, ...], tuple[None, None, Tensor]]:
        """Pixels [B, 3, H, W] in [-1, 1] to (latents [B, c, h, w], no losses, (None, None, ids int64 [B * h * w]))."""
        posterior = self.model.encode(x, layout="channels_first")
        ids: Tensor = posterior.ids  # type: ignore[union-attr]
        return posterior.mode(), (None,) * 4, (None, None, ids.flatten())

    def decode(self, quant: Tensor) -> Tensor:
        """Latents [B, c, h, w] to pixels [B, 3, H, W] in about [-1, 1]."""
        return self.model.decode(quant)

    def decode_code(self, code_b: Tensor, shape: Sequence[int] | None = None, channel_first: bool = True) -> Tensor:
        """Token ids to pixels [B, 3, H, W] in about [-1, 1].

        Args:
            code_b: ids in row-major order, of any shape; [B, h, w] without `shape`.
            shape: of the latents, (B, c, h, w), or (B, h, w, c) where not `channel_first`.
        """
        if shape is not None:
            batch, *grid, channels = (shape[0], *shape[2:], shape[1]) if channel_first else shape
            if channels != self.model.config.channels or len(grid) != 2 or code_b.numel() != batch * grid[0] * grid[1]:
                raise InputError(
                    f"shape {tuple(shape)} does not fit {code_b.numel()} token ids and {self.model.config.channels} "
                    "latent channels"
                )
            code_b = code_b.reshape(batch, *grid)
        elif code_b.dim() != 3:
            raise InputError(f"without shape= token ids must be [B, h, w], got {list(code_b.shape)}")
        return self.decode(self.lookup(code_b))
