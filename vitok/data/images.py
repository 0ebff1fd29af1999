"""A folder of pictures as training batches. Every batch is a function of (seed, step), so a run can go on anywhere."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vitok.errors import InputError
from vitok.io.files import find_inputs
from vitok.io.images import read_image


class ImageCrops(Dataset[Tensor]):
    """Random crops of a folder of pictures; item `step` is the uint8 batch [batch, crop, crop, 3] of that step.

    A picture is drawn from a group drawn evenly from the groups, scaled (small ones are enlarged) so that its short
    side is log-uniform in `short_side` pixels, cropped at random and flipped half of the time. Decoded pictures stay in
    memory, reduced to the largest short side drawn.

    Args:
        folder: searched recursively for pictures; those that cannot be read are left out and listed in `.skipped`.
        groups: regular expression; files whose names match it with the same text form a group ("" is one group of all).
    """

    def __init__(
        self, folder: str | Path, *, batch: int, crop: int, short_side: tuple[int, int], seed: int, groups: str = ""
    ) -> None:
        self.batch, self.crop, self.seed = batch, crop, seed
        self.short_side = (max(short_side[0], crop), max(short_side[1], crop))
        self.skipped: list[str] = []
        by_group: dict[str, list[Image.Image]] = {}
        for entry in find_inputs([folder], kinds=("image",)):
            try:
                if entry.error:
                    raise entry.error
                picture = self._reduced(read_image(entry.path).pixels)
            except InputError as error:
                self.skipped.append(str(error))
                continue
            match = re.search(groups, entry.path.name)
            by_group.setdefault(match[0] if match else "", []).append(picture)
        if not by_group:
            raise InputError(f"data folder {folder} holds no readable picture: {self.skipped[0]}")
        self.groups = [by_group[key] for key in sorted(by_group)]

    def __len__(self) -> int:
        return sum(len(group) for group in self.groups)

    def __getitem__(self, step: int) -> Tensor:
        rng = np.random.default_rng((self.seed, step))
        return torch.stack([self._draw(rng) for _ in range(self.batch)])

    def _reduced(self, pixels: Tensor) -> Image.Image:
        picture = Image.fromarray(pixels.numpy())
        scale = self.short_side[1] / min(picture.size)
        if scale >= 1:
            return picture
        return picture.resize([max(1, round(n * scale)) for n in picture.size], Image.Resampling.BICUBIC)

    def _draw(self, rng: np.random.Generator) -> Tensor:
        group = self.groups[rng.integers(len(self.groups))]
        picture = group[rng.integers(len(group))]
        short = math.exp(rng.uniform(*np.log(self.short_side)))
        shortest = min(picture.size)
        side = min(self.crop * shortest / short, shortest)  # of the crop, in the picture's own pixels
        left, top = (rng.uniform(0, n - side) for n in picture.size)
        box = (left, top, left + side, top + side)
        crop = picture.resize((self.crop, self.crop), Image.Resampling.BICUBIC, box=box)
        pixels = torch.from_numpy(np.array(crop))
        return pixels.flip(1) if rng.random() < 0.5 else pixels
