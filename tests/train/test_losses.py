"""Pixel losses by hand."""

from __future__ import annotations

import math

import pytest
import torch

from vitok.train.losses import pixel_loss


def test_by_hand():
    target = torch.zeros(2, 1, 2, 2, 3)
    patches = torch.zeros(2, 1, 12)
    patches[0] = 0.5
    patches[1] = -0.1
    assert pixel_loss(patches, target, (1, 2), "l1").item() == pytest.approx(0.3)
    assert pixel_loss(patches, target, (1, 2), "l2").item() == pytest.approx((0.25 + 0.01) / 2)
    assert pixel_loss(patches, target, (1, 2), "charbonnier").item() == pytest.approx(0.3, abs=1e-4)
    expected = (math.log(0.25 + 1e-4) + math.log(0.01 + 1e-4)) / 2
    assert pixel_loss(patches, target, (1, 2), "log_l2").item() == pytest.approx(expected)


def test_bytes_are_the_pixels_they_stand_for():
    target = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2, 1).expand(1, 1, 1, 2, 3)
    patches = torch.tensor([[[-1.0] * 3, [0.0] * 3]])
    assert pixel_loss(patches, target, (1, 1), "l2").item() == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["l1", "l2", "charbonnier", "log_l2"])
def test_gradients_are_finite_at_a_perfect_prediction(kind):
    patches = torch.zeros(1, 1, 12, requires_grad=True)
    pixel_loss(patches, torch.zeros(1, 1, 2, 2, 3), (1, 2), kind).backward()
    assert patches.grad.isfinite().all()
