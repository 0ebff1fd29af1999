"""Pixel losses by hand."""

from __future__ import annotations

import math

import pytest
import torch

from vitok.train.losses import pixel_loss


def test_by_hand():
    target = torch.zeros(2, 3, 2, 2)
    prediction = target.clone()
    prediction[0] = 0.5
    prediction[1] = -0.1
    assert pixel_loss(prediction, target, "l1").item() == pytest.approx(0.3)
    assert pixel_loss(prediction, target, "l2").item() == pytest.approx((0.25 + 0.01) / 2)
    expected = (math.log(0.25 + 1e-4) + math.log(0.01 + 1e-4)) / 2
    assert pixel_loss(prediction, target, "log_l2").item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["l1", "l2", "log_l2"])
def test_gradients_are_finite_at_a_perfect_prediction(kind):
    prediction = torch.zeros(1, 3, 2, 2, requires_grad=True)
    pixel_loss(prediction, torch.zeros(1, 3, 2, 2), kind).backward()
    assert prediction.grad.isfinite().all()
