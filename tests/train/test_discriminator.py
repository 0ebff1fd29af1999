"""The discriminator's shape, its filter, and hinge and LeCam losses by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vitok.train.discriminator import Adversary, BlurPool, Discriminator


@pytest.mark.parametrize(("size", "blocks", "side"), [(4, 0, 4), (16, 2, 4), (64, 4, 4), (24, 3, 3), (2, 0, 2)])
def test_one_logit_a_picture_from_a_map_of_four_by_four(size, blocks, side):
    network = Discriminator(size, width=8)
    assert len(network.blocks) == blocks and network.hidden.in_features == 8 * side * side
    assert network(torch.randn(3, 3, size, size)).shape == (3,)


def test_channels_halve_beyond_64_pixels():
    network = Discriminator(256, width=32)
    channels = [network.stem.out_channels, *(block.second.out_channels for block in network.blocks)]
    assert channels == [8, 16, 32, 32, 32, 32, 32]


def test_logits_neither_vanish_nor_explode_with_depth():
    logits = Discriminator(128, width=16)(torch.randn(32, 3, 128, 128))
    assert 0.1 < logits.square().mean().sqrt() < 10


def test_blur_pool():
    x = torch.zeros(1, 2, 8, 8)
    x[0, 1, 3, 3] = 64.0
    y = BlurPool()(x)
    assert y.shape == (1, 2, 4, 4) and y[0, 0].abs().max() == 0
    assert y[0, 1].tolist() == [[0, 0, 0, 0], [0, 9, 3, 0], [0, 3, 1, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(BlurPool()(torch.ones(1, 1, 8, 8))[..., 1:-1, 1:-1], torch.ones(1, 1, 2, 2))


class Mean(nn.Module):
    """A discriminator whose logit is twice a picture's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.scale * pictures.mean((1, 2, 3))


def flat(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone().requires_grad_()


def test_hinge_by_hand():
    adversary = Adversary(Mean())
    reals, fakes = flat(0.25, 1.0), flat(-1.0, 0.5)  # logits 0.5, 2 and -2, 1
    loss = adversary(reals, fakes)
    assert loss.item() == pytest.approx((0.5 + 0) / 2 + (0 + 2) / 2)
    loss.backward()
    assert reals.grad is None and fakes.grad is None
    assert adversary.discriminator.scale.grad.item() == pytest.approx((-0.25 + 0.5) / 2)


def test_only_the_pictures_learn_from_the_discriminator():
    adversary, fakes = Adversary(Mean()), flat(-1.0, 0.5)
    loss = adversary.against(fakes)
    assert loss.item() == pytest.approx(0.5)
    loss.backward()
    assert adversary.discriminator.scale.grad is None and adversary.discriminator.scale.requires_grad
    torch.testing.assert_close(fakes.grad, torch.full_like(fakes, -2 / 48 / 2))


def test_lecam_by_hand():
    adversary = Adversary(Mean(), lecam_weight=0.5)
    adversary.real_logit.fill_(0.6)
    adversary.fake_logit.fill_(-0.4)
    loss = adversary(flat(0.25), flat(0.1))  # logits 0.5 and 0.2
    assert loss.item() == pytest.approx(0.5 + 1.2 + 0.5 * (0.9**2 + 0.4**2))
    assert adversary.real_logit.item() == pytest.approx(0.6), "they move when the step is done"
    adversary.move_averages()
    assert adversary.real_logit.item() == pytest.approx(0.6 * 0.999 + 0.5 * 0.001)
    assert adversary.fake_logit.item() == pytest.approx(-0.4 * 0.999 + 0.2 * 0.001)
    assert {"real_logit", "fake_logit"} < adversary.state_dict().keys()
