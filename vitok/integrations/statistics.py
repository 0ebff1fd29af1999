"""What latents look like over a data set, for generators that want them with zero mean and unit variance."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitok.data.sources import Source, open_source
from vitok.errors import InputError
from vitok.io.images import resize_and_crop
from vitok.model import ViTok

BATCH = 8


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of every latent channel, the factor that gives all channels together a standard
    deviation of 1, and how many pictures or clips they are of, where that is known."""

    mean: list[float]
    std: list[float]
    scaling_factor: float
    samples: int | None = None

    @classmethod
    def of(cls, mean: Tensor, std: Tensor, samples: int | None = None) -> Statistics:
        """From float64 [c] each."""
        variance = (std.square() + mean.square()).mean() - mean.mean().square()
        return cls(mean.tolist(), std.tolist(), variance.item() ** -0.5 if variance > 0 else 1.0, samples)

    @property
    def shift_factor(self) -> float:
        """The mean of all channels together."""
        return sum(self.mean) / len(self.mean)


def read_statistics(path: str | Path) -> Statistics:
    """From a JSON file with `mean` and `std`, a number a channel, and `scaling_factor`: summary.json of a latent cache.

    Raises InputError when it cannot be read or holds something else.
    """
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read statistics {path}: {error}") from error
    values = values if isinstance(values, dict) else {}
    mean, std, factor = (values.get(key) for key in ("mean", "std", "scaling_factor"))
    if not (isinstance(mean, list) and isinstance(std, list) and _finite(mean + std) and len(mean) == len(std) > 0):
        raise InputError(f"statistics {path} must hold `mean` and `std`, lists of one finite number a channel")
    if factor is None:
        return Statistics.of(torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64))
    if not _finite([factor]):
        raise InputError(f"statistics {path}: scaling_factor must be a finite number, got {factor!r}")
    return Statistics(mean, std, factor)


def _finite(values: list[Any]) -> bool:
    return all(isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) for x in values)


@torch.inference_mode()
def measure(model: ViTok, data: str | Path, *, size: int = 256, samples: int = 1000, seed: int = 0) -> Statistics:
    """Statistics of what a generator is trained on: posterior samples of the pictures or clips of a data set.

    A sample's variance is that of the mean and of the noise, and the noise's is known, so that nothing is drawn.

    Args:
        data: a folder, a file or a pattern, as in `vitok.data.sources.open_source`.
        size: pixels; the short side is resized to it and the centre square is taken.
        samples: at most so many, chosen by `seed`. Those that cannot be read are left out, and not counted.

    Raises InputError where there is no data, or none of it can be read.
    """
    source = open_source(data, model.config.clip_frames)
    total = torch.zeros(2, model.config.channels, dtype=torch.float64)
    count = read = 0
    clips = _clips(source, size, samples, seed)
    while batch := list(islice(clips, BATCH)):
        posterior = model.encode(torch.stack(batch), layout="channels_last")
        mean, variance = (x.double().cpu().transpose(0, 1).flatten(1) for x in (posterior.mean, posterior.std.square()))
        total += torch.stack((mean.sum(1), (mean.square() + variance).sum(1)))
        count, read = count + mean.shape[1], read + len(batch)
    if not count:
        raise InputError(f"data {data}: none of the chosen {source.kind} could be read")
    first, second = total / count
    return Statistics.of(first, (second - first.square()).clamp(min=0).sqrt(), read)


def _clips(source: Source, size: int, samples: int, seed: int) -> Iterator[Tensor]:
    """Some that can be read: uint8 [T, size, size, 3], all of one T."""
    generator = torch.Generator().manual_seed(seed)
    for index in torch.randperm(len(source.names), generator=generator).tolist()[:samples]:
        place = torch.rand((), generator=generator).item()
        try:
            frames = torch.stack([resize_and_crop(x, size) for x in source.read(index, source.pick(index, place))])
        except InputError:
            continue
        yield frames
