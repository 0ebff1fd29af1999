"""Training batches: a function of (seed, step), fair to groups, indifferent to bad files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitok import InputError
from vitok.data.batches import Batches


def crops(folder: Path, **options: object) -> Batches:
    return Batches(folder, **({"batch": 4, "crop": 16, "short_side": (16, 32), "seed": 0} | options))


def plain(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (20, 20)) -> None:
    Image.new("RGB", size, colour).save(path)


def test_batches_are_a_function_of_seed_and_step(pictures):
    data, again, other = crops(pictures), crops(pictures), crops(pictures, seed=1)
    first = data[7]
    assert first.shape == (4, 16, 16, 3) and first.dtype == torch.uint8
    assert len(data) == 3 and data.skipped == []
    _ = again[3], again[100]
    assert torch.equal(again[7], first) and torch.equal(data[7], first)
    assert not torch.equal(data[8], first) and not torch.equal(other[7], first)


def test_worker_processes_change_nothing(pictures):
    data = crops(pictures)
    loader = torch.utils.data.DataLoader(data, batch_size=None, sampler=range(3, 6), num_workers=2)
    for step, batch in zip(range(3, 6), loader, strict=True):
        assert torch.equal(batch, data[step])


def test_groups_are_drawn_evenly(tmp_path):
    for i in range(9):
        plain(tmp_path / f"many_{i}.png", (200, 0, 0))
    plain(tmp_path / "few_0.png", (0, 0, 200))
    blue = {
        groups: (crops(tmp_path, batch=400, groups=groups)[0][:, 0, 0, 2] > 100).sum().item()
        for groups in ("", "^[a-z]+")
    }
    assert 15 <= blue[""] <= 70, "one picture in ten"
    assert 160 <= blue["^[a-z]+"] <= 240, "one group of two"


def test_both_flips_and_many_places_are_drawn(tmp_path):
    ramp = np.broadcast_to(np.linspace(0, 250, 64, dtype=np.uint8)[None, :, None], (32, 64, 3))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    batch = crops(tmp_path, batch=64)[0].float()
    rising = batch[:, 0, -1, 0] > batch[:, 0, 0, 0]
    assert 16 <= rising.sum() <= 48
    assert batch.mean((1, 2, 3)).unique().numel() > 32


def test_short_side_sets_the_scale(tmp_path):
    """At a short side of the crop the whole height is seen; at twice that, half of it."""
    ramp = np.broadcast_to(np.linspace(0, 240, 64, dtype=np.uint8)[:, None, None], (64, 64, 3))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    for short, seen in ((16, 225), (32, 112)):
        batch = crops(tmp_path, short_side=(short, short), batch=16)[0].float()
        spread = batch[:, -1, 0, 0] - batch[:, 0, 0, 0]
        torch.testing.assert_close(spread, torch.full((16,), float(seen)), rtol=0, atol=6)


@pytest.mark.parametrize("size", [(1, 1), (1, 60), (300, 2), (16, 16), (17, 16)])
def test_any_size_of_picture(tmp_path, size):
    plain(tmp_path / "picture.png", (10, 200, 30), size)
    for short_side in ((16, 32), (4, 8), (64, 64)):
        batch = crops(tmp_path, short_side=short_side)[0]
        assert batch.shape == (4, 16, 16, 3) and (batch == torch.tensor([10, 200, 30], dtype=torch.uint8)).all()


def test_bad_pictures_are_skipped_and_listed(pictures):
    (pictures / "text.jpg").write_text("no picture")
    (pictures / "empty.png").touch()
    whole = (pictures / "picture_0.png").read_bytes()
    (pictures / "cut.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "notes.txt").write_text("not looked at")
    data = crops(pictures)
    assert len(data) == 3 and len(data.skipped) == 3
    for name, message in zip(("cut.png", "empty.png", "text.jpg"), data.skipped, strict=True):
        assert name in message and "\n" not in message


def test_folders_without_pictures(tmp_path, one_sentence):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "text.jpg").write_text("no picture")
    for name, reason in (("empty", "holds no pictures"), ("bad", "text.jpg"), ("nothing", "nothing")):
        with pytest.raises(InputError) as error:
            crops(tmp_path / name)
        one_sentence(error.value, f"data folder {tmp_path / name} holds no readable picture", reason)
