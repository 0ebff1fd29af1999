"""Filling a cache on a Ray cluster: a shard a task, on as many actors as devices are free, into one shared folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vitok.cache.build import Encoder, Progress, Shards, Tell
from vitok.errors import InputError

if TYPE_CHECKING:
    from vitok.model import ViTok

RESTARTS = 3  # of an actor whose machine is lost
PATIENCE = 300.0  # seconds that actors have to get to work


class Encoding:
    """What an actor does: it makes its model fast once, then shards."""

    def __init__(self, model: ViTok, device: str, shards: Shards, workers: int) -> None:
        self.shards, self.workers = shards, workers
        self.encoder = Encoder(model.to(device), shards.options)

    def ready(self) -> None:
        """Answered when there is a place for the actor on the cluster."""

    def make(self, shard: int) -> tuple[int, float, float, str]:
        """The samples of the shard, the seconds it took and those of them spent waiting for data, and the sentence of
        an InputError, which pickles badly with its cause."""
        told: list[Progress] = []
        begun = time.perf_counter()
        try:
            self.shards.encode(self.encoder, [shard], self.workers, told.append)
        except InputError as error:
            return 0, 0.0, 0.0, str(error)
        seconds = time.perf_counter() - begun
        return len(self.shards.samples(shard)), seconds, seconds * told[-1].waiting, ""


def on_ray(workers: int) -> Callable[[Shards, ViTok, Sequence[int], Tell], None]:
    """An `encode` for `vitok.cache.build.build`; InputError without Ray.

    It joins the cluster that RAY_ADDRESS names, or one of this machine alone. The data set and the cache must be at the
    same paths on all machines. There are as many actors as devices are free, and they share the free cores: an actor
    decodes by at most `workers` processes.
    """
    try:
        import ray
        from ray.util import ActorPool
    except ImportError:
        raise InputError("--engine ray needs Ray, which is not installed: pip install vitok[ray]") from None

    def encode(shards: Shards, model: ViTok, missing: Sequence[int], tell: Tell) -> None:
        own = not ray.is_initialized()
        if own:
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
        try:
            gpus = model.device.type == "cuda"
            there, free = ray.cluster_resources(), ray.available_resources()
            kind = "GPU" if gpus else "CPU"
            if there.get(kind, 0) < 1:
                raise InputError("the Ray cluster has no device to encode on")
            count, each = shares(int(free.get(kind, 0)), int(free.get("CPU", 0)), len(missing), workers)
            actor: Any = ray.remote(Encoding).options(
                num_cpus=1, num_gpus=1 if gpus else 0, max_restarts=RESTARTS, max_task_retries=RESTARTS
            )
            shared, to_read = ray.put(model.cpu()), ray.put(shards)
            device = "cuda" if gpus else "cpu"
            actors = {(one := actor.remote(shared, device, to_read, each)).ready.remote(): one for _ in range(count)}
            ready, late = ray.wait(list(actors), num_returns=count, timeout=PATIENCE)
            if not ready:
                raise InputError(
                    f"the Ray cluster is busy: no {kind} was free within {PATIENCE:.0f} seconds; the same command goes "
                    "on when one is"
                )
            ray.get(ready)
            for answer in late:
                ray.kill(actors[answer])
            total = sum(len(shards.samples(shard)) for shard in missing)
            made = ActorPool([actors[answer] for answer in ready]).map_unordered(
                lambda actor, shard: actor.make.remote(shard), list(missing)
            )
            worked = waited = 0.0
            for samples, seconds, waiting, problem in made:
                if problem:
                    raise InputError(problem)
                worked, waited = worked + seconds, waited + waiting
                tell(Progress(samples, total, waited / worked))
        except ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())[-300:]
            raise InputError(f"the Ray cluster has failed: {reason}; the same command goes on") from error
        finally:
            if own:
                ray.shutdown()

    return encode


def shares(devices: int, cores: int, shards: int, workers: int) -> tuple[int, int]:
    """How many actors there are to be with so many free devices and cores, and how many processes each decodes by.

    One where nothing is free: it waits for its turn.
    """
    actors = max(1, min(devices, shards))
    return actors, min(workers, max(1, cores // actors))
