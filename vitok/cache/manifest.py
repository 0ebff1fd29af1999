"""What a cache says of itself: which model, options and data set made it, and what each finished shard holds.

`manifest.json` is written first and never changes, `manifest/00012.json` when shard 12 is on the disk, `summary.json`
when all are. All three are JSON, and the same bytes whoever writes them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vitok
from vitok.cache.listing import Listing
from vitok.checkpoint import weights_hash
from vitok.errors import InputError
from vitok.model import ViTok

FORMAT, VERSION = "vitok-cache", 1
MANIFEST, SUMMARY, RECORDS = "manifest.json", "summary.json", "manifest"
ONE_THREAD = 32768  # elements that torch does not share out among threads, which encoding needs meanwhile


@dataclass(frozen=True)
class Options:
    """What a cache's bytes depend on besides model and data set.

    format      one of `vitok.cache.formats.FORMATS`
    size        short side, then centre crop, pixels
    batch       samples that are encoded at once
    shard       samples of one unit of work, which is one file in most formats
    frames      of a clip
    dtype       of the stored latents
    arithmetic  dtype of the model
    flip        also the latents of the mirrored samples
    seed        of drawn samples
    """

    format: str
    size: int = 256
    batch: int = 8
    shard: int = 1024
    frames: int = 1
    dtype: str = "float32"
    arithmetic: str = "float32"
    flip: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Manifest:
    """manifest.json; `data` is the number of samples, a hash of their names and labels, and the classes."""

    model: str
    config_hash: str
    weights_hash: str
    config: dict[str, Any]
    data: dict[str, Any]
    options: dict[str, Any]
    shards: int
    vitok: str = vitok.__version__
    format: str = FORMAT
    version: int = VERSION

    @classmethod
    def of(cls, name: str, model: ViTok, listing: Listing, options: Options) -> Manifest:
        data = {
            "samples": len(listing),
            "listing_hash": listing.hash,
            "classes": listing.classes,
            "kind": "clips" if listing.clips else "pictures",
        }
        return cls(
            name, model.config.hash(), weights_hash(model), model.config.to_dict(), data,
            dataclasses.asdict(options), math.ceil(len(listing) / options.shard),
        )  # fmt: skip

    def to_bytes(self) -> bytes:
        return to_bytes(dataclasses.asdict(self))

    @classmethod
    def from_bytes(cls, data: bytes, path: object) -> Manifest:
        """InputError for what is no manifest, or one of a later version."""
        try:
            found = json.loads(data)
            if found["format"] != FORMAT:
                raise ValueError(f"its format is {found['format']!r}")
            if found["version"] != VERSION:
                raise ValueError(f"it has version {found['version']}, and this vitok reads {VERSION}")
            return cls(**found)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path} is not the manifest of a latent cache: {error}") from None

    def difference(self, other: Manifest) -> str:
        """How the first thing that matters was made otherwise, such as "with batch 8 (here 4)"; "" for nothing."""
        pairs: list[tuple[str, Any, Any]] = [
            ("by a model of config", self.config_hash, other.config_hash),
            ("by a model of weights", self.weights_hash, other.weights_hash),
            *((f"with {name}", value, other.options.get(name)) for name, value in self.options.items()),
            *((f"of a data set of other {name}:", value, other.data.get(name)) for name, value in self.data.items()),
            ("of shards", self.shards, other.shards),
        ]
        return next((f"{what} {_short(a)} (here {_short(b)})" for what, a, b in pairs if a != b), "")


@dataclass(frozen=True)
class File:
    """A file of a cache: its path there, / between folders, and its content's length and SHA-256."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Sample:
    name: str
    index: int
    label: int
    size: list[int]


@dataclass(frozen=True)
class Unreadable:
    name: str
    index: int
    label: int
    reason: str


@dataclass(frozen=True)
class Record:
    """A finished shard: its files, samples, and of latents drawn from them the sums over each channel's elements.

    `count` elements a channel, `sum` of their expectation and `sum_squares` of that of their square: of a posterior
    N(m, v) these are m and m^2 + v.
    """

    shard: int
    files: list[File]
    samples: list[Sample]
    unreadable: list[Unreadable]
    count: int
    sum: list[float]
    sum_squares: list[float]

    def to_bytes(self) -> bytes:
        return to_bytes(dataclasses.asdict(self))

    @classmethod
    def from_bytes(cls, data: bytes) -> Record:
        """ValueError for what is none."""
        try:
            found = json.loads(data)
            parts = {"files": File, "samples": Sample, "unreadable": Unreadable}
            lists = {name: [part(**each) for each in found[name]] for name, part in parts.items()}
            return cls(**{**found, **lists})
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"not the record of a shard: {error}") from None


def record_path(shard: int) -> str:
    return f"{RECORDS}/{shard:05d}.json"


@dataclass(frozen=True)
class Statistics:
    """Of the latents of a cache: their number, and of each channel's elements mean and standard deviation."""

    samples: int
    unreadable: int
    shards: int
    mean: list[float]
    std: list[float]
    scaling_factor: float | None
    """What latents are multiplied by to have unit variance over all channels together; None of constant ones."""

    @classmethod
    def of(cls, records: Callable[[], Iterator[Record]]) -> Statistics:
        """Of the shards recorded; `records` gives them, as often as it is called."""
        samples = unreadable = shards = 0
        parts: list[tuple[int, list[float], list[float]]] = []
        for record in records():
            shards += 1
            samples, unreadable = samples + len(record.samples), unreadable + len(record.unreadable)
            if record.count:
                parts.append((record.count, record.sum, record.sum_squares))
        count = sum(part[0] for part in parts)
        if not count:
            return cls(samples, unreadable, shards, [], [], None)
        mean = [math.fsum(channel) / count for channel in zip(*(part[1] for part in parts), strict=True)]
        square = [math.fsum(channel) / count for channel in zip(*(part[2] for part in parts), strict=True)]
        std = [math.sqrt(max(0.0, s - m * m)) for m, s in zip(mean, square, strict=True)]
        channels = len(mean)
        variance = math.fsum(square) / channels - (math.fsum(mean) / channels) ** 2
        return cls(samples, unreadable, shards, mean, std, 1 / math.sqrt(variance) if variance > 0 else None)


@dataclass(frozen=True)
class CacheSummary:
    """summary.json: what a finished cache holds, and its files besides those of the shards."""

    statistics: Statistics
    files: list[File]

    def to_bytes(self) -> bytes:
        return to_bytes({**dataclasses.asdict(self.statistics), "files": [dataclasses.asdict(f) for f in self.files]})

    @classmethod
    def from_bytes(cls, data: bytes) -> CacheSummary:
        """ValueError for what is none."""
        try:
            found = json.loads(data)
            files = [File(**each) for each in found.pop("files")]
            return cls(Statistics(**found), files)
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"not the summary of a cache: {error}") from None


def sample_sums(mean: Tensor, logvar: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of samples [N, c, ...] the sums over each channel's elements of their expectation and of that of their square,
    float64 [N, c]; not finite where an element is not."""
    step = max(1, ONE_THREAD // mean[0].numel())
    firsts, seconds = [], []
    for begin in range(0, len(mean), step):
        m = mean[begin : begin + step].double().flatten(2)
        square = m * m
        if logvar is not None:
            square += torch.exp(logvar[begin : begin + step].double()).flatten(2)
        firsts.append(m.sum(2))
        seconds.append(square.sum(2))
    return torch.cat(firsts), torch.cat(seconds)


def exact_sums(parts: Tensor) -> list[float]:
    """Over the samples of [N, c], rounded once, so that their order does not show."""
    return [math.fsum(channel) for channel in parts.T.tolist()]


def to_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
