"""Clips a few frames at a time, so that memory does not grow with their length.

A model trained on clips takes `clip_frames` frames at once; one trained on pictures takes each frame as a picture,
several in a batch. Frames: uint8 [T, H, W, 3]. Latents of a clip: [1, c, t, h, w].
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from torch import Tensor

from vitok.errors import InputError
from vitok.evaluate.metrics import to_uint8
from vitok.io import LatentsReader
from vitok.model import ViTok

BATCH_TOKENS = 4096  # of pictures encoded together


def frames_at_once(model: ViTok, height: int, width: int) -> int:
    config = model.config
    if config.clip_frames > 1:
        return config.clip_frames
    return max(1, BATCH_TOKENS // prod(config.grid(1, height, width)))


def encode_frames(model: ViTok, frames: Tensor) -> Tensor:
    """The posterior mean of one chunk of frames."""
    if model.config.clip_frames > 1:
        return model.encode(frames[None], layout="channels_last").mode()
    return model.encode(frames, layout="channels_last").mode().transpose(0, 1)[None]


def decode_frames(model: ViTok, latents: Tensor, size: tuple[int, int, int]) -> Tensor:
    """One chunk of frames, uint8 [T, H, W, 3] on the CPU, for size (T, H, W)."""
    if model.config.clip_frames > 1:
        pixels = model.decode(latents, size=size)[0].transpose(0, 1)
    else:
        pixels = model.decode(latents[0].transpose(0, 1), size=size[1:])
    return to_uint8(pixels).movedim(1, -1).cpu()


def latent_chunks(model: ViTok, reader: LatentsReader) -> Iterator[tuple[Tensor, tuple[int, int, int]]]:
    """The latents of a file in the chunks that `encode_frames` made, with the size (T, H, W) of each.

    Raises InputError when there are not as many as the frames need.
    """
    frames, height, width = (1, *reader.size)[-3:]
    step = frames_at_once(model, height, width)
    if reader.steps != model.config.grid(frames, height, width)[0]:
        raise InputError(f"latents of {reader.steps} time steps do not belong to {frames} frames")
    pieces = reader.chunks(step // model.config.temporal_patch)
    for start, piece in zip(range(0, frames, step), pieces, strict=True):
        yield piece, (min(step, frames - start), height, width)
