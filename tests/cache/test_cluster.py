"""Filling a cache by actors, as far as it needs no cluster; the command line's tests start one."""

from __future__ import annotations

import pytest

from vitok.cache.build import Progress
from vitok.cache.cluster import Encoding, shares


@pytest.mark.parametrize(
    "devices, cores, shards, workers, expected",
    [
        (8, 64, 100, 16, (8, 8)),
        (8, 64, 100, 4, (8, 4)),
        (64, 64, 100, 16, (64, 1)),  # without a GPU every core is a device
        (8, 64, 2, 16, (2, 16)),
        (8, 64, 2, 0, (2, 0)),
        (0, 0, 100, 16, (1, 1)),  # a busy cluster
    ],
)
def test_actors_share_what_is_free(devices, cores, shards, workers, expected):
    assert shares(devices, cores, shards, workers) == expected


def test_an_actor_tells_how_long_it_has_waited_for_data():
    class Shards:
        def encode(self, encoder, shards, workers, tell):
            tell(Progress(3, 4, 0.5))
            tell(Progress(1, 4, 0.25))

        def samples(self, shard):
            return range(4)

    actor = object.__new__(Encoding)
    actor.shards, actor.encoder, actor.workers = Shards(), None, 0
    samples, seconds, waiting, problem = actor.make(0)
    assert (samples, problem) == (4, "") and seconds > 0 and waiting == pytest.approx(seconds / 4)
