"""Clips of consecutive frames out of video files, never across a cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from vitok.data.cuts import find_cuts
from vitok.errors import InputError
from vitok.io.video import ClipReader, require_pyav


class Film(NamedTuple):
    """What is kept of a video file: `timestamps` [frames] int64 if it can be sought by them, and its `cuts`."""

    frames: int
    timestamps: np.ndarray | None
    cuts: list[int]


class Clips:
    """Clips of `frames` frames from video files below `root`, as a `vitok.data.sources.Source`; needs PyAV.

    A file is decoded whole once, on first use, to find its length and its cuts. After that a clip costs the frames from
    the key frame before it on.
    """

    kind = "clips"

    def __init__(self, root: Path, paths: Sequence[Path], frames: int, skipped: list[str]) -> None:
        require_pyav()
        self.paths, self.frames, self.skipped = paths, frames, skipped
        self.names = [path.relative_to(root).as_posix() for path in paths]
        self._films: dict[int, Film] = {}

    def pick(self, index: int, place: float) -> range:
        film = self._film(index)
        ends = [-1, *film.cuts, film.frames - 1]
        starts = [range(last + 1, end + 2 - self.frames) for last, end in pairwise(ends)]
        number = int(place * sum(map(len, starts)))
        for shot in starts:
            if number < len(shot):
                return range(shot[number], shot[number] + self.frames)
            number -= len(shot)
        raise InputError(f"{self.paths[index]} has no {self.frames} frames in a row without a cut")

    def read(self, index: int, frames: range) -> Iterator[Tensor]:
        path, timestamps = self.paths[index], self._film(index).timestamps
        with ClipReader(path) as reader:
            if frames.start == 0 or (timestamps is not None and reader.seek(int(timestamps[frames.start]))):
                yield from self._next(reader, len(frames))
                return
        with ClipReader(path) as reader:
            reader.skip(frames.start)
            yield from self._next(reader, len(frames))

    def _next(self, reader: ClipReader, count: int) -> Iterator[Tensor]:
        came = 0
        for chunk in islice(reader.chunks(1), count):
            came += 1
            yield chunk[0]
        if came < count:
            raise InputError(f"{reader.path} has changed since it was opened")

    def _film(self, index: int) -> Film:
        if index not in self._films:
            timestamps: list[int | None] = []
            with ClipReader(self.paths[index]) as reader:
                cuts = find_cuts(_each(reader, timestamps))
            known = [time for time in timestamps if time is not None]
            sought = len(known) == len(timestamps) and all(a < b for a, b in pairwise(known))
            self._films[index] = Film(len(timestamps), np.array(known, np.int64) if sought else None, cuts)
        return self._films[index]


def _each(reader: ClipReader, timestamps: list[int | None]) -> Iterator[Tensor]:
    for chunk in reader.chunks(1):
        timestamps.append(reader.timestamp)
        yield chunk[0]
