"""JPEG at a budget of bytes, to put beside latents of as many."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitok.io.images import as_array


def jpeg_within(picture: Tensor, budget: int) -> tuple[Tensor, int]:
    """A picture uint8 [H, W, 3] through the best JPEG of at most `budget` bytes: the same shape, and its bytes.

    Baseline JPEG of Pillow, 4:2:0, optimised Huffman tables, whole file counted; the highest quality of 1..95 within
    the budget, found by bisection. Where even quality 1 takes more, that is what comes back.
    """
    image = Image.fromarray(as_array(picture, rank=3))
    low, high = 1, 96  # `low` fits or is the least there is, `high` does not fit
    best = _encode(image, low)
    while high - low > 1:
        quality = (low + high) // 2
        data = _encode(image, quality)
        if len(data) <= budget:
            low, best = quality, data
        else:
            high = quality
    with Image.open(io.BytesIO(best)) as decoded:
        return torch.from_numpy(np.array(decoded)), len(best)


def _encode(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, subsampling="4:2:0", optimize=True)
    return file.getvalue()
