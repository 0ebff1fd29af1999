"""Reading a latent cache of format "safetensors" for training: random access, and an order that is kind to disks."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from vitok.bottlenecks import GaussianPosterior
from vitok.cache.formats import MOMENTS
from vitok.cache.manifest import File, Record
from vitok.cache.store import Store
from vitok.errors import InputError
from vitok.parallel import Ranks

OPEN_SHARDS = 64
"""Shard files that a process holds mapped at once."""


class _Shard(NamedTuple):
    """A shard with samples: its number among all, its file and how many there are."""

    number: int
    file: File
    samples: int


@dataclass(frozen=True, eq=False)
class Stats:
    """Of the latents of a cache: mean and std, float32 [c], and `scaling_factor`, for trainers that take one number."""

    mean: Tensor
    std: Tensor
    scaling_factor: float

    def normalize(self, latents: Tensor) -> Tensor:
        """Latents [B, c, h, w] or [B, c, t, h, w] to mean 0 and deviation 1 in each channel."""
        mean, std = self._like(latents)
        return (latents - mean) / std

    def denormalize(self, latents: Tensor) -> Tensor:
        """What `normalize` undoes."""
        mean, std = self._like(latents)
        return latents * std + mean

    def _like(self, latents: Tensor) -> tuple[Tensor, ...]:
        shape = (-1, *[1] * (latents.dim() - 2))
        std = self.std.where(self.std > 0, 1)  # a channel that is constant becomes zero
        return tuple(each.to(latents.device, latents.dtype).reshape(shape) for each in (self.mean, std))


class LatentDataset(Dataset[dict[str, Any]]):
    """The samples of a finished cache of format "safetensors" (`vitok encode DATASET --out CACHE`).

    Item i is the i-th readable sample of the data set, a dict of
        mean, logvar, flipped_mean, flipped_logvar    [c, h, w] or [c, t, h, w], those that were encoded
        label    int, -1 where there is none          index    its number in the data set's listing
        size     int64 [2] or [3], of the original    name     its path in the data set

    `classes` are the names of the classes, `stats` the statistics of the latents, and `manifest`, a
    `vitok.cache.manifest.Manifest`, says what the cache was made by and of. Shard files are mapped when they are first
    needed, so a data set is cheap to open, to pickle and to hand to the workers of a `DataLoader`.

    Raises InputError for what is no such cache, is not finished, or has a file that is missing or of another length.

        data = LatentDataset("cache")
        loader = DataLoader(data, batch_size=256, sampler=ShardSampler(data), num_workers=4)
        latents = [data.stats.normalize(sample_latents(batch)) for batch in loader]
    """

    def __init__(self, cache: str | os.PathLike[str]) -> None:
        store = Store(cache)
        self.root, self.manifest = store.root, store.opened()
        if (format := self.manifest.options["format"]) != "safetensors":
            raise InputError(f"{self.root} is a cache of format {format}; LatentDataset reads safetensors")
        summary = store.summary()
        if summary is None:
            raise InputError(f"{self.root} is not finished: run the command that made it once more")
        self.classes: list[str] = self.manifest.data["classes"]
        found = summary.statistics
        self.stats = Stats(torch.tensor(found.mean), torch.tensor(found.std), found.scaling_factor or 1.0)
        self.shards: list[_Shard] = []
        for number in range(self.manifest.shards):
            record = _record(store, number)
            self.shards += [_Shard(number, file, len(record.samples)) for file in record.files]
        for shard in self.shards:
            self._check(shard.file)
        self.ends = list(accumulate(shard.samples for shard in self.shards))
        self._open: OrderedDict[int, tuple[dict[str, Tensor], list[str]]] = OrderedDict()

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} samples")
        index %= len(self)
        number = bisect_right(self.ends, index)
        tensors, names = self._shard(number)
        row = index - (self.ends[number - 1] if number else 0)
        item: dict[str, Any] = {key: tensors[key][row].clone() for key in MOMENTS if key in tensors}
        item |= {key: int(tensors[key][row]) for key in ("label", "index")}
        return item | {"size": tensors["size"][row].long(), "name": names[row]}

    @property
    def labels(self) -> Tensor:
        """int64 [len(self)]; reads every shard's."""
        return torch.cat([self._shard(number)[0]["label"] for number in range(len(self.shards))])

    def _shard(self, number: int) -> tuple[dict[str, Tensor], list[str]]:
        """Tensors, which are views of the file as it is on the disk, and names."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = self.shards[number]
        self._check(shard.file)
        path = self.root / shard.file.path
        try:
            with safe_open(path, framework="pt") as file:
                keys = list(file.keys())
                tensors = {key: file.get_tensor(key) for key in keys}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is damaged: {error}; see vitok cache verify") from error
        names = [sample.name for sample in _record(Store(self.root), shard.number).samples]
        if not {"mean", "label", "index", "size"} <= set(tensors) or any(
            len(t) != len(names) for t in tensors.values()
        ):
            raise InputError(f"{path} does not hold the {shard.samples} samples of its record")
        if len(self._open) == OPEN_SHARDS:
            self._open.popitem(last=False)
        self._open[number] = tensors, names
        return self._open[number]

    def _check(self, file: File) -> None:
        path = self.root / file.path
        try:
            size = os.stat(path).st_size
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}; see vitok cache verify") from error
        if size != file.bytes:
            raise InputError(f"{path} has {size} bytes and was written with {file.bytes}; see vitok cache verify")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


def sample_latents(batch: Mapping[str, Any], *, seed: int | None = None, flip: Tensor | None = None) -> Tensor:
    """Latents drawn from the posteriors of a collated batch of `LatentDataset` items, in the dtype of the cache.

    Args:
        batch: mean [B, c, h, w] or [B, c, t, h, w] and, unless the code is deterministic, logvar; index int64 [B].
        seed: of the noise, which depends on it and on each sample's index only; by default new at each call, from
            torch's default generator.
        flip: bool [B], the samples that are taken mirrored. InputError if those were not encoded.
    """
    mean, logvar = batch["mean"], batch.get("logvar")
    if flip is not None:
        if "flipped_mean" not in batch:
            raise InputError("mirrored samples are not in this cache; encode it with --flip")
        rows = flip.to(mean.device).view(-1, *[1] * (mean.dim() - 1))
        mean = torch.where(rows, batch["flipped_mean"], mean)
        logvar = None if logvar is None else torch.where(rows, batch["flipped_logvar"], logvar)
    if logvar is None:
        return mean
    return GaussianPosterior(mean, logvar).sample(seed, batch["index"].to(mean.device))


class ShardSampler(Sampler[int]):
    """Every index of a `LatentDataset` once an epoch, shuffled without jumping all over the disk.

    The shards come in a random order, which the ranks share out in runs, and samples are shuffled among `window` shards
    at a time: a rank reads `window` files at once and each file once, however large the cache is. The order
    is a function of (seed, epoch, rank, ranks).

    Args:
        data: the data set.
        seed: at least 0.
        rank, ranks: of this process; by default those of torch.distributed.
        window: shards; samples further apart than that do not meet in a batch.
        drop_last: leave out the fewer than `ranks` samples that keep ranks from having equally many. Without it
            a rank may have one more than another, for which DistributedDataParallel would wait in vain.

    Call `set_epoch` before each epoch, as with torch's DistributedSampler.
    """

    def __init__(
        self,
        data: LatentDataset,
        *,
        seed: int = 0,
        rank: int | None = None,
        ranks: int | None = None,
        window: int = 8,
        drop_last: bool = False,
    ) -> None:
        current = Ranks.current()
        self.rank = current.rank if rank is None else rank
        self.ranks = current.count if ranks is None else ranks
        if not 0 <= self.rank < self.ranks:
            raise InputError(f"rank must be from 0 to {self.ranks - 1}, got {self.rank}")
        if seed < 0 or window < 1:
            raise InputError(f"seed must be at least 0 and window at least 1, got {seed} and {window}")
        self._ends, self._seed, self._window, self._epoch = list(data.ends), seed, window, 0
        total = len(data) - len(data) % self.ranks if drop_last else len(data)
        self._from, self._to = (total * part // self.ranks for part in (self.rank, self.rank + 1))

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._to - self._from

    def __iter__(self) -> Iterator[int]:
        shards = np.random.default_rng((self._seed, self._epoch)).permutation(len(self._ends))
        mixing = np.random.default_rng((self._seed, self._epoch, 1 + self.rank))
        place, group = 0, []
        for number in shards.tolist():
            samples = np.arange(self._ends[number - 1] if number else 0, self._ends[number])
            begin, end = (min(max(edge - place, 0), len(samples)) for edge in (self._from, self._to))
            place += len(samples)
            if begin < end:
                group.append(samples[begin:end])
            if len(group) == self._window or (group and place >= self._to):
                yield from mixing.permutation(np.concatenate(group)).tolist()
                group = []


def _record(store: Store, shard: int) -> Record:
    record = store.record(shard)
    if record is None:
        raise InputError(f"shard {shard} of {store.root} is not finished, or its record is damaged")
    return record
