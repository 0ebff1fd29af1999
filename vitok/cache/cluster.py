"""Filling a cache on a Ray cluster: a shard a task, on as many actors as there are devices, into one shared folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vitok.cache.build import Encoder, Progress, Shards, Tell
from vitok.errors import InputError

if TYPE_CHECKING:
    from vitok.model import ViTok

RESTARTS = 3  # of an actor whose machine is lost


class Encoding:
    """What an actor does: it makes its model fast once, then shards."""

    def __init__(self, model: ViTok, device: str, shards: Shards, workers: int) -> None:
        self.shards, self.workers = shards, workers
        self.encoder = Encoder(model.to(device), shards.options)

    def make(self, shard: int) -> tuple[int, str]:
        """The samples of the shard, and the sentence of an InputError, which pickles badly with its cause."""
        try:
            self.shards.encode(self.encoder, [shard], self.workers)
        except InputError as error:
            return 0, str(error)
        return len(self.shards.samples(shard)), ""


def on_ray(workers: int) -> Callable[[Shards, ViTok, Sequence[int], Tell], None]:
    """An `encode` for `vitok.cache.build.build`; InputError without Ray.

    It joins the cluster that RAY_ADDRESS names, or one of this machine alone. The data set and the cache must be at the
    same paths on all machines.
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
            there = int(ray.cluster_resources().get("GPU" if gpus else "CPU", 0))
            if there < 1:
                raise InputError("the Ray cluster has no device to encode on")
            actor: Any = ray.remote(Encoding).options(
                num_cpus=1, num_gpus=1 if gpus else 0, max_restarts=RESTARTS, max_task_retries=RESTARTS
            )
            shared, to_read = ray.put(model.cpu()), ray.put(shards)
            device = "cuda" if gpus else "cpu"
            actors = [actor.remote(shared, device, to_read, workers) for _ in range(min(there, len(missing)))]
            total = sum(len(shards.samples(shard)) for shard in missing)
            made = ActorPool(actors).map_unordered(lambda actor, shard: actor.make.remote(shard), list(missing))
            for samples, problem in made:
                if problem:
                    raise InputError(problem)
                tell(Progress(samples, total, 0.0))
        except ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())[-300:]
            raise InputError(f"the Ray cluster has failed: {reason}; the same command goes on") from error
        finally:
            if own:
                ray.shutdown()

    return encode
