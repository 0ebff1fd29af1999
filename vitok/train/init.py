"""Starting a ViTok as the best linear tokenizer instead of from noise."""

from __future__ import annotations

import torch
from torch import nn

from vitok.bottlenecks import GaussianBottleneck
from vitok.errors import InputError
from vitok.evaluate.pca import PatchPCA
from vitok.layers import Attention, FeedForward
from vitok.model import ViTok


@torch.no_grad()
def init_from_pca(model: ViTok, pca: PatchPCA, logvar: float = -8.0) -> None:
    """Make `model` compute, exactly, the projection on the first `channels` principal components.

    Every block starts as the identity (its last matrices are zero), so tokens pass straight from the embed to the
    bottleneck. Tokens are the first coefficients, in units of pixels, in both stacks: what a block adds to any of them
    then moves the picture alike, which Adam needs. Latents are the first `channels` coefficients scaled to unit
    variance. InputError when the model's norms, positions or widths stand in the way.
    """
    config = model.config
    width = min(config.encoder_width, config.decoder_width, len(pca.components))
    embed, bottleneck, decoder = model.encoder.embed, model.encoder.bottleneck, model.decoder
    if not isinstance(bottleneck, GaussianBottleneck):
        raise InputError("init 'pca' needs the gaussian bottleneck")
    if config.final_norm or config.absolute != "none" or width < config.channels:
        raise InputError(
            "init 'pca' needs final_norm false, absolute 'none', and widths and components of at least `channels`"
        )
    if config.pixel_bias != "element":
        raise InputError("init 'pca' needs pixel_bias 'element', which holds the mean tubelet")
    for module in model.modules():
        if isinstance(module, Attention):
            nn.init.zeros_(module.proj.weight)
        if isinstance(module, FeedForward):
            nn.init.zeros_(module.down.weight)
    channels = config.channels
    deviation = pca.variances[:channels].sqrt().clamp(min=1e-4)
    embed.weight[:width] = pca.components[:width]
    embed.bias[:width] = -pca.components[:width] @ pca.mean
    bottleneck.to_moments.weight.zero_()
    bottleneck.to_moments.weight[:channels, :channels] = torch.diag(1 / deviation)
    bottleneck.to_moments.bias[channels:] = logvar
    decoder.from_latents.weight.zero_()
    decoder.from_latents.weight[:channels] = torch.diag(deviation)
    decoder.unembed.weight[:, :width] = pca.components[:width].T
    decoder.unembed.bias.copy_(pca.mean)
