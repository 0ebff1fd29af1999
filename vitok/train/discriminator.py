"""The adversary of stage 2: a StyleGAN-like discriminator, hinge losses and LeCam regularisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitok.parallel import mean_over_ranks

SLOPE = 0.2
"""Of every LeakyReLU."""
LECAM_DECAY = 0.999
"""Of the moving averages of logits."""


class BlurPool(nn.Module):
    """Half the height and width (rounded down), smoothed by (1, 3, 3, 1) / 8 each way first (arXiv:1904.11486)."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(taps, taps)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, 1, 4, 4)
        return F.conv2d(x, kernel, stride=2, padding=1, groups=channels)


class Block(nn.Module):
    """Two 3 x 3 convolutions with a blur-pool between, beside a blur-pool and a 1 x 1; their sum over sqrt 2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, inputs, 3, padding=1)
        self.second = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.pool = BlurPool()

    def forward(self, x: Tensor) -> Tensor:
        branch = F.leaky_relu(self.first(x), SLOPE)
        branch = F.leaky_relu(self.second(self.pool(branch)), SLOPE)
        return (branch + self.shortcut(self.pool(x))) / math.sqrt(2)


class Discriminator(nn.Module):
    """Pictures [B, 3, size, size] in [-1, 1] to logits [B]: positive where they look real.

    A 3 x 3 stem, residual blocks that halve the picture down to 4 x 4 (or less, where `size` is no power of two times
    4), and two linear maps; LeakyReLU 0.2, no norms (StyleGAN, arXiv:1812.04948, as arXiv:2501.09755 uses it).

    Args:
        size: side of the pictures, pixels.
        width: channels up to 64 pixels a side; half as many with each doubling beyond.
    """

    def __init__(self, size: int, width: int = 512) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, _channels(size, width), 3, padding=1)
        blocks = []
        while size > 4:
            blocks.append(Block(_channels(size, width), _channels(size // 2, width)))
            size //= 2
        self.blocks = nn.Sequential(*blocks)
        self.hidden = nn.Linear(width * size * size, width)
        self.logit = nn.Linear(width, 1)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, SLOPE)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.blocks(F.leaky_relu(self.stem(pictures), SLOPE))
        x = F.leaky_relu(self.hidden(x.flatten(1)), SLOPE)
        return self.logit(x).squeeze(1).float()


class Adversary(nn.Module):
    """A discriminator with its losses and the moving averages that LeCam regularisation (arXiv:2104.03310) needs."""

    real_logit: Tensor
    fake_logit: Tensor

    def __init__(self, discriminator: Discriminator, lecam_weight: float = 0.0) -> None:
        super().__init__()
        self.discriminator, self.lecam_weight = discriminator, lecam_weight
        self.register_buffer("real_logit", torch.zeros(()))
        self.register_buffer("fake_logit", torch.zeros(()))
        self._means: list[Tensor] = []  # of real and of fake logits, in each part of the step's batch

    def against(self, fakes: Tensor) -> Tensor:
        """Scalar loss of whoever made the pictures [B, 3, H, W]: minus their mean logit. Only they get a gradient."""
        self.discriminator.requires_grad_(False)
        logits = self.discriminator(fakes)
        self.discriminator.requires_grad_(True)
        return -logits.mean()

    def forward(self, reals: Tensor, fakes: Tensor) -> Tensor:
        """Scalar loss of the discriminator on pictures [B, 3, H, W]; only it gets a gradient.

        Hinge: mean max(0, 1 - real logit) + mean max(0, 1 + fake logit). LeCam holds each kind's logits to the other
        kind's average so far: mean max(0, real - fake average)^2 + mean max(0, real average - fake)^2.
        """
        real, fake = self.discriminator(reals.detach()), self.discriminator(fakes.detach())
        loss = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        if self.lecam_weight:
            lecam = F.relu(real - self.fake_logit).square().mean() + F.relu(self.real_logit - fake).square().mean()
            loss = loss + self.lecam_weight * lecam
            self._means.append(torch.stack([real.mean(), fake.mean()]).detach())
        return loss

    @torch.no_grad()
    def move_averages(self) -> None:
        """Once a step: move the averages of logits towards the means over its batch, of all parts and ranks."""
        if self._means:
            real, fake = mean_over_ranks(torch.stack(self._means).mean(0))
            self.real_logit.lerp_(real, 1 - LECAM_DECAY)
            self.fake_logit.lerp_(fake, 1 - LECAM_DECAY)
            self._means.clear()


def _channels(size: int, width: int) -> int:
    """Of the discriminator's maps of `size` pixels a side."""
    return max(1, width * 64 // max(64, size))
