"""The Gaussian bottleneck: linear to mean and log-variance (Kingma and Welling, arXiv:1312.6114; ViTok, section 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitok import ops
from vitok.layers import Linear
from vitok.ops.gaussian_bottleneck import LOGVAR_RANGE


class GaussianPosterior:
    """N(mean, exp(logvar)) for every latent element; shapes [B, c, h, w] for images, [B, c, t, h, w] for clips.

    What `sample` and `kl` work on is one tensor, `moments` [B, L, 2c], of which an encoder's mean and logvar are views.
    """

    def __init__(self, mean: Tensor, logvar: Tensor) -> None:
        self._hold(torch.cat((mean, logvar), 1).flatten(2).transpose(1, 2), tuple(mean.shape[2:]))

    @classmethod
    def from_moments(cls, moments: Tensor, grid: tuple[int, ...]) -> GaussianPosterior:
        """Of moments [B, L, 2c], mean first; L is the product of `grid`, (h, w) or (t, h, w)."""
        posterior = cls.__new__(cls)
        posterior._hold(moments, grid)
        return posterior

    def _hold(self, moments: Tensor, grid: tuple[int, ...]) -> None:
        self.moments, self.grid = moments, grid
        self.mean, self._logvar = moments.transpose(1, 2).unflatten(-1, grid).chunk(2, dim=1)
        self._kl: Tensor | None = None

    @property
    def logvar(self) -> Tensor:
        return self._logvar.clamp(*LOGVAR_RANGE)

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def mode(self) -> Tensor:
        """The most likely latents, which evaluation uses: the mean."""
        return self.mean

    def sample(self, seed: int | Tensor | None = None, sample_ids: Tensor | None = None) -> Tensor:
        """Latents drawn by the reparametrisation trick, shaped like the mean.

        Args:
            seed: 0 <= seed < 2^64, or one int64 on the moments' device. The noise depends on (seed, sample id, element)
                only, so a picture gets the same noise in any batch and on any device. None draws a seed from torch's
                default generator.
            sample_ids: int64 [B], by default 0 .. B-1.
        """
        if seed is None:
            seed = torch.randint(2**62, ()).to(self.moments.device)
        # The KL costs next to nothing here, and training asks for it next.
        z, self._kl = ops.gaussian_sample(self.moments, seed=seed, sample_ids=sample_ids)
        return z.transpose(1, 2).unflatten(-1, self.grid)

    def kl(self) -> Tensor:
        """KL(posterior || N(0, I)) of each sample, in nats, averaged (not summed) over tokens and channels.

        Returns: [B], at least float32: near the prior its terms cancel to less than a half-precision number resolves.
        """
        wants_grad = self.moments.requires_grad and torch.is_grad_enabled()
        if self._kl is None or (wants_grad and not self._kl.requires_grad):
            _, self._kl = ops.gaussian_sample(self.moments, sample=False)
        return self._kl


class GaussianBottleneck(nn.Module):
    """Tokens [B, L, width] to moments, moments to a `GaussianPosterior` over latents."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.to_moments = Linear(width, 2 * channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Moments [B, L, 2c]."""
        return self.to_moments(tokens)

    def posterior(self, moments: Tensor, grid: tuple[int, ...]) -> GaussianPosterior:
        return GaussianPosterior.from_moments(moments, grid)
