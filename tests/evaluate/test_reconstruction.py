"""Scoring a folder of pictures."""

from __future__ import annotations

import math
import shutil

import pytest
import torch

from vitok import InputError
from vitok.evaluate.features import Comparison, Extractor
from vitok.evaluate.frechet import Moments
from vitok.evaluate.metrics import psnr, ssim, to_uint8
from vitok.evaluate.reconstruction import merge_scores, score_folder
from vitok.io import ClipReader, ClipWriter, read_image, resize_and_crop
from vitok.parallel import Ranks


def test_scores_every_picture_and_goes_on_after_a_bad_one(pictures):
    (pictures / "a_text.jpg").write_text("no picture")
    seen = []

    def reconstruct(batch: torch.Tensor) -> torch.Tensor:
        seen.append(batch)
        return (batch.float() * (2 / 255) - 1).movedim(-1, 1) - 0.1

    bad, *good = score_folder(pictures, 24, reconstruct)
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


def darker(batch):
    """Pictures or clips, uint8 with colours last, a little darker and softer: floats with colours second."""
    floats = batch.float() * (2 / 255) - 1
    return (0.9 * floats - 0.1).movedim(-1, 1)


def looks(source="test"):
    """An extractor of 4 features and 3 logits."""

    def features(pictures):
        x = pictures.double().mean((2, 3))
        return torch.cat([x, x[:, :1] * x[:, 1:2]], 1), x

    return Extractor(source, features)


def far(a, b):
    return (a - b).abs().mean((1, 2, 3))


def test_batches_and_slices_give_the_same_scores(pictures, files_of_five):
    whole = Comparison(looks())
    options = {"distances": {"far": far}}
    expected = list(score_folder(files_of_five, 24, darker, comparisons=[whole], **options))
    assert [score.path.name for score in expected] == sorted(score.path.name for score in expected)
    assert [score.index for score in expected] == list(range(6)) and expected[2].error
    for world, batch in ((1, 2), (1, 99), (2, 1), (3, 2), (9, 4)):
        parts = [Comparison(looks()) for _ in range(world)]
        scores = merge_scores(
            score_folder(files_of_five, 24, darker, batch=batch, comparisons=[parts[r]], rank=r, world=world, **options)
            for r in range(world)
        )
        for a, b in zip(scores, expected, strict=True):
            assert (a.path, a.index, a.psnr, a.ssim, a.distances) == (b.path, b.index, b.psnr, b.ssim, b.distances)
            assert (a.error is None) == (b.error is None)
        total = parts[0]
        for part in parts[1:]:
            total.merge(part)
        assert total.frechet_distance() == pytest.approx(whole.frechet_distance(), rel=1e-9)
        assert total.reconstructions.count == total.originals.count == 5 and sorted(total.logits) == [0, 1, 3, 4, 5]
        assert all(torch.equal(total.logits[i], whole.logits[i]) for i in total.logits)


class Second(Ranks):
    """The second of two ranks, and what the first one has."""

    def __init__(self, *of_first):
        super().__init__(1, 2)
        object.__setattr__(self, "of_first", iter(of_first))

    def gathered(self, things):
        return [next(self.of_first), *things]


def test_what_all_ranks_saw(files_of_five):
    def see(rank=0, world=1, first=None):
        seen = Comparison(looks(), first.originals, shared=True) if first else Comparison(looks())
        list(score_folder(files_of_five, 24, darker, comparisons=[seen], rank=rank, world=world))
        return seen

    whole, (one, two) = see(), (see(rank, 2) for rank in range(2))
    total = two.of_all(Second((one.originals, one.reconstructions, one.logits)))
    later = see(1, 2, total).of_all(Second((Moments(), one.reconstructions, one.logits)))
    for each in (whole.of_all(Ranks()), total, later):
        assert each.originals.count == each.reconstructions.count == 5 and each.extractor.source == "test"
        assert each.frechet_distance() == pytest.approx(whole.frechet_distance(), rel=1e-9)
        assert all(torch.equal(each.logits[i], whole.logits[i]) for i in (0, 1, 3, 4, 5))
    assert two.reconstructions.count == 3, "the part stays as it is"


def test_ranks_share_out_whole_batches(files_of_five):
    """So that a model gets the same pictures at once as on one rank, and rounds alike."""

    def batches(rank=0, world=1):
        seen = []
        list(score_folder(files_of_five, 24, lambda x: darker(seen.append(x) or x), batch=2, rank=rank, world=world))
        return seen

    alone, shared = batches(), [batch for rank in (0, 1) for batch in batches(rank, 2)]
    assert [len(batch) for batch in alone] == [2, 1, 2]
    assert all(torch.equal(a, b) for a, b in zip((alone[0], alone[2], alone[1]), shared, strict=True))


@pytest.fixture
def files_of_five(pictures):
    """Five pictures, and words under the name of a picture between them."""
    shutil.copy(pictures / "picture_0.png", pictures / "picture_3.png")
    shutil.copy(pictures / "picture_1.png", pictures / "picture_4.png")
    (pictures / "picture_1b.png").write_text("no picture")
    return pictures


def test_originals_are_looked_at_once(pictures):
    first = Comparison(looks())
    list(score_folder(pictures, 24, darker, comparisons=[first]))
    second = Comparison(looks(), first.originals, shared=True)
    list(score_folder(pictures, 24, lambda x: darker(x) - 0.2, comparisons=[second]))
    assert second.originals is first.originals and second.originals.count == 3
    assert second.frechet_distance() > first.frechet_distance() > 0


def test_clips_score_the_first_frames(tmp_path, pixels):
    pytest.importorskip("av")
    for name, count in (("a", 7), ("b", 12), ("short", 3)):
        with ClipWriter(tmp_path / f"{name}.mp4", 25) as writer:
            writer.write(pixels(count, 32, 48, 3))
    (tmp_path / "c.png").write_text("pictures are left out")
    shapes, whole = [], []

    def reconstruct(batch):
        shapes.append(tuple(batch.shape))
        return darker(batch)

    clips = Extractor("clips", lambda x: (whole.append(x.shape) or x.float().mean((2, 3, 4)), None), clips=True)
    *good, bad = score_folder(
        tmp_path, 24, reconstruct, frames=5, batch=2, distances={"far": far}, comparisons=[Comparison(clips)]
    )
    assert shapes == [(2, 5, 24, 24, 3)] and whole == [(2, 3, 5, 24, 24)] * 2
    assert bad.path.name == "short.mp4" and "3 frames, fewer than the 5" in str(bad.error)
    for score in good:
        with ClipReader(score.path) as reader:
            original = resize_and_crop(next(reader.chunks(5)), 24)
        shown = to_uint8(darker(original[None]))[0].movedim(0, -1)
        each = [psnr(x, y) for x, y in zip(shown, original, strict=True)]
        assert score.psnr == pytest.approx(sum(each) / 5, abs=1e-9) and score.ssim == ssim(shown, original)
        assert score.distances["far"] == pytest.approx(
            ((shown.float() - original.float()).abs().mean() * 2 / 255).item(), rel=1e-4
        )
