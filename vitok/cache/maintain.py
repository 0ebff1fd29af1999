"""Caches that stand: checking them against their checksums, and joining several to one."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from vitok.cache.build import Progress, Tell, finish, write_encoded
from vitok.cache.formats import FORMATS, MOMENTS, Encoded
from vitok.cache.listing import listing_hash
from vitok.cache.manifest import File, Manifest, Record, Sample, Statistics, Unreadable, record_path
from vitok.cache.store import Store
from vitok.errors import InputError

MERGED = "safetensors"

Each = TypeVar("Each", Sample, Unreadable)


def problems(store: Store, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """(path, sentence) of every file of a cache, the sentence "" where it is as it was written."""
    for shard in range(manifest.shards):
        record = store.record(shard)
        if record is None:
            yield record_path(shard), f"shard {shard} of {store.root} is not finished, or its record is damaged"
            continue
        for file in record.files:
            yield file.path, problem(store.root, file)
    summary = store.summary()
    if summary is None:
        yield "", f"{store.root} is not finished: run the command that made it once more"
        return
    for file in summary.files:
        yield file.path, problem(store.root, file)


def problem(root: Path, file: File) -> str:
    """What is wrong with a file, "" if nothing is."""
    digest, length = hashlib.sha256(), 0
    try:
        with open(root / file.path, "rb") as content:
            while piece := content.read(1 << 20):
                digest.update(piece)
                length += len(piece)
    except FileNotFoundError:
        return f"{root / file.path} is missing"
    except OSError as error:
        return f"{root / file.path} cannot be read: {error.strerror or error}"
    if (length, digest.hexdigest()) != (file.bytes, file.sha256):
        return f"{root / file.path} has been altered: its checksum is not that of what was written"
    return ""


def join(caches: Sequence[Store], out: Store, tell: Tell = lambda _: None) -> Statistics:
    """Make one cache of several finished ones of one model and the same options, and say what it holds.

    Samples are numbered anew in the order of `caches`; classes are joined by their names. InputError where they do not
    fit, are not finished or have been altered.
    """
    if len(caches) < 2:
        raise InputError(f"merging takes two caches or more, got {len(caches)}")
    manifests = [cache.opened() for cache in caches]
    for cache, manifest in zip(caches, manifests, strict=True):
        _check(cache, manifest, caches[0], manifests[0])
    names = sorted({name for manifest in manifests for name in manifest.data["classes"]})
    numbers = {name: number for number, name in enumerate(names)}
    work = [
        (cache, record, first, [numbers[name] for name in manifest.data["classes"]])
        for cache, manifest, first in zip(caches, manifests, _firsts(manifests), strict=True)
        for record in range(manifest.shards)
    ]

    def renumbered(shard: int) -> Record:
        cache, number, first, classes = work[shard]
        record = cache.record(number)
        assert record is not None  # _check has seen them all
        return _renumbered(record, shard, first, classes)

    data = {
        "samples": sum(manifest.data["samples"] for manifest in manifests),
        "listing_hash": _hash(renumbered(shard) for shard in range(len(work))),
        "classes": names,
        "kind": manifests[0].data["kind"],
    }
    whole = dataclasses.replace(manifests[0], data=data, shards=len(work))
    with out.locked():
        missing = out.begin(whole)
        for shard in missing:
            cache, *_ = work[shard]
            _copy(cache, renumbered(shard), out, whole)
            tell(Progress(1, len(missing), 0.0))
        return finish(out, whole)


def _check(cache: Store, manifest: Manifest, first: Store, wanted: Manifest) -> None:
    if manifest.options["format"] != MERGED:
        raise InputError(
            f"{cache.root} is a cache of format {manifest.options['format']}; only {MERGED} ones can be merged"
        )
    if cache.summary() is None or any(cache.record(shard) is None for shard in range(manifest.shards)):
        raise InputError(f"{cache.root} is not finished: run the command that made it once more")
    labelled = bool(manifest.data["classes"]), manifest.data["kind"]
    if difference := dataclasses.replace(wanted, data={}, shards=0).difference(
        dataclasses.replace(manifest, data={}, shards=0)
    ):
        raise InputError(f"{first.root} holds a cache made {difference}: {cache.root} cannot be merged with it")
    if labelled != (bool(wanted.data["classes"]), wanted.data["kind"]):
        raise InputError(f"{first.root} and {cache.root} are not both of pictures, or not both of named classes")


def _firsts(manifests: Sequence[Manifest]) -> list[int]:
    """The number of each cache's first sample."""
    counts = [manifest.data["samples"] for manifest in manifests]
    return [sum(counts[:i]) for i in range(len(counts))]


def _renumbered(record: Record, shard: int, first: int, classes: Sequence[int]) -> Record:
    def moved(each: Each) -> Each:
        label = classes[each.label] if classes and each.label >= 0 else each.label
        return dataclasses.replace(each, index=first + each.index, label=label)

    samples, unreadable = list(map(moved, record.samples)), list(map(moved, record.unreadable))
    return dataclasses.replace(record, shard=shard, samples=samples, unreadable=unreadable)


def _hash(records: Iterator[Record]) -> str:
    every: list[Sample | Unreadable] = []
    for record in records:
        every += [*record.samples, *record.unreadable]
    every.sort(key=lambda each: each.index)
    return listing_hash([each.name for each in every], [each.label for each in every])


def _copy(cache: Store, record: Record, out: Store, manifest: Manifest) -> None:
    """Write the samples of a shard of `cache` under the numbers that `record` gives them."""
    tensors: dict[str, Tensor] = {}
    for file in record.files:
        if wrong := problem(cache.root, file):
            raise InputError(wrong)
        try:
            tensors = load((cache.root / file.path).read_bytes())
        except (OSError, SafetensorError) as error:
            raise InputError(f"{cache.root / file.path} cannot be read: {error}") from error
    if not record.samples:
        out.write_shard(record)
        return
    samples = record.samples
    encoded = Encoded(
        [s.name for s in samples], [s.index for s in samples], [s.label for s in samples],
        [tuple(s.size) for s in samples], **{key: tensors[key] for key in MOMENTS if key in tensors},
        seed=manifest.options["seed"],
    )  # fmt: skip
    write_encoded(out, FORMATS[MERGED], record.shard, encoded, record.unreadable)
