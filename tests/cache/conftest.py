"""Samples as an encoder would hand them to a format."""

from __future__ import annotations

import json

import pytest
import torch

import vitok
from vitok.cache import FORMATS, Encoded
from vitok.checkpoint import weights_hash


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

    def make(*counts, folder="cache", format="safetensors", model=None, **fields):
        root = tmp_path / folder
        (root / "manifest").mkdir(parents=True)
        parts = [encoded(count, first=sum(counts[:i]), **fields) for i, count in enumerate(counts)]
        about = {
            "format": "vitok-cache",
            "version": 1,
            "data": {"samples": sum(counts), "classes": ["class_0", "class_1", "class_2"]},
            "options": {"format": format},
            "shards": len(counts),
        }
        if model is not None:
            vitok.checkpoint.save(model, tmp_path / "model")
            about |= {"model": str(tmp_path / "model"), "config_hash": model.config.hash()}
            about |= {"weights_hash": weights_hash(model)}
        (root / "manifest.json").write_text(json.dumps(about))
        for number, part in enumerate(parts):
            files = []
            for name, data in FORMATS[format].shard(number, part) if len(part.names) else ():
                (root / name).write_bytes(data)
                files.append({"path": name, "bytes": len(data)})
            samples = [{"name": name} for name in part.names]
            (root / "manifest" / f"{number:05d}.json").write_text(json.dumps({"files": files, "samples": samples}))
        drawn = torch.cat([part.draw() for part in parts if len(part.names)]).float().movedim(1, 0).flatten(1)
        mean, std = drawn.mean(1).tolist(), drawn.std(1).tolist()
        stats = {"mean": mean, "std": std, "scaling_factor": 1 / drawn.std().item()}
        (root / "summary.json").write_text(json.dumps({"statistics": stats}))
        return root, parts

    return make
