"""Training batches: a function of (seed, step), fair to groups and weights, indifferent to bad files and to workers."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitok import InputError
from vitok.data import batches as batches_module
from vitok.data.batches import Batch, Batches, Crop, DataSource, Motion, View

OPTIONS = {"batch": 4, "crop": 16, "short_side": (16, 32), "seed": 0}


class Pixels(Batches):
    """The pixels alone of each batch."""

    def __getitem__(self, step: int) -> torch.Tensor:
        return super().__getitem__(step).pixels


def crops(folder: Path, **options: object) -> Pixels:
    return Pixels(folder, **(OPTIONS | options))


def batches(data: object, **options: object) -> Batches:
    return Batches(data, **(OPTIONS | options))


def same(first: Batch, second: Batch) -> bool:
    return torch.equal(first.pixels, second.pixels) and first[1:] == second[1:]


def plain(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (20, 20)) -> None:
    Image.new("RGB", size, colour).save(path)


def test_batches_are_a_function_of_seed_and_step(pictures):
    data, again, other = crops(pictures), crops(pictures), crops(pictures, seed=1)
    first = data[7]
    assert first.shape == (4, 16, 16, 3) and first.dtype == torch.uint8
    assert data.contents == "3 pictures" and data.skipped == []
    _ = again[3], again[100]
    assert torch.equal(again[7], first) and torch.equal(data[7], first)
    assert not torch.equal(data[8], first) and not torch.equal(other[7], first)


def test_worker_processes_change_nothing(pictures):
    data = batches(pictures)
    for step, batch in zip(range(3, 6), data.stream(range(3, 6), workers=2), strict=True):
        assert isinstance(batch, Batch) and same(batch, data[step])


def test_ranks_share_a_batch_out(pictures, one_sentence):
    (pictures / "broken.png").write_text("no picture")  # its replacements are nobody else's affair
    whole = batches(pictures, batch=24)[5]
    parts = [batches(pictures, batch=24, rank=rank, ranks=3)[5] for rank in range(3)]
    assert torch.equal(torch.cat([part.pixels for part in parts]), whole.pixels)
    assert sum((part.names for part in parts), ()) == whole.names and whole.skipped
    with pytest.raises(InputError) as error:
        batches(pictures, batch=24, ranks=5)
    one_sentence(error.value, "a batch of 24 cannot be shared out evenly to 5 ranks")


def test_batches_of_a_picture_folder_stay_what_they_were(tmp_path):
    """The pictures and numbers that shipped weights were trained on: drawn one by one in this order, in these ways."""
    rng = np.random.default_rng(1)
    for name, size in (("a_0", (50, 90)), ("a_1", (40, 20)), ("b_0", (200, 70)), ("c_0", (24, 24)), ("c_1", (33, 64))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    groups = [["a_0", "a_1"], ["b_0"], ["c_0", "c_1"]]
    data = crops(tmp_path, batch=16, short_side=(24, 32), seed=3, groups="^[^_]+")
    for step in (0, 11, 2**32 + 1):
        rng = np.random.default_rng((3, step))
        for crop in data[step]:
            group = groups[rng.integers(3)]
            picture = Image.open(tmp_path / f"{group[rng.integers(len(group))]}.png")
            if min(picture.size) > 32:
                scale = 32 / min(picture.size)
                picture = picture.resize([round(n * scale) for n in picture.size], Image.Resampling.BICUBIC)
            shortest = min(picture.size)
            side = min(16 * shortest / math.exp(rng.uniform(math.log(24), math.log(32))), shortest)
            left, top = (rng.uniform(0, n - side) for n in picture.size)
            box = (left, top, left + side, top + side)
            pixels = np.array(picture.resize((16, 16), Image.Resampling.BICUBIC, box=box))
            assert (crop.numpy() == (pixels[:, ::-1] if rng.random() < 0.5 else pixels)).all()


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


def test_crop_scale_is_a_share_of_the_area(tmp_path):
    """Whole height and width are ramps, so the corners tell which part of the picture is seen."""
    y, x = np.mgrid[:48, :60]
    Image.fromarray(np.stack([y * 5, x * 4, 0 * x], -1).astype(np.uint8)).save(tmp_path / "ramp.png")
    batch = crops(tmp_path, crop_scale=(0.5, 0.6), batch=64)[0].float()
    across = (batch[:, 8, -1, 1] - batch[:, 8, 0, 1]).abs() / 4 * 16 / 15
    down = (batch[:, -1, 8, 0] - batch[:, 0, 8, 0]) / 5 * 16 / 15
    share, ratio = across * down / (48 * 60), across / down
    assert share.min() > 0.45 and share.max() < 0.65
    assert ratio.min() > 0.7 and ratio.max() < 1.4 and ratio.max() - ratio.min() > 0.3
    whole = crops(tmp_path, crop_scale=(1, 1), batch=8)[0].float()
    assert ((whole[:, -1, 8, 0] - whole[:, 0, 8, 0]) / 5 > 0.7 * 48).all()


def test_a_crop_too_large_for_a_long_picture_keeps_its_ratio():
    ramp = np.broadcast_to(np.arange(240, dtype=np.uint8)[None, :, None], (24, 240, 3))
    crop = Crop(16, (16, 16), (0.8, 1.0)).cut(Image.fromarray(ramp), View(0.9, 4 / 3, 0.5, 0.5, False))
    seen = (crop[0, -1, 0].item() - crop[0, 0, 0].item()) * 16 / 15
    assert seen == pytest.approx(24 * 4 / 3, abs=2), "the whole height, and 4/3 of it across"


def test_bad_pictures_are_replaced_and_told(pictures):
    good = {path.name for path in pictures.iterdir()}
    (pictures / "text.jpg").write_text("no picture")
    (pictures / "empty.png").touch()
    whole = (pictures / "picture_0.png").read_bytes()
    (pictures / "cut.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "notes.txt").write_text("not looked at")
    data = batches(pictures, batch=64)
    first = data[0]
    assert data.contents == "6 pictures" and set(first.names) == good
    assert len(first.skipped) == 3 and all("\n" not in message for message in first.skipped)
    for name in ("cut.png", "empty.png", "text.jpg"):
        assert sum(name in message for message in first.skipped) == 1
    assert same(data[0], first) and same(batches(pictures, batch=64)[0], first), "whatever was found bad before"


def test_nothing_to_draw(tmp_path, one_sentence):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "text.jpg").write_text("no picture")
    for name, reason in (("empty", "holds no pictures"), ("nothing", "does not exist")):
        with pytest.raises(InputError) as error:
            crops(tmp_path / name)
        one_sentence(error.value, f"data {tmp_path / name} holds no readable picture", reason)
    with pytest.raises(InputError) as error:
        crops(tmp_path / "bad")[0]
    one_sentence(error.value, "1000 samples drawn in a row cannot be read", "text.jpg")


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_leave_the_workers_as_one_sentence(tmp_path, one_sentence, workers):
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(InputError) as error:
        next(batches(tmp_path).stream(range(4), workers))
    one_sentence(error.value, "cannot be read")


@pytest.mark.parametrize("failing", ["worker", "caller"])
def test_a_failure_ends_the_process_though_workers_ignore_being_asked_to(pictures, failing):
    program = """if True:
        import sys
        from vitok.data.batches import Batches

        batches = Batches(sys.argv[1], batch=2, crop=16, short_side=(16, 32), seed=0)
        if sys.argv[2] == "worker":
            Batches.__getitem__ = lambda self, step: 1 // 0
        stream = batches.stream(range(9), 2)
        next(stream)
        raise OSError("caller")
    """
    command = [sys.executable, "-c", program, str(pictures), failing]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and ("ZeroDivisionError" if failing == "worker" else "caller") in result.stderr


def test_memory_is_bounded_and_changes_nothing(pictures, monkeypatch):
    data = batches(pictures, short_side=(16, 20))
    expected = [data[step] for step in range(6)]
    assert data._cached_bytes == sum(3 * picture.width * picture.height for picture in data._cache.values())
    assert len(data._cache) == 3 and all(min(picture.size) == 20 for picture in data._cache.values())
    monkeypatch.setattr(batches_module, "CACHE_BYTES", 3000)
    small = batches(pictures, short_side=(16, 20))
    for step in range(6):
        assert same(small[step], expected[step])
        assert small._cached_bytes <= 3000 and len(small._cache) <= 2


def test_pictures_are_decoded_once(pictures, monkeypatch):
    data = batches(pictures)
    read, source = [], data.sources[0]
    original = source.read
    monkeypatch.setattr(source, "read", lambda index, frames: read.append(index) or original(index, frames))
    assert read == [], "nothing is decoded before it is drawn"
    for step in range(8):
        _ = data[step]
    assert sorted(read) == [0, 1, 2]


def test_weights_of_a_mixture(tmp_path):
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        (tmp_path / name).mkdir()
        plain(tmp_path / name / "one.png", colour)
    parts = [DataSource(str(tmp_path / "red"), 3.0), DataSource(str(tmp_path / "blue"))]
    data = batches(parts, batch=400)
    blue = (data[0].pixels[:, 0, 0, 2] > 100).sum().item()
    assert data.contents == "2 pictures" and 60 <= blue <= 140, "a quarter"
    assert same(batches(parts, batch=400)[0], data[0])


def test_groups_of_a_part_come_before_those_of_all(tmp_path):
    for name in ("a_0", "a_1", "a_2", "b_0"):
        plain(tmp_path / f"{name}.png", (200, 0, 0) if name == "b_0" else (0, 0, 200))
    for own, low, high in (("", 160, 240), ("[0-9]", 40, 80)):  # numbers: the only 0 of b shares its group with a's
        data = batches([DataSource(str(tmp_path), groups=own)], batch=400, groups="^[a-z]")
        red = (data[0].pixels[:, 0, 0, 0] > 100).sum().item()
        assert low <= red <= high


def test_the_first_names_of_a_batch():
    batch = Batch(torch.zeros(6, 2, 2, 3), ("a", "b", "a", "c", "d", "e"))
    assert batch.listed(2) == "a, b and 3 more" and batch.listed() == "a, b, c, d and 1 more"
    assert batch.clips.shape == (6, 1, 2, 2, 3)


def ramp(path: Path, width: int, height: int) -> Image.Image:
    """Red tells the column and green the row, three levels a pixel."""
    across, down = np.meshgrid(3 * np.arange(width), 3 * np.arange(height))
    picture = Image.fromarray(np.stack([across, down, 0 * down], -1).astype(np.uint8))
    picture.save(path)
    return picture


def test_a_camera_moves_by_so_many_pixels_of_the_crop_a_frame(tmp_path):
    picture, crop = ramp(tmp_path / "ramp.png", 80, 60), Crop(16, (60, 60))
    view = View(zoom=60, ratio=1, left=0.5, top=0.5, flip=False)
    film = crop.film(picture, view, Motion(1.5, -0.5, 1), frames=5).float()
    assert film.shape == (5, 16, 16, 3)
    assert torch.equal(film[2].byte(), crop.cut(picture, view)), "the crop as drawn is the middle of the film"
    moved = (film[4] - film[0]).mean((0, 1)) / 3
    assert (moved - torch.tensor([6.0, -2.0, 0.0])).abs().max() < 0.2, "up to rounding"
    wider = crop.film(picture, view, Motion(0, 0, 1.1), frames=3)[..., 0].float()
    spans = wider[:, 0, -1] - wider[:, 0, 0]
    assert (spans[1:] / spans[:-1] - 1.1).abs().max() < 0.05 and (wider.mean((1, 2)) - wider.mean()).abs().max() < 1


def test_a_camera_slides_along_the_edge_of_its_picture(tmp_path):
    picture, crop = ramp(tmp_path / "ramp.png", 40, 40), Crop(16, (40, 40))
    view = View(zoom=40, ratio=1, left=0, top=1, flip=False)
    film = crop.film(picture, view, Motion(-9, 2, 1.01), frames=6)
    assert film[-1, 0, 0, 0] < 3 and film[-1, -1, 0, 1] > 3 * 38, "the last frame shows the lower left corner"
    whole = crop.film(picture, View(16, 1, 0, 0, False), Motion(50, 50, 1), frames=4)
    assert torch.equal(whole, whole[:1].expand_as(whole)), "where the whole picture is seen, nothing can move"


def test_pictures_seen_by_a_camera_are_clips(tmp_path):
    ramp(tmp_path / "ramp.png", 80, 60)
    still, moving = DataSource(str(tmp_path)), DataSource(str(tmp_path), camera=2)
    data = batches([moving], frames=4)
    assert data.contents == "1 picture" and data[0].pixels.shape == (4, 4, 16, 16, 3)
    assert same(data[0], batches([moving], frames=4)[0]) and not torch.equal(data[0].pixels, data[1].pixels)
    data = batches([moving], frames=4, short_side=(60, 60))
    speeds = torch.cat([data[step].pixels for step in range(50)])[..., 0].float().mean((2, 3)).diff(dim=1) / 3
    assert 1 < speeds.abs().max() < 2.5 and speeds.abs().median() < 0.5
    both = batches([still, moving], frames=4, batch=1)
    assert {both[step].pixels.dim() for step in range(20)} == {4, 5}
    assert same(batches([still])[3], batches(tmp_path)[3])


def test_a_camera_is_for_pictures(tmp_path, film, one_sentence):
    film(tmp_path / "film.mp4", 5)
    with pytest.raises(InputError) as error:
        batches([DataSource(str(tmp_path / "film.mp4"), camera=1)], frames=4)
    one_sentence(error.value, "film.mp4 has a camera, which is for pictures, but holds videos")
