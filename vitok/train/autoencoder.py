"""What a training step computes of a model, as one module, so that DDP and FSDP2 see one forward."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitok import ops
from vitok.model import ViTok

NOISE_STREAM = 1 << 63
"""Flipped in a seed for the noise on latents: another stream than that of the posterior's samples."""


class Autoencoder(nn.Module):
    """Clips to latents and back to patch rows.

    Args:
        model: what is trained.
        frozen: leave the encoder as it is.
        noise: each sample's latents are decoded with normal noise, whose standard deviation is drawn for the sample as
            the absolute value of a normal number times this. It makes the decoder forgive a generator's errors
            (arXiv:2510.11690, noise-augmented decoding).
    """

    def __init__(self, model: ViTok, frozen: bool = False, noise: float = 0.0) -> None:
        super().__init__()
        self.model, self.frozen, self.noise = model, frozen, noise
        if frozen:
            model.encoder.requires_grad_(False)

    @property
    def blocks(self) -> Iterator[nn.Module]:
        """The transformer blocks of both stacks."""
        yield from (*self.model.encoder.stack.blocks, *self.model.decoder.stack.blocks)

    def recompute(self) -> None:
        """Keep only the inputs of blocks for backward, and compute the rest once more there."""
        for block in self.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def train(self, mode: bool = True) -> Autoencoder:
        super().train(mode)
        if self.frozen:
            self.model.encoder.eval()
        return self

    def forward(
        self, clips: Tensor, seed: int | None = None, sample_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """uint8 clips [B, T, H, W, 3] to patch rows [B, L, q * p * p * 3] and the KL divergences [B].

        A sample of the posterior is decoded, drawn by `seed` and `sample_ids`, int64 [B]; without a seed its mode.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            posterior = self.model.encode(clips, layout="channels_last")
        latents = posterior.mode() if seed is None else posterior.sample(seed, sample_ids)
        if seed is not None and self.noise:
            latents = latents + self._noise(latents, seed, sample_ids)
        return self.model.decode_patches(latents), posterior.kl().float()

    def _noise(self, latents: Tensor, seed: int, sample_ids: Tensor | None) -> Tensor:
        ids = torch.arange(len(latents), device=latents.device) if sample_ids is None else sample_ids
        noise = ops.normal_noise(seed ^ NOISE_STREAM, ids, 1 + latents[0].numel())
        return (self.noise * noise[:, :1].abs() * noise[:, 1:]).view_as(latents).to(latents.dtype)
