"""Training batches from weighted sources. Each is a function of (seed, step), so a run can stop and go on anywhere."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from vitok.data.sources import open_source
from vitok.data.workers import stream
from vitok.errors import InputError

CACHE_BYTES = 2 << 30
"""Decoded pictures and frames kept in memory, shared out among the processes that prepare batches."""
ATTEMPTS = 1000
"""Draws in a row that may turn out unreadable before a run ends."""


@dataclass(frozen=True)
class DataSource:
    """One part of a mixture."""

    path: str
    """What `vitok.data.sources.open_source` takes."""
    weight: float = 1.0
    """Of its samples among all that are drawn."""
    groups: str = ""
    """Regular expression; samples whose file names match it with the same text form a group, drawn evenly ("": one)."""
    camera: float = 0.0
    """Pictures become clips, seen by a camera that moves by up to so many pixels a frame (0: they stay pictures)."""


class Batch(NamedTuple):
    """`pixels` uint8 [B, H, W, 3] or [B, T, H, W, 3]; `names` of the samples; a sentence for each file `skipped`."""

    pixels: Tensor
    names: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    @property
    def clips(self) -> Tensor:
        """The pixels as [B, T, H, W, 3], a picture being a clip of one frame."""
        return self.pixels if self.pixels.dim() == 5 else self.pixels.unsqueeze(1)

    def listed(self, most: int = 4) -> str:
        """The first few names, and how many more there are."""
        names = list(dict.fromkeys(self.names))
        more = f" and {len(names) - most} more" if len(names) > most else ""
        return ", ".join(names[:most]) + more


class View(NamedTuple):
    """A crop as it is drawn, before the picture is known: `left` and `top` are fractions of the room there is."""

    zoom: float
    ratio: float
    left: float
    top: float
    flip: bool


class Motion(NamedTuple):
    """Of a camera over a picture: by how many pixels of the crop it moves, and how its field of view grows, a frame."""

    right: float
    down: float
    growth: float

    @classmethod
    def draw(cls, rng: np.random.Generator, fastest: float) -> Motion:
        """Any direction, speed log-uniform in [fastest / 100, fastest], growth up or down by at most a hundredth."""
        speed, angle = fastest * 10 ** rng.uniform(-2, 0), rng.uniform(0, 2 * math.pi)
        return cls(speed * math.cos(angle), speed * math.sin(angle), math.exp(rng.uniform(-0.01, 0.01)))


@dataclass(frozen=True)
class Crop:
    """Square crops of `size` pixels, flipped half of the time.

    Either a picture's short side is first scaled (small ones are enlarged) to a log-uniform draw from `short_side`; or,
    with `scale`, the crop covers a share of the picture's area drawn uniformly from `scale`, with sides in a ratio
    log-uniform in (3/4, 4/3), and is squeezed to a square (the random resized crop of the paper, where `scale` is
    0.8 to 1). One that does not fit into a long picture is as large as fits.
    """

    size: int
    short_side: tuple[int, int]
    scale: tuple[float, float] | None = None

    @property
    def largest(self) -> int:
        """The short side that a picture may be reduced to beforehand."""
        return max(self.short_side[1], self.size) if self.scale is None else 2 * self.size

    def draw(self, rng: np.random.Generator) -> View:
        if self.scale is None:
            zoom, ratio = math.exp(rng.uniform(*np.log(np.maximum(self.short_side, self.size)))), 1.0
        else:
            zoom, ratio = rng.uniform(*self.scale), math.exp(rng.uniform(-1, 1) * math.log(4 / 3))
        return View(zoom, ratio, rng.random(), rng.random(), bool(rng.random() < 0.5))

    def cut(self, picture: Image.Image, view: View) -> Tensor:
        """uint8 [size, size, 3]."""
        return self._seen(picture, self._box(picture.size, view), view)

    def film(self, picture: Image.Image, view: View, motion: Motion, frames: int) -> Tensor:
        """uint8 [frames, size, size, 3]: the crop as it moves; at the picture's edge the camera slides along it."""
        left, top, right, bottom = self._box(picture.size, view)
        seen = []
        for frame in range(frames):
            times = frame - (frames - 1) / 2  # the crop as drawn is the middle of the film
            across, down = (right - left) * motion.growth**times, (bottom - top) * motion.growth**times
            fit = min(1.0, picture.width / across, picture.height / down)
            across, down = across * fit, down * fit
            x = (left + right - across) / 2 + times * motion.right * across / self.size
            y = (top + bottom - down) / 2 + times * motion.down * down / self.size
            x, y = min(max(x, 0.0), picture.width - across), min(max(y, 0.0), picture.height - down)
            seen.append(self._seen(picture, (x, y, x + across, y + down), view))
        return torch.stack(seen)

    def _seen(self, picture: Image.Image, box: tuple[float, float, float, float], view: View) -> Tensor:
        pixels = np.array(picture.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box))
        return torch.from_numpy(pixels).flip(1) if view.flip else torch.from_numpy(pixels)

    def _box(self, size: tuple[int, int], view: View) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of what a view shows of a picture of that size."""
        width, height = size
        if self.scale is None:
            shortest = min(size)
            across = down = min(self.size * shortest / view.zoom, shortest)  # in the picture's own pixels
        else:
            area = view.zoom * width * height
            across, down = math.sqrt(area * view.ratio), math.sqrt(area / view.ratio)
            fit = min(1.0, width / across, height / down)
            across, down = min(across * fit, width), min(down * fit, height)
        left, top = view.left * (width - across), view.top * (height - down)
        return left, top, left + across, top + down


class Draw(NamedTuple):
    """A sample as it is drawn, before anything is read: which source, which of its samples, where in it, what crop,
    and the motion of the camera if there is one."""

    source: int
    sample: int
    place: float
    view: View
    motion: Motion | None


class Batches(Dataset[Batch]):
    """Random access to the batches of a run: item `step` is all pictures, or all clips, of that step.

    The kind of a batch is drawn by the sources' weights, then for each sample a source of that kind by weight, one of
    its groups evenly, a picture or clip of it evenly, and a crop, the same for all frames of a clip. A sample that
    cannot be read is replaced by another draw and told in the batch.

    Args:
        data: a path, or the parts of a mixture.
        batch: samples a step, over all ranks.
        crop, short_side, crop_scale: see `Crop`.
        frames: length of clips.
        groups: of the one path, or of the parts that have none of their own.
        rank, ranks: this process prepares the `rank`-th of `ranks` equal parts of each batch.
    """

    def __init__(
        self, data: str | Path | Sequence[DataSource], *, batch: int, crop: int, short_side: tuple[int, int],
        seed: int, groups: str = "", crop_scale: tuple[float, float] | None = None, frames: int = 16,
        rank: int = 0, ranks: int = 1,
    ) -> None:  # fmt: skip
        if batch % ranks:
            raise InputError(f"a batch of {batch} cannot be shared out evenly to {ranks} ranks")
        parts = [DataSource(str(data))] if isinstance(data, (str, Path)) else data
        self.batch, self.seed, self.rank, self.ranks = batch, seed, rank, ranks
        self.crop = Crop(crop, short_side, crop_scale)
        self.sources = [open_source(part.path, frames) for part in parts]
        self.skipped = [problem for source in self.sources for problem in source.skipped]
        self._weights = [part.weight for part in parts]
        self._cameras, self._frames = [part.camera for part in parts], frames
        self._groups = [
            _grouped(source.names, part.groups or groups) for source, part in zip(self.sources, parts, strict=True)
        ]
        self._kinds: dict[str, list[int]] = {}
        for number, (source, camera) in enumerate(zip(self.sources, self._cameras, strict=True)):
            if camera and source.kind == "clips":
                raise InputError(f"data {parts[number].path} has a camera, which is for pictures, but holds videos")
            self._kinds.setdefault("clips" if camera else source.kind, []).append(number)
        self._unreadable: dict[tuple[int, int], str] = {}
        self._cache: OrderedDict[tuple[int, int, int], Image.Image] = OrderedDict()
        self._cached_bytes = 0

    @property
    def contents(self) -> str:
        """Such as "140 pictures and 4 films"."""
        told = []
        for kind, thing in (("pictures", "picture"), ("clips", "film")):
            if numbers := [source for source in self.sources if source.kind == kind]:
                count = sum(len(source.names) for source in numbers)
                told.append(f"{count} {thing}{'s' * (count != 1)}")
        return " and ".join(told)

    def __getitem__(self, step: int) -> Batch:
        share = self.batch // self.ranks
        return self._samples(step, range(self.rank * share, (self.rank + 1) * share))

    def first(self, step: int, count: int) -> Batch:
        """The first `count` samples of a step, whatever the size of a batch and the rank."""
        return self._samples(step, range(count))

    def _samples(self, step: int, slots: range) -> Batch:
        rng = np.random.default_rng((self.seed, step))
        kinds = list(self._kinds.values())
        numbers = kinds[_choose(rng, [sum(self._weights[i] for i in each) for each in kinds])]
        draws = [self._draw(rng, numbers) for _ in range(slots.stop)]
        pixels, names, skipped = [], [], dict[str, None]()
        for slot in slots:
            sample, name, problems = self._sample(draws[slot], numbers, (self.seed, step, slot, 1))
            pixels.append(sample)
            names.append(name)
            skipped.update(dict.fromkeys(problems))
        return Batch(torch.stack(pixels), tuple(names), tuple(skipped))

    def stream(self, steps: range, workers: int) -> Iterator[Batch]:
        """The batches of `steps` in their order, prepared by that many processes, or by this one for 0."""
        return stream(self, steps, workers)

    def _draw(self, rng: np.random.Generator, numbers: list[int]) -> Draw:
        source = numbers[_choose(rng, [self._weights[i] for i in numbers])]
        groups = self._groups[source]
        group = groups[rng.integers(len(groups))]
        index = group[rng.integers(len(group))]
        place = rng.random() if self.sources[source].kind == "clips" else 0.0
        view, camera = self.crop.draw(rng), self._cameras[source]
        return Draw(source, index, place, view, Motion.draw(rng, camera) if camera else None)

    def _sample(self, draw: Draw, numbers: list[int], seed: tuple[int, ...]) -> tuple[Tensor, str, list[str]]:
        """Pixels, name, and what was skipped. Replacements have a stream of their own, so that no rank needs another's
        pictures to know what it draws itself."""
        replacements, skipped = np.random.default_rng(seed), list[str]()
        for _ in range(ATTEMPTS):
            try:
                source, pictures = self.sources[draw.source], self._pictures(draw)
                if draw.motion:
                    pixels = self.crop.film(pictures[0], draw.view, draw.motion, self._frames)
                else:
                    pixels = torch.stack([self.crop.cut(picture, draw.view) for picture in pictures])
                still = source.kind == "pictures" and not draw.motion
                return pixels[0] if still else pixels, source.names[draw.sample], skipped
            except InputError as error:
                skipped.append(str(error))
                draw = self._draw(replacements, numbers)
        raise InputError(f"{ATTEMPTS} samples drawn in a row cannot be read, such as this: {skipped[-1]}")

    def _pictures(self, draw: Draw) -> list[Image.Image]:
        """The frames of a sample (one of a picture), reduced; from memory if they are there."""
        sample = (draw.source, draw.sample)
        if sample in self._unreadable:
            raise InputError(self._unreadable[sample])
        source = self.sources[draw.source]
        try:
            frames = source.pick(draw.sample, draw.place)
            keys = [(*sample, frame) for frame in frames]
            if all(key in self._cache for key in keys):
                for key in keys:
                    self._cache.move_to_end(key)
                return [self._cache[key] for key in keys]
            pictures = [self._reduced(pixels) for pixels in source.read(draw.sample, frames)]
        except InputError as error:
            self._unreadable[sample] = str(error)
            raise
        for key, picture in zip(keys, pictures, strict=True):
            self._keep(key, picture)
        return pictures

    def _reduced(self, pixels: Tensor) -> Image.Image:
        picture = Image.fromarray(pixels.numpy())
        scale = self.crop.largest / min(picture.size)
        if scale >= 1:
            return picture
        return picture.resize([max(1, round(n * scale)) for n in picture.size], Image.Resampling.BICUBIC)

    def _keep(self, key: tuple[int, int, int], picture: Image.Image) -> None:
        worker = get_worker_info()
        room = CACHE_BYTES // (worker.num_workers if worker else 1)
        if key not in self._cache:
            self._cached_bytes += _bytes(picture)
        self._cache[key] = picture
        while self._cached_bytes > room:
            self._cached_bytes -= _bytes(self._cache.popitem(last=False)[1])


def _bytes(picture: Image.Image) -> int:
    return 3 * picture.width * picture.height


def _choose(rng: np.random.Generator, weights: list[float]) -> int:
    """A number drawn by weight; nothing is drawn where there is no choice."""
    if len(weights) == 1:
        return 0
    shares = np.cumsum(weights)
    return int(np.searchsorted(shares[:-1], rng.random() * shares[-1], side="right"))


def _grouped(names: Sequence[str], groups: str) -> list[list[int]]:
    """Indices by the text that `groups` matches in the file name, groups sorted by it."""
    by_group: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        match = re.search(groups, PurePosixPath(name).name)
        by_group.setdefault(match[0] if match else "", []).append(index)
    return [by_group[key] for key in sorted(by_group)]
