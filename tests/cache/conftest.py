"""Samples as an encoder would hand them to a format."""

from __future__ import annotations

import pytest
import torch

from vitok.cache import Encoded


@pytest.fixture
def encoded():
    """`encoded(count, first=0, ...)`: samples number `first` and on, in three classes; each follows from its number."""

    def make(
        count=5, first=0, *, shape=(4, 3, 2), dtype=torch.float32, gaussian=True, flip=True, labels=True, **fields
    ):
        def values(kind):
            generators = [torch.Generator().manual_seed(100 * (first + i) + kind) for i in range(count)]
            return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(dtype)

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
