"""Starting a ViTok as the best linear tokenizer instead of from noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitok.bottlenecks import GaussianBottleneck
from vitok.bottlenecks.gaussian import LOGVAR_RANGE
from vitok.config import ViTokConfig
from vitok.errors import InputError
from vitok.evaluate.pca import PatchPCA
from vitok.layers import Attention, FeedForward, Norm, Stack
from vitok.model import ViTok
from vitok.positions import axis_angles, axis_channels

NEIGHBOURS = ((0, 0, 1), (0, 0, -1), (0, 1, 0), (0, -1, 0), (0, 1, 1), (0, -1, -1), (0, 1, -1), (0, -1, 1))
IN_TIME = (*NEIGHBOURS[:4], (1, 0, 0), (-1, 0, 0), *NEIGHBOURS[4:])
"""Where heads look from a token, in (t, y, x), in the order in which they are given out."""


Track = Callable[[Sequence[Any], str, str], Iterable[Any]]
"""track(items, unit, label) gives the items and may show how far it has come; a start takes minutes."""


def untracked(items: Sequence[Any], unit: str, label: str) -> Iterable[Any]:
    return items


@torch.no_grad()
def init_from_pca(model: ViTok, pca: PatchPCA, beta: float) -> None:
    """Make `model` compute, exactly, the projection on the first `channels` principal components.

    Every block starts as the identity (its last matrices are zero), so tokens pass straight from the embed to the
    bottleneck. Tokens are the first coefficients, in units of pixels, in both stacks: what a block adds to any of them
    then moves the picture alike, which Adam needs. Latents are the first `channels` coefficients scaled to unit
    variance.

    What the blocks read is put in order as well, so that they learn from the first step:

    - Posteriors have the variances that are best for the mean squared error of a linear decoder + `beta` KL: so little
      noise that the blocks need not learn to remove it.
    - A token's last channel is a constant, large beside the rest. Norms divide by it and not by how bright or busy the
      tubelet is; their weights lift the small coefficients towards the large ones; and they hand on a 1, which serves
      the maps behind them for a bias.
    - With qk-norm and rotary positions by axis, each head looks at one neighbour of its token to begin with, in the
      manner of ConViT (arXiv:2103.10697), whatever the content.

    Raises InputError when the model's norms, positions or widths stand in the way.
    """
    config = model.config
    kept = min(config.encoder_width - 1, config.decoder_width - 1, len(pca.components))
    embed, bottleneck, decoder = model.encoder.embed, model.encoder.bottleneck, model.decoder
    if not isinstance(bottleneck, GaussianBottleneck):
        raise InputError("init 'pca' needs the gaussian bottleneck")
    if config.final_norm or config.absolute != "none" or kept < config.channels:
        raise InputError(
            "init 'pca' needs final_norm false, absolute 'none', as many components as `channels`, and widths above it"
        )
    if config.pixel_bias != "element":
        raise InputError("init 'pca' needs pixel_bias 'element', which holds the mean tubelet")
    silence(model)
    channels = config.channels
    deviations = pca.variances[:kept].sqrt().clamp(min=1e-4)
    deviation = deviations[:channels]
    constant = 2 * pca.variances.sum().sqrt()
    embed.weight[:kept] = pca.components[:kept]
    embed.bias[:kept] = -pca.components[:kept] @ pca.mean
    embed.weight[-1], embed.bias[-1] = 0, constant
    bottleneck.to_moments.weight.zero_()
    bottleneck.to_moments.weight[:channels, :channels] = torch.diag(1 / deviation)
    bottleneck.to_moments.bias[channels:] = best_logvar(deviation, beta, len(pca.mean))
    decoder.from_latents.weight.zero_()
    decoder.from_latents.weight[:channels] = torch.diag(deviation)
    decoder.from_latents.bias[-1] = constant
    decoder.unembed.weight[:, :kept] = pca.components[:kept].T
    decoder.unembed.weight[:, -1] = 0
    decoder.unembed.bias.copy_(pca.mean)
    for stack in (model.encoder.stack, model.decoder.stack):
        _set_norms(stack, deviations, constant)
        if can_look_at_neighbours(config):
            look_at_neighbours(stack, config)


def silence(model: ViTok) -> None:
    """Make every block the identity."""
    for module in model.modules():
        if isinstance(module, Attention):
            nn.init.zeros_(module.proj.weight)
        if isinstance(module, FeedForward):
            nn.init.zeros_(module.down.weight)


def best_logvar(deviation: Tensor, beta: float, elements: int) -> Tensor:
    """Of the posteriors of unit latents that are decoded with these factors: the minimum of
    deviation^2 var / elements + beta (var - log var) / (2 channels)."""
    ratio = 2 * len(deviation) * deviation.square() / elements
    return torch.log(beta / (beta + ratio)).clamp(min=LOGVAR_RANGE[0])


def _set_norms(stack: Stack, deviation: Tensor, constant: Tensor) -> None:
    """Norms of tokens whose first coefficients have these deviations and whose last channel is the constant."""
    spread = ((constant.square() + deviation.square().sum()) / stack.stack.width).sqrt()  # what a norm divides by
    for norm in stack.modules():
        if isinstance(norm, Norm):
            norm.weight[: len(deviation)] = spread / (deviation * deviation.mean()).sqrt()
            if norm.bias is None:
                norm.weight[-1] = spread / constant
            else:
                norm.weight[-1], norm.bias[-1] = 0, 1


def can_look_at_neighbours(config: ViTokConfig) -> bool:
    return config.qk_norm and config.rope in ("2d", "3d")


def look_at_neighbours(stack: Stack, config: ViTokConfig) -> None:
    """Queries and keys from the constant, with the angles to a neighbour between them.

    The fastest rotations of an axis tell neighbours best and have most of the energy, the slow ones tell turns apart.
    """
    several = config.clip_frames > config.temporal_patch
    places = torch.tensor(IN_TIME if several else NEIGHBOURS)
    heads, head_dim = stack.stack.heads, stack.stack.head_dim
    rotation = head_dim, config.rope, config.rope_theta
    angles, speeds = axis_angles(places, *rotation), axis_angles(torch.ones(1, 3), *rotation)
    size = 6 * speeds.sqrt()
    if not several:
        size[:, : axis_channels(config.rope, head_dim)[0] // 2] = 0
    attentions = [module for module in stack.modules() if isinstance(module, Attention)]
    for number, attention in enumerate(attentions):
        assert attention.q_norm is not None and attention.k_norm is not None  # of a model with qk-norm
        attention.q_norm.fill_(2.0)
        attention.k_norm.fill_(2.0)
        q, k, v = attention.qkv.weight.view(3, heads, head_dim, -1)
        q[:], k[:] = q / 10, k / 10  # of the content
        angle = angles[torch.arange(number * heads, (number + 1) * heads) % len(places)]
        q[..., -1] = torch.cat((size * angle.cos(), size * angle.sin()), -1)
        k[..., -1] = torch.cat((size, torch.zeros_like(size)), -1)
        v[..., -1] = 0
