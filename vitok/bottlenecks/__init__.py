"""Latent distributions, one file each; `BOTTLENECKS` maps the config's `bottleneck` to its module."""

from typing import Any

from vitok.bottlenecks.gaussian import GaussianBottleneck, GaussianPosterior
from vitok.bottlenecks.layernorm import LayerNormBottleneck, PointPosterior

Posterior = GaussianPosterior | PointPosterior
BOTTLENECKS: dict[str, Any] = {"gaussian": GaussianBottleneck, "layernorm": LayerNormBottleneck}

__all__ = [
    "BOTTLENECKS",
    "GaussianBottleneck",
    "GaussianPosterior",
    "LayerNormBottleneck",
    "PointPosterior",
    "Posterior",
]
