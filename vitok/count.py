"""Exact parameters and operations of a model, from its config alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from vitok.config import StackConfig, ViTokConfig
from vitok.errors import InputError


@dataclass(frozen=True)
class Count:
    """What one picture or clip costs. The paper's "GFLOPs" are `macs` / 1e9; `flops` = 2 * `macs`.

    MACs are those of the matrix products (linear layers and both products of attention), encoder and decoder together.
    """

    params: int
    encoder_params: int
    decoder_params: int
    macs: int
    encoder_macs: int
    decoder_macs: int
    flops: int
    tokens: int
    floats: int


def count(
    name: str | ViTokConfig,
    *,
    size: int | tuple[int, int] = 256,
    frames: int = 1,
    preset: str = "paper",
    channels: int | None = None,
    **overrides: Any,
) -> Count:
    """Count a model on one picture of `size` pixels (a side, or (H, W)), or one clip of `frames` such frames.

    Takes a config, or what `create_model` takes. Allocates nothing.

    >>> count("S-B/16", size=256, channels=16, preset="author-v1").params
    128862827
    """
    config = (
        name
        if isinstance(name, ViTokConfig)
        else ViTokConfig.from_name(name, preset=preset, channels=channels, **overrides)
    )
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width, frames) < 1:
        raise InputError(f"size and frames must be positive, got size={size}, frames={frames}")
    tokens = prod(config.grid(frames, height, width))
    encoder, decoder, elements = config.encoder, config.decoder, config.tubelet_elements
    latent_width = config.channels * (2 if config.bottleneck == "gaussian" else 1)
    pixel_bias = 3 if config.pixel_bias == "channel" else elements
    encoder_params = (
        _linear(elements, encoder.width) + _stack_params(config, encoder) + _linear(encoder.width, latent_width)
    )
    decoder_params = (
        _linear(config.channels, decoder.width) + _stack_params(config, decoder) + decoder.width * elements + pixel_bias
    )
    encoder_macs = tokens * encoder.width * (elements + latent_width) + _stack_macs(encoder, tokens, config.window)
    decoder_macs = tokens * decoder.width * (elements + config.channels) + _stack_macs(decoder, tokens, config.window)
    macs = encoder_macs + decoder_macs
    return Count(
        params=encoder_params + decoder_params,
        encoder_params=encoder_params,
        decoder_params=decoder_params,
        macs=macs,
        encoder_macs=encoder_macs,
        decoder_macs=decoder_macs,
        flops=2 * macs,
        tokens=tokens,
        floats=tokens * config.channels,
    )


def _linear(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + outputs * bias


def _stack_params(config: ViTokConfig, stack: StackConfig) -> int:
    norm = stack.width * (2 if config.norm == "layer" else 1)
    norms = 2 if config.block == "serial" else 1
    scales = 0 if config.layer_scale is None else norms
    block = (
        _linear(stack.width, 3 * stack.width, config.qkv_bias)
        + _linear(stack.width, stack.width, config.proj_bias)
        + _linear(stack.width, 2 * stack.hidden, config.mlp_bias)
        + _linear(stack.hidden, stack.width, config.mlp_bias)
        + norms * norm
        + scales * stack.width
        + 2 * stack.head_dim * config.qk_norm
    )
    return stack.depth * block + norm * config.final_norm


def _stack_macs(stack: StackConfig, tokens: int, window: int | None) -> int:
    linear = tokens * stack.width * (4 * stack.width + 3 * stack.hidden)
    reach = tokens - 1 if window is None else min(window, tokens - 1)
    pairs = tokens * (2 * reach + 1) - reach * (reach + 1)  # of a query and a key that it sees
    return stack.depth * (linear + 2 * pairs * stack.width)
