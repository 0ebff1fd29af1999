"""Losses of stage 1."""

from __future__ import annotations

import torch
from torch import Tensor


def pixel_loss(prediction: Tensor, target: Tensor, kind: str) -> Tensor:
    """Scalar distance of two float pictures [B, 3, H, W] in [-1, 1].

    "l2": mean squared error; "l1": mean absolute error; "log_l2": mean over pictures of log(MSE + 1e-4), which weighs
    every picture's decibels alike; 1e-4 is an error of 1.3 grey levels, below which nothing is gained.
    """
    if kind == "l1":
        return (prediction - target).abs().mean()
    squared = (prediction - target).square()
    return squared.mean() if kind == "l2" else torch.log(squared.flatten(1).mean(1) + 1e-4).mean()
