"""The deterministic bottleneck of ViTok-v2 (arXiv:2605.05331): a linear map and a layer norm without weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitok import ops
from vitok.layers import Linear


class PointPosterior:
    """A code without uncertainty, used like a `GaussianPosterior`: mode and sample are the code, the KL is zero."""

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean

    @property
    def std(self) -> Tensor:
        return torch.zeros_like(self.mean)

    @property
    def logvar(self) -> Tensor:
        """Minus infinity: the variance is exactly zero."""
        return torch.full_like(self.mean, float("-inf"))

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, seed: int | None = None, sample_ids: Tensor | None = None) -> Tensor:
        return self.mean

    def kl(self) -> Tensor:
        return self.mean.new_zeros(self.mean.shape[0])


class LayerNormBottleneck(nn.Module):
    """Tokens [B, L, width] to codes, codes to a `PointPosterior`; zero mean, unit variance a token."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.to_code = Linear(width, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Codes [B, L, c]."""
        return ops.norm(self.to_code(tokens), None, kind="layer", eps=1e-6)

    def posterior(self, codes: Tensor, grid: tuple[int, ...]) -> PointPosterior:
        return PointPosterior(codes.transpose(1, 2).unflatten(-1, grid))
