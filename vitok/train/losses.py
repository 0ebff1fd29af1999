"""Losses of stage 1."""

from __future__ import annotations

import torch
from torch import Tensor

from vitok import ops


def pixel_loss(patches: Tensor, target: Tensor, tubelet: tuple[int, int], kind: str) -> Tensor:
    """Scalar distance of decoded patch rows [B, L, q * p * p * 3] from clips [B, T, H, W, 3], uint8 or in [-1, 1].

    "l2": mean squared error; "l1": mean absolute error; "charbonnier": mean of sqrt(error^2 + 1e-6); "log_l2": mean
    over pictures of log(MSE + 1e-4), which weighs every picture's decibels alike; 1e-4 is an error of 1.3 grey levels,
    below which nothing is gained.
    """
    if kind == "log_l2":
        return torch.log(ops.pixel_loss(patches, target, tubelet=tubelet, kind="l2") + 1e-4).mean()
    return ops.pixel_loss(patches, target, tubelet=tubelet, kind=kind).mean()
