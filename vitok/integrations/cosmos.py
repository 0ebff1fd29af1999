"""The calls of NVIDIA's Cosmos tokenizers (github.com/NVIDIA/Cosmos-Tokenizer): 4D for pictures, 5D for clips."""

from __future__ import annotations

import torch
from torch import Tensor

from vitok.integrations.tokens import Adapter, is_discrete, lookup


class CosmosTokenizer(Adapter):
    """Encoder and decoder in one: `(latent,) = tok.encode(x)`, of a model of token ids `(indices, codes) =
    tok.encode(x)`, and `tok.decode(latent)` or `tok.decode(indices)`. Nothing of it has gradients."""

    @torch.no_grad()
    def encode(self, input_tensor: Tensor) -> tuple[Tensor, ...]:
        """Pixels [B, 3, H, W] or [B, 3, T, H, W] in [-1, 1] to latents [B, c, h, w] or [B, c, t, h, w], the mode; of a
        model of token ids to its ids, int64 [B, h, w] or [B, t, h, w], and their latents."""
        posterior = self.model.encode(input_tensor, layout="channels_first")
        if is_discrete(self.model):
            return posterior.ids, posterior.mode()  # type: ignore[union-attr]
        return (posterior.mode(),)

    @torch.no_grad()
    def decode(self, input_latent: Tensor) -> Tensor:
        """Latents, or of a model of token ids the ids, as `encode` gives them, to pixels in about [-1, 1]."""
        return self.model.decode(lookup(self.model, input_latent) if is_discrete(self.model) else input_latent)

    def autoencode(self, input_tensor: Tensor) -> Tensor:
        """Pixels there and back."""
        return self.decode(self.encode(input_tensor)[0])
