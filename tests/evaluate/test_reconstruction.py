"""Scoring a folder of pictures."""

from __future__ import annotations

import math

import torch

from vitok import InputError
from vitok.evaluate.metrics import psnr, ssim
from vitok.evaluate.reconstruction import score_folder
from vitok.io import read_image, resize_and_crop


def test_scores_every_picture_and_goes_on_after_a_bad_one(pictures):
    (pictures / "a_text.jpg").write_text("no picture")
    seen = []

    def darker(batch: torch.Tensor) -> torch.Tensor:
        seen.append(batch)
        return (batch.float() * (2 / 255) - 1).movedim(-1, 1) - 0.1

    bad, *good = score_folder(pictures, 24, darker)
    assert isinstance(bad.error, InputError) and bad.path.name == "a_text.jpg"
    assert [score.path.name for score in good] == ["picture_0.png", "picture_1.png", "picture_2.png"]
    for score, batch in zip(good, seen, strict=True):
        original = resize_and_crop(read_image(score.path).pixels, 24)
        assert batch.dtype == torch.uint8 and torch.equal(batch[0], original)
        shown = (original.float() - 12.75).clamp(min=0).round().to(torch.uint8)
        assert math.isclose(score.psnr, psnr(shown, original), abs_tol=0.05)
        assert math.isclose(score.ssim, ssim(shown, original), abs_tol=0.005) and score.error is None


def test_a_perfect_reconstruction(pictures):
    scores = list(score_folder(pictures, 24, lambda batch: (batch.float() * (2 / 255) - 1).movedim(-1, 1)))
    assert [score.psnr for score in scores] == [math.inf] * 3


def test_a_folder_that_is_not_there(tmp_path, one_sentence):
    (score,) = score_folder(tmp_path / "nothing", 24, lambda batch: batch)
    one_sentence(score.error, str(tmp_path / "nothing"))
