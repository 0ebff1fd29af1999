"""What a reconstruction is compared by: pixels, and features of a network by name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

import torch
from torch import Tensor, nn

from vitok import ops
from vitok.config import suggest
from vitok.errors import InputError
from vitok.evaluate.features import Unavailable, lpips_network
from vitok.evaluate.metrics import from_uint8
from vitok.evaluate.perceptual import VGGHED, WHERE

PLUGINS = "vitok.perceptual_losses"
"""Entry-point group of perceptual losses in installed packages."""


def pixel_loss(patches: Tensor, target: Tensor, tubelet: tuple[int, int], kind: str) -> Tensor:
    """Scalar distance of decoded patch rows [B, L, q * p * p * 3] from clips [B, T, H, W, 3], uint8 or in [-1, 1].

    "l2": mean squared error; "l1": mean absolute error; "charbonnier": mean of sqrt(error^2 + 1e-6); "log_l2": mean
    over pictures of log(MSE + 1e-4), which weighs every picture's decibels alike; 1e-4 is an error of 1.3 grey levels,
    below which nothing is gained.
    """
    if kind == "log_l2":
        return torch.log(ops.pixel_loss(patches, target, tubelet=tubelet, kind="l2") + 1e-4).mean()
    return ops.pixel_loss(patches, target, tubelet=tubelet, kind=kind).mean()


def perceptual_loss(name: str, weights: str = "") -> nn.Module | None:
    """The frozen network that measures how far pictures lie apart, or None for "none".

    Args:
        name: "none"; "vgg_hed" (`vitok.evaluate.perceptual.VGGHED`); "lpips", the package's with its VGG network
            (arXiv:1801.03924); or the name of an entry point of the group `vitok.perceptual_losses`, a callable that
            makes the module from `weights`.
        weights: path of the network's weights; of "lpips" torchvision's VGG16, "" for that in torch hub's cache.
            Nothing is downloaded.

    Returns: a module that maps two batches [B, 3, H, W], RGB in [-1, 1], float32, to distances, [B] or [B, 1, 1, 1],
    and is differentiable in the first. Raises InputError for an unknown name and for a package or weights that are
    missing.
    """
    if name == "none":
        return None
    if name == "vgg_hed":
        if not weights:
            raise InputError(f"perceptual 'vgg_hed' needs the path of its weights in 'perceptual_weights'; {WHERE}")
        return VGGHED(weights)
    if name == "lpips":
        try:
            return lpips_network("vgg", Path(weights) if weights else None, "perceptual_weights")
        except Unavailable as error:
            raise InputError(f"perceptual 'lpips': {error}; or choose 'vgg_hed', or 'none' to train without") from error
    plugins = {entry.name: entry for entry in entry_points(group=PLUGINS)}
    if name not in plugins:
        known = ("none", "vgg_hed", "lpips", *sorted(plugins))
        raise InputError(
            f"training field 'perceptual' must be one of {', '.join(known)} or an entry point of {PLUGINS} in an "
            f"installed package, got {name!r}{suggest(name, known)}"
        )
    return plugins[name].load()(weights).requires_grad_(False).eval()


def predicted_frames(patches: Tensor, tubelet: tuple[int, int], size: Sequence[int]) -> Tensor:
    """Patch rows [B, L, q * p * p * 3] of clips of size (T, H, W) as float32 pictures [B * T, 3, H, W]."""
    clips = ops.tubelet_scatter(patches, tubelet=tubelet, size=(size[0], size[1], size[2]))
    return clips.transpose(1, 2).flatten(0, 1).float()


def target_frames(clips: Tensor) -> Tensor:
    """uint8 clips [B, T, H, W, 3] as float32 pictures [B * T, 3, H, W] in [-1, 1]."""
    return from_uint8(clips.flatten(0, 1).movedim(-1, 1))
