"""Samples as an encoder would hand them to a format."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vitok.cache import FORMATS, Encoded
from vitok.cache.build import finish, write_encoded
from vitok.cache.manifest import Manifest, Options, Record
from vitok.cache.store import Store
from vitok.checkpoint import save, weights_hash


@pytest.fixture
def encoded():
    """`encoded(count, first=0, ...)`: samples number `first` and on, in three classes; each follows from its number."""

    def make(
        count=5, first=0, *, shape=(4, 3, 2), dtype=torch.float32, gaussian=True, flip=True, labels=True, **fields
    ):
        def values(kind):
            generators = [torch.Generator().manual_seed(100 * (first + i) + kind) for i in range(count)]
            return torch.cat([torch.zeros(0, *shape), *(torch.randn(1, *shape, generator=g) for g in generators)]).to(
                dtype
            )

        numbers = range(first, first + count)
        clip = (5,) if len(shape) == 4 else ()
        given = {
            "names": [f"class_{i % 3}/picture_{i:03d}.jpg" for i in numbers],
            "indices": list(numbers),
            "labels": [i % 3 if labels else -1 for i in numbers],
            "sizes": [(*clip, 40 + i, 60) for i in numbers],
            "mean": values(0),
            "logvar": values(1) if gaussian else None,
            "flipped_mean": values(2) if flip else None,
            "flipped_logvar": values(3) if flip and gaussian else None,
            "seed": 7,
        }
        return Encoded(**(given | fields))

    return make


@pytest.fixture
def cache(tmp_path, encoded):
    """`cache(counts, ...)`: a finished cache with so many samples in each shard, and what was written into it."""

    def make(*counts, format="safetensors", model=None, **fields):
        parts = [encoded(count, first=sum(counts[:i]), **fields) for i, count in enumerate(counts)]
        data = {"samples": sum(counts), "classes": ["class_0", "class_1", "class_2"]}
        made_by = ["some model", "0" * 16, "1" * 16, {}]
        if model is not None:
            save(model, tmp_path / "model")
            made_by = [str(tmp_path / "model"), model.config.hash(), weights_hash(model), model.config.to_dict()]
        options = dataclasses.asdict(Options(format, flip=parts[0].flipped_mean is not None))
        store, manifest = Store(tmp_path / "cache"), Manifest(*made_by, data, options, len(counts))
        with store.locked():
            store.begin(manifest)
            for number, part in enumerate(parts):
                if len(part.names):
                    write_encoded(store, FORMATS[format], number, part, [])
                else:
                    store.write_shard(Record(number, [], [], [], 0, [], []))
            finish(store, manifest)
        return store.root, parts

    return make
