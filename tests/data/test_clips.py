"""Clips out of films: consecutive frames, the same at every draw, never across a cut."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from vitok import InputError
from vitok.data.batches import Batches, DataSource
from vitok.data.sources import open_source
from vitok.io.video import ClipReader

pytest.importorskip("av")
OPTIONS = {"batch": 4, "crop": 16, "short_side": (16, 24), "seed": 0}


def read(source, index, place):
    frames = source.pick(index, place)
    return frames, torch.stack(list(source.read(index, frames)))


def test_every_place_gives_consecutive_frames_of_one_shot(tmp_path, film):
    path = film(tmp_path / "film.mp4", 7, 3, 6)
    everything = torch.cat(list(ClipReader(path).chunks(99)))
    source = open_source(tmp_path, 4)
    starts = []
    for place in np.linspace(0, 1, 28, endpoint=False):
        frames, clip = read(source, 0, float(place) + 1e-3)
        assert torch.equal(clip, everything[frames.start : frames.stop]), "sought and read through are the same"
        starts.append(frames.start)
    assert starts == sorted(starts) and set(starts) == {0, 1, 2, 3, 10, 11, 12}, "the shot of 3 frames is too short"
    assert all(starts.count(start) == 4 for start in set(starts)), "every start is as likely"


@pytest.mark.parametrize("seekable", [True, False])
def test_files_that_cannot_be_sought_are_read_through(tmp_path, film, monkeypatch, seekable):
    path = film(tmp_path / "film.mkv", 12)
    everything = torch.cat(list(ClipReader(path).chunks(99)))
    if not seekable:
        monkeypatch.setattr(ClipReader, "seek", lambda self, timestamp: False)
    _, clip = read(open_source(path, 5), 0, 0.999)
    assert torch.equal(clip, everything[-5:])


def test_a_film_without_so_long_a_shot(tmp_path, film, one_sentence):
    film(tmp_path / "film.mp4", 3, 3)
    source = open_source(tmp_path, 4)
    with pytest.raises(InputError) as error:
        source.pick(0, 0.5)
    one_sentence(error.value, "film.mp4 has no 4 frames in a row without a cut")


def test_a_clip_has_one_crop(tmp_path, film):
    """All frames of a shot are one still at rising brightness, so their differences are flat."""
    film(tmp_path / "film.mp4", 8)
    for options in ({}, {"crop_scale": (0.3, 1.0)}):
        batch = Batches(tmp_path, frames=4, **OPTIONS, **options)[1]
        assert batch.pixels.shape == (4, 4, 16, 16, 3) and batch.pixels.dtype == torch.uint8
        assert batch.clips is batch.pixels and batch.names == ("film.mp4",) * 4
        rise = batch.pixels[:, -1].float() - batch.pixels[:, 0].float()
        assert (rise.mean((1, 2, 3)) - 6).abs().max() < 2 and rise.std() < 3
        assert len({tuple(clip[0].flatten().tolist()) for clip in batch.pixels}) > 1


def test_batches_do_not_depend_on_what_was_read_before(tmp_path, film):
    film(tmp_path / "a.mp4", 9, 5)
    film(tmp_path / "b.mkv", 6, seed=1)
    data = Batches(tmp_path, frames=4, **OPTIONS)
    expected = [data[step] for step in range(4)]
    assert data.contents == "2 films"
    for step in (3, 0, 2):
        fresh = Batches(tmp_path, frames=4, **OPTIONS)
        assert torch.equal(fresh[step].pixels, expected[step].pixels) and fresh[step].names == expected[step].names


def test_pictures_and_clips_jointly(tmp_path, film, pictures):
    film(tmp_path / "films" / "film.mp4", 8)
    parts = [DataSource(str(pictures)), DataSource(str(tmp_path / "films"), 3.0)]
    data = Batches(parts, frames=4, **(OPTIONS | {"batch": 1}))
    assert data.contents == "3 pictures and 1 film"
    ranks = [data[step].pixels.dim() for step in range(200)]
    assert 120 <= ranks.count(5) <= 180 and ranks.count(4) == 200 - ranks.count(5), "three quarters are clips"


def test_damaged_films_are_replaced(tmp_path, film):
    whole = film(tmp_path / "good.mp4", 8).read_bytes()
    (tmp_path / "text.mp4").write_text("no film")
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    film(tmp_path / "short.mp4", 2)
    batch = Batches(tmp_path, frames=4, **(OPTIONS | {"batch": 32}))[0]
    assert set(batch.names) == {"good.mp4"} and len(batch.skipped) == 3


def test_a_film_that_is_shorter_than_it_was(tmp_path, film, one_sentence):
    source = open_source(film(tmp_path / "film.mp4", 8), 4)
    frames = source.pick(0, 0.99)
    film(tmp_path / "film.mp4", 5)
    with pytest.raises(InputError) as error:
        list(source.read(0, frames))
    one_sentence(error.value, "film.mp4 has changed since it was opened")


def test_without_pyav(tmp_path, film, one_sentence, monkeypatch):
    film(tmp_path / "film.mp4", 4)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError) as error:
        open_source(tmp_path, 4)
    one_sentence(error.value, "clips need PyAV", "pip install vitok[video]")
