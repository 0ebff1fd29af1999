"""The Gaussian bottleneck: linear to mean and log-variance (Kingma and Welling, arXiv:1312.6114; ViTok, section 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitok import ops

LOGVAR_RANGE = (-30.0, 20.0)


class GaussianPosterior:
    """N(mean, exp(logvar)) for every latent element; shapes [B, c, h, w] for images, [B, c, t, h, w] for clips."""

    def __init__(self, mean: Tensor, logvar: Tensor) -> None:
        self.mean = mean
        self.logvar = logvar.clamp(*LOGVAR_RANGE)

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def mode(self) -> Tensor:
        """The most likely latents, which evaluation uses: the mean."""
        return self.mean

    def sample(self, seed: int | None = None, sample_ids: Tensor | None = None) -> Tensor:
        """Latents drawn by the reparametrisation trick, shaped like the mean.

        Args:
            seed: 0 <= seed < 2^64. The noise depends on (seed, sample id, element) only, so a picture gets the same
                latents in any batch and on any device. None draws a seed from torch's default generator.
            sample_ids: int64 [B], by default 0 .. B-1.
        """
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        if sample_ids is None:
            sample_ids = torch.arange(self.mean.shape[0], device=self.mean.device)
        tokens_last = self.mean.movedim(1, -1)
        noise = ops.normal_noise(seed, sample_ids, tokens_last[0].numel()).reshape(tokens_last.shape).movedim(-1, 1)
        return self.mean + self.std * noise.to(self.mean.dtype)

    def kl(self) -> Tensor:
        """KL(posterior || N(0, I)) of each sample, in nats, averaged (not summed) over tokens and channels.

        Returns: [B], at least float32: near the prior its terms cancel to less than a half-precision number resolves.
        """
        mean, logvar = (x if x.dtype == torch.float64 else x.float() for x in (self.mean, self.logvar))
        return 0.5 * (mean.square() + logvar.expm1() - logvar).flatten(1).mean(1)


class GaussianBottleneck(nn.Module):
    """Tokens [B, L, width] to a `GaussianPosterior` over latents."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.to_moments = nn.Linear(width, 2 * channels)

    def forward(self, tokens: Tensor, grid: tuple[int, ...]) -> GaussianPosterior:
        moments = self.to_moments(tokens).transpose(1, 2).unflatten(-1, grid)
        return GaussianPosterior(*moments.chunk(2, dim=1))
