"""JPEG at a budget of bytes."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from vitok.evaluate.jpeg import jpeg_within
from vitok.evaluate.metrics import psnr
from vitok.io import read_image


def sizes(picture):
    for quality in range(1, 96):
        file = io.BytesIO()
        Image.fromarray(picture.numpy()).save(file, "JPEG", quality=quality, subsampling="4:2:0", optimize=True)
        yield file.tell()


@pytest.mark.parametrize("budget", [700, 1000, 1500])
def test_comes_nearest_below_the_budget(pictures, budget):
    picture = read_image(pictures / "picture_2.png").pixels
    decoded, size = jpeg_within(picture, budget)
    assert size == max(s for s in sizes(picture) if s <= budget)
    assert decoded.shape == picture.shape and decoded.dtype == torch.uint8 and 15 < psnr(decoded, picture) < 60


def test_a_budget_that_nothing_fits(pictures):
    picture = read_image(pictures / "picture_0.png").pixels
    assert jpeg_within(picture, 10)[1] == min(sizes(picture))
    assert jpeg_within(picture, 10**9)[1] == max(sizes(picture))
