"""Reconstruction quality on a folder of pictures: short side to a size, centre crop, uint8, PSNR and SSIM of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vitok.errors import InputError
from vitok.evaluate.metrics import psnr, ssim, to_uint8
from vitok.io.files import find_inputs
from vitok.io.images import read_image, resize_and_crop


@dataclass(frozen=True)
class Score:
    """One picture: PSNR in dB and SSIM, or the error that stands for it."""

    path: Path
    psnr: float = 0.0
    ssim: float = 0.0
    error: InputError | None = None


@torch.no_grad()
def score_folder(folder: str | Path, size: int, reconstruct: Callable[[Tensor], Tensor]) -> Iterator[Score]:
    """Score every picture below `folder`. `reconstruct` maps uint8 [1, size, size, 3] to floats [1, 3, size, size]."""
    for entry in find_inputs([folder], kinds=("image",)):
        try:
            if entry.error:
                raise entry.error
            original = resize_and_crop(read_image(entry.path).pixels, size)
        except InputError as error:
            yield Score(entry.path, error=error)
            continue
        reconstruction = to_uint8(reconstruct(original[None]))[0].movedim(0, -1).cpu()
        yield Score(entry.path, psnr(reconstruction, original), ssim(reconstruction, original))
