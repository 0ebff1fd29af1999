"""Filling a cache: decoding in worker processes, encoding on the device, writing in a thread, all at once.

On a CPU decoding and encoding take turns where both would have all the cores.

Shard k is samples [k S, (k + 1) S) of the listing, encoded in batches that never cross it. What it holds follows from
the listing, its number, the model and the options alone, so any number of workers and processes writes the same bytes,
and a run that was stopped goes on with the shards that have no record.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from vitok import memory
from vitok.bottlenecks import PointPosterior
from vitok.cache.formats import FORMATS, Encoded, Format, Summary
from vitok.cache.listing import Listing
from vitok.cache.manifest import (
    Manifest,
    Options,
    Record,
    Sample,
    Statistics,
    Unreadable,
    exact_sums,
    record_path,
    sample_sums,
)
from vitok.cache.store import OWN, Store, check_path
from vitok.config import listed
from vitok.data.workers import stream
from vitok.errors import InputError
from vitok.model import ViTok
from vitok.parallel import Ranks, own_cores

POLL_SECONDS = 0.2
PATIENCE = 1800.0  # seconds in which no other rank has shown that it is at work, which it does after every batch


class Progress(NamedTuple):
    """Of one process: `samples` more are encoded of the `total` it has to do, and the share of the time since it
    began that it has waited for data."""

    samples: int
    total: int
    waiting: float


Tell = Callable[[Progress], None]


class Decoded(NamedTuple):
    """A batch as it comes from a worker: pixels [n, ...] uint8 of those that could be read (None of none)."""

    shard: int
    samples: int
    indices: list[int]
    sizes: list[tuple[int, ...]]
    unreadable: list[tuple[int, str]]
    pixels: Tensor | None


class Moments(NamedTuple):
    """mean, logvar (None of a deterministic code), and those of the mirrored samples where asked for."""

    mean: Tensor
    logvar: Tensor | None
    flipped_mean: Tensor | None
    flipped_logvar: Tensor | None

    def each(self, change: Callable[[Tensor], Tensor]) -> Moments:
        mean, *others = self
        return Moments(change(mean), *(None if x is None else change(x) for x in others))


Part = tuple[Decoded, Callable[[], Moments] | None]
"""A batch and what gives its moments, None where none of it could be read."""


class Batches(Dataset[Decoded]):
    """Decoded batches by (shard, range of samples)."""

    def __init__(self, listing: Listing, size: int) -> None:
        self.listing, self.size = listing, size

    def ahead(self, item: tuple[int, range]) -> None:
        for index in item[1]:
            self.listing.read.ahead(index)

    def __getitem__(self, item: tuple[int, range]) -> Decoded:
        shard, numbers = item
        indices, sizes, pixels, unreadable = list[int](), list[tuple[int, ...]](), list[Tensor](), []
        for index in numbers:
            try:
                sample, size = self.listing.read(index, self.size)
            except InputError as error:
                unreadable.append((index, str(error)))
                continue
            indices.append(index)
            sizes.append(size)
            pixels.append(sample)
        # Of a worker, stacked in the memory that it shares with who asks.
        return Decoded(shard, len(numbers), indices, sizes, unreadable, default_collate(pixels) if pixels else None)


class Waits(Iterator[Decoded]):
    """The same batches, and the `seconds` that were spent waiting for them."""

    def __init__(self, batches: Iterator[Decoded]) -> None:
        self.batches, self.seconds = batches, 0.0

    def __next__(self) -> Decoded:
        begun = time.perf_counter()
        try:
            return next(self.batches)
        finally:
            self.seconds += time.perf_counter() - begun


class Encoder:
    """A model made fast, and what it makes of a batch of pixels.

    On a GPU a batch's numbers are fetched while the next one is computed: what is returned waits for them.
    """

    def __init__(self, model: ViTok, options: Options) -> None:
        self.model = model.for_inference(getattr(torch, options.arithmetic))
        self.step, self.flip, self.dtype = model.config.clip_frames, options.flip, getattr(torch, options.dtype)
        self.device = model.device
        self._before: torch.cuda.Event | None = None

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Callable[[], Moments]:
        pixels = pixels.to(self.device, non_blocking=True)
        found = Moments(*self._moments(pixels), *(self._moments(pixels.flip(-2)) if self.flip else (None, None)))
        if self.device.type != "cuda":
            return lambda: found
        fetched = found.each(_fetched)
        done = torch.cuda.Event()
        done.record()
        if self._before is not None:
            self._before.synchronize()  # so that no more than two batches are on their way
        self._before = done

        def wait() -> Moments:
            done.synchronize()
            return fetched.each(Tensor.clone)

        return wait

    def _moments(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of pictures [B, H, W, 3] or clips [B, T, H, W, 3], clips as many frames at once as the model was made for."""
        if pixels.dim() == 4:
            parts = [self._posterior(pixels)]
        elif self.step > 1:
            parts = [self._posterior(part) for part in pixels.split(self.step, dim=1)]
        else:  # of pictures
            each = (self._posterior(frame) for frame in pixels.unbind(1))
            parts = [(mean.unsqueeze(2), None if logvar is None else logvar.unsqueeze(2)) for mean, logvar in each]
        if len(parts) == 1:
            return parts[0]
        means, logvars = zip(*parts, strict=True)
        return torch.cat(means, 2), None if logvars[0] is None else torch.cat(logvars, 2)

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        posterior = self.model.encode(pixels, layout="channels_last")
        logvar = None if isinstance(posterior, PointPosterior) else posterior.logvar
        return self._stored(posterior.mean), None if logvar is None else self._stored(logvar)

    def _stored(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).contiguous()


@dataclass(frozen=True)
class Shards:
    """What turns shards of a listing into files of a store."""

    listing: Listing
    options: Options
    store: Store

    @property
    def format(self) -> Format:
        return FORMATS[self.options.format]

    def samples(self, shard: int) -> range:
        first = shard * self.options.shard
        return range(first, min(first + self.options.shard, len(self.listing)))

    def batches(self, shard: int) -> Iterator[tuple[int, range]]:
        samples, step = self.samples(shard), self.options.batch
        return ((shard, samples[start : start + step]) for start in range(0, len(samples), step))

    def encode(self, encoder: Encoder, shards: Sequence[int], workers: int, tell: Tell = lambda _: None) -> None:
        """Make and record these shards; InputError when they cannot be written."""
        items = (item for shard in shards for item in self.batches(shard))
        total, begun = sum(len(self.samples(shard)) for shard in shards), time.perf_counter()
        device = encoder.device.type
        turns = device == "cpu" and torch.get_num_threads() + workers > own_cores()
        pinned = device == "cuda"
        decoded = stream(Batches(self.listing, self.options.size), items, workers, pinned=pinned, turns=turns)
        waits = Waits(decoded)
        writing: Future[None] | None = None
        with ExitStack() as stack:
            stack.callback(decoded.close)
            writer = stack.enter_context(ThreadPoolExecutor(1))
            for shard, group in groupby(waits, key=attrgetter("shard")):
                parts: list[Part] = []
                for batch in group:
                    if writing is not None and writing.done():
                        writing.result()  # a full disk ends the run at once
                    moments = None if batch.pixels is None else encoder(batch.pixels)
                    parts.append((batch._replace(pixels=self._kept(batch.pixels)), moments))
                    tell(Progress(batch.samples, total, waits.seconds / max(time.perf_counter() - begun, 1e-9)))
                if writing is not None:
                    writing.result()  # at most one shard waits while another is written
                writing = writer.submit(self._write, shard, parts)
            if writing is not None:
                writing.result()

    def _kept(self, pixels: Tensor | None) -> Tensor | None:
        """What a format needs of them, out of the memory that is shared with a worker."""
        return pixels.clone() if self.format.pixels and pixels is not None else None

    def _write(self, shard: int, parts: Sequence[Part]) -> None:
        names, labels = self.listing.names, self.listing.labels
        unreadable = [
            Unreadable(names[i], i, labels[i], reason) for batch, _ in parts for i, reason in batch.unreadable
        ]
        read = [(batch, moments()) for batch, moments in parts if moments is not None]
        if not read:
            return self.store.write_shard(Record(shard, [], [], unreadable, 0, [], []))
        indices = [index for batch, _ in read for index in batch.indices]
        pixels = [batch.pixels for batch, _ in read if batch.pixels is not None]
        moments = Moments(*map(_joined, zip(*(found for _, found in read), strict=True)))
        encoded = Encoded(
            [names[i] for i in indices], indices, [labels[i] for i in indices],
            [size for batch, _ in read for size in batch.sizes], **moments._asdict(), seed=self.options.seed,
            pixels=torch.cat(pixels).movedim(-1, 1) if pixels else None,
        )  # fmt: skip
        write_encoded(self.store, self.format, shard, encoded, unreadable)
        memory.give_back()


def _joined(parts: Sequence[Any]) -> Any:
    """All there are, or None where there are none."""
    return None if parts[0] is None else torch.cat(list(parts))


def _fetched(x: Tensor) -> Tensor:
    """On its way into page-locked memory."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def write_encoded(store: Store, format: Format, shard: int, encoded: Encoded, unreadable: Sequence[Unreadable]) -> None:
    """Write the files of a shard, then its record."""
    first, second = sample_sums(encoded.mean, encoded.logvar)
    finite = (first.isfinite() & second.isfinite()).all(1).tolist()
    if not all(finite):
        name, dtype = encoded.names[finite.index(False)], encoded.mean.dtype
        raise InputError(f"the latents of {name!r} are not finite in {dtype}; another --dtype may do")
    samples = [
        Sample(name, index, label, list(size))
        for name, index, label, size in zip(encoded.names, encoded.indices, encoded.labels, encoded.sizes, strict=True)
    ]
    files = store.write(_checked(format.shard(shard, encoded)))
    count = encoded.mean[:, 0].numel()
    record = Record(shard, files, samples, list(unreadable), count, exact_sums(first), exact_sums(second))
    store.write_shard(record)


def build(
    model: ViTok,
    listing: Listing,
    store: Store,
    options: Options,
    *,
    name: str,
    workers: int = 0,
    tell: Tell = lambda _: None,
    encode: Callable[[Shards, ViTok, Sequence[int], Tell], None] | None = None,
) -> Statistics:
    """Fill the cache `store` with the latents of a data set, or go on with it, and say what it holds.

    Args:
        model: on its device, with its weights as they were loaded.
        name: of the model, for the manifest.
        workers: processes that decode, 0 for none besides this one.
        tell: is told how far this process is, after every batch.
        encode: does the work on the shards that are missing in another way, such as on a cluster.

    Under torchrun all ranks call it, and each makes every n-th of the missing shards. Raises InputError when the cache
    is of another model, data set or options, another process writes it, or the disk is full; what is finished stays.
    """
    ranks = Ranks.current()
    shards = Shards(listing, options, store)
    manifest = Manifest.of(name, model, listing, options)
    shards.format.check(
        listing.names, listing.labels, gaussian=model.config.bottleneck == "gaussian", flip=options.flip,
        clips=listing.clips,
    )  # fmt: skip
    with ExitStack() as stack:

        def begin() -> list[int]:
            stack.enter_context(store.locked())
            return store.begin(manifest)

        if len(set(ranks.gathered([manifest.to_bytes()]))) > 1:
            raise InputError("the ranks do not see the same data set and model; give all of them the same paths")
        missing = ranks.gathered(ranks.first(begin) or [])
        if missing and encode is not None:
            encode(shards, model, missing, tell)
        elif missing:
            with store.working(ranks.rank) as show:

                def told(progress: Progress) -> None:
                    if ranks.count > 1:
                        show()
                    tell(progress)

                shards.encode(Encoder(model, options), missing[ranks.rank :: ranks.count], workers, told)
        if ranks.count > 1:
            wait_for_others(store, missing)
        ranks.wait()
        found = ranks.first(lambda: finish(store, manifest))
        return ranks.gathered([found] if found else [])[0]


def wait_for_others(store: Store, missing: Sequence[int], patience: float = PATIENCE) -> None:
    """Until these shards are recorded; InputError when those who make them show nothing for `patience` seconds.

    Not by a collective call, which would time out where one rank is much slower than another.
    """
    shown, since = None, time.monotonic()
    while missing := [shard for shard in missing if not (store.root / record_path(shard)).exists()]:
        if (signs := (len(missing), store.at_work())) != shown:
            shown, since = signs, time.monotonic()
        elif time.monotonic() - since > patience:
            raise InputError(
                f"the ranks that make {listed(map(record_path, missing))} of {store.root} have shown nothing for "
                f"{patience / 60:.0f} minutes; what is finished stays, and the same command goes on"
            )
        time.sleep(POLL_SECONDS)


def finish(store: Store, manifest: Manifest) -> Statistics:
    """Write what stands once in a cache, when all its shards are recorded, unless it is there."""
    if (summary := store.summary()) and all(map(store.stands, summary.files)):
        return summary.statistics
    found = Statistics.of(lambda: store.records(manifest))
    if not found.mean:
        reason = next((each.reason for record in store.records(manifest) for each in record.unreadable), "it is empty")
        raise InputError(f"no sample of the data set can be read, such as this: {reason}")
    samples = ((s.name, s.index, s.label) for record in store.records(manifest) for s in record.samples)
    whole = Summary(
        samples, manifest.data["classes"], torch.tensor(found.mean), torch.tensor(found.std), manifest.options["flip"]
    )
    format = FORMATS[manifest.options["format"]]
    store.seal(manifest, found, _checked(format.finish(whole)))
    store.clean()
    return found


def _checked(files: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    for path, content in files:
        check_path(path, OWN)
        yield path, content
