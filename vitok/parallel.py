"""One run on several processes, as torchrun starts them: who this one is, and how they share a module's gradients."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vitok.errors import InputError

T = TypeVar("T")

GRACE_SECONDS = 0.5
"""Gloo's threads live on while a module of DDP or FSDP holds the group. One that has yet to let go of the last tensors
needs the interpreter for it, and aborts the process when that has begun to end."""


def own_cores() -> int:
    """Those that this process may take: of its machine, shared out among the ranks there."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class FailedElsewhere(InputError):
    """What the other ranks raise when the first has failed, which says so itself."""


@dataclass(frozen=True)
class Ranks:
    """This process, the `rank`-th of `count`."""

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Of the default process group; alone where there is none."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else cls()

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()

    def mean(self, values: Mapping[str, float], device: torch.device) -> dict[str, float]:
        """Numbers that every rank has under the same names, averaged over the ranks."""
        if self.count == 1:
            return dict(values)
        numbers = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
        dist.all_reduce(numbers)
        return dict(zip(values, (numbers / self.count).tolist(), strict=True))

    def first(self, work: Callable[[], T]) -> T | None:
        """What the first rank makes of `work`, None on the others, which wait; an InputError there ends all of them."""
        result, problem = None, None
        if self.rank == 0:
            try:
                result = work()
            except InputError as error:
                problem = error
        for told in self.gathered([str(problem)] if problem else []):
            raise problem or FailedElsewhere(told)
        return result

    def gathered(self, things: Iterable[T]) -> list[T]:
        """Those of all ranks, in the order of ranks."""
        every: list[list[T]] = [list(things)]
        if self.count > 1:
            every = [[] for _ in range(self.count)]
            dist.all_gather_object(every, list(things))
        return [thing for each in every for thing in each]


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started, for as long as the context lasts; gives this process's device.

    NCCL on GPUs, one for each process of a machine, Gloo elsewhere. Without torchrun nothing happens.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield device
        return
    from torch.distributed.rendezvous import rendezvous  # which a torch without torch.distributed lacks

    if device.type == "cuda" and device.index is None:
        number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= there:
            raise InputError(
                f"torchrun started more processes on this machine than its {there} GPUs; lower --nproc-per-node"
            )
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    store, rank, count = next(rendezvous("env://"))
    # Ranks that are started again may meet at the same store, and must not read what those before them left there.
    store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    try:
        Ranks.current().wait()  # lest one leave for a wrong argument while others still connect to it
        yield device
    finally:
        dist.destroy_process_group()
        if backend == "gloo":
            time.sleep(GRACE_SECONDS)


def mean_over_ranks(x: Tensor) -> Tensor:
    """`x` averaged over the ranks, without gradient."""
    count = Ranks.current().count
    if count == 1:
        return x.detach()
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / count


def replicated(module: nn.Module) -> nn.Module:
    """`module` behind DDP, which averages its gradients over the ranks; the module itself where there is one rank."""
    # Buffers are made alike by those who write them, and gradients live in DDP's buckets instead of being copied there.
    if Ranks.current().count == 1:
        return module
    names = inspect.signature(DistributedDataParallel.__init__).parameters
    options: dict[str, Any] = {"gradient_as_bucket_view": True}
    options["forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"] = False  # by torch 2.13
    return DistributedDataParallel(module, **options)


def sharded(module: nn.Module, blocks: Iterable[nn.Module]) -> nn.Module:
    """`module` with parameters, gradients and optimizer states shared out over the ranks by FSDP2, block by block."""
    from torch.distributed.fsdp import fully_shard

    for block in blocks:
        fully_shard(block)
    fully_shard(module, reshard_after_forward=True)
    return module


@contextmanager
def averaging(module: nn.Module, now: bool) -> Iterator[None]:
    """Context of a forward and backward after which the ranks average their gradients `now`, or keep adding up."""
    if Ranks.current().count == 1:
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(now)
        yield
    elif isinstance(module, DistributedDataParallel) and not now:
        with module.no_sync():
            yield
    else:
        yield


def local(x: Tensor) -> Tensor:
    """The part of `x` that this rank holds; `x` itself where it is not shared out."""
    return x.to_local() if hasattr(x, "to_local") else x


def whole(x: Tensor) -> Tensor:
    """All of `x`, on every rank."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x
