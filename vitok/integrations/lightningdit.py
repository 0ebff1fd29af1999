"""The calls of LightningDiT's tokenizer class (github.com/hustvl/LightningDiT): sampled latents, pictures as bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitok.evaluate.metrics import from_uint8, to_uint8
from vitok.integrations.tokens import Adapter
from vitok.io import resize_and_crop
from vitok.model import ViTok


class LightningDiTTokenizer(Adapter):
    """`encode_images(x)`, `decode_to_images(z)` and `img_transform(p_hflip, img_size)`. Nothing of it has gradients.

    Args:
        model: a model, or what `vitok.load` takes.
        img_size: side of the pictures that `img_transform` makes, pixels.
    """

    def __init__(self, model: ViTok | str | Path, img_size: int = 256) -> None:
        super().__init__(model)
        self.img_size = img_size

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] to latents [B, c, h, w] drawn from the posterior, with torch's generator."""
        return self.model.encode(images, layout="channels_first").sample()

    @torch.no_grad()
    def decode_to_images(self, z: Tensor) -> np.ndarray:
        """Latents [B, c, h, w] to pictures, uint8 [B, H, W, 3]."""
        pictures: np.ndarray = to_uint8(self.model.decode(z)).movedim(1, -1).cpu().numpy()
        return pictures

    def img_transform(self, p_hflip: float = 0.0, img_size: int | None = None) -> Transform:
        """A function of a data set's picture: short side to `img_size`, centre crop, mirrored with probability p_hflip,
        to float32 [3, img_size, img_size] in [-1, 1]. It can be pickled, and draws from torch's generator."""
        return Transform(img_size or self.img_size, p_hflip)


@dataclass(frozen=True)
class Transform:
    size: int
    p_hflip: float

    def __call__(self, picture: Image.Image) -> Tensor:
        pixels = resize_and_crop(torch.from_numpy(np.array(picture.convert("RGB"))), self.size).movedim(-1, 0)
        mirrored = self.p_hflip > 0 and torch.rand(()).item() < self.p_hflip
        return from_uint8(pixels.flip(2) if mirrored else pixels).contiguous()
