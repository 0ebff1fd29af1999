"""Items of a data set prepared by worker processes, in order, ahead of who asks for them."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.synchronize import Semaphore
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset, get_worker_info

from vitok.errors import InputError

T = TypeVar("T")

PR_SET_PDEATHSIG = 1  # of prctl(2)
AHEAD = 2  # items that a process is given before they are asked for
SECONDS = 5.0  # that a killed process may take to end


def stream(
    dataset: Dataset[T], items: Iterable[Any], workers: int, *, pinned: bool = False, turns: bool = False
) -> Generator[T, None, None]:
    """`dataset[item]` for each of `items`, prepared by that many processes, or by this one for 0.

    `pinned` puts tensors into page-locked memory. With `turns` each process prepares one item and rests until those of
    all have been taken: for who works on them by all the cores, where threads would wait for one whose core is taken.
    Before it rests it calls `dataset.ahead(item)`, if there is such a method, to have slow files fetched meanwhile.
    An InputError is raised here as it was raised there.
    """
    resting = [multiprocessing.Semaphore(1) for _ in range(workers)] if turns else []
    # Linux reports the end of the thread that started a worker, which for other threads is not that of the process.
    bound = threading.current_thread() is threading.main_thread() and multiprocessing.get_start_method() != "forkserver"
    loader = DataLoader(
        _Answers(dataset, resting), batch_size=None, sampler=items, num_workers=workers, collate_fn=_as_it_is,
        worker_init_fn=partial(_begin, os.getpid() if bound else None), pin_memory=pinned,
        prefetch_factor=AHEAD if workers else None,
    )  # fmt: skip
    answers = iter(loader)
    end = partial(_end, answers, resting)
    # Workers ignore being asked to end, so they are told to, before the interpreter waits for them at its exit.
    atexit.register(end)
    try:
        for number, answer in enumerate(answers, 1):
            if isinstance(answer, InputError):
                raise answer
            yield answer
            if resting and number % workers == 0:
                for turn in resting:
                    turn.release()
    finally:
        end()
        atexit.unregister(end)


class _Answers(Dataset[Any]):
    """Hands errors on as values: raised in a worker they would arrive wrapped into a traceback. Waits for its turn."""

    def __init__(self, dataset: Dataset[Any], resting: Sequence[Semaphore]) -> None:
        self.dataset, self.resting = dataset, resting

    def __getitem__(self, item: Any) -> Any:
        if self.resting and (worker := get_worker_info()):
            getattr(self.dataset, "ahead", _as_it_is)(item)
            self.resting[worker.id].acquire()
        try:
            return self.dataset[item]
        except InputError as error:
            return error


def _as_it_is(answer: Any) -> Any:
    return answer


def _begin(owner: int | None, worker: int) -> None:
    """Workers live until their owner ends them: a stop request to the whole process group is its affair.

    Where the system can do it, they end with an `owner` that is killed.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if owner is not None and sys.platform == "linux":
        import ctypes

        with suppress(OSError, AttributeError):  # torch's own look for the owner, every few seconds, has to do
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != owner:  # it has ended before this was asked for
            os._exit(1)


def _end(answers: Any, resting: Sequence[Semaphore]) -> None:
    """End the workers: torch asks each to and waits for some seconds, and those that are stuck are killed."""
    workers = list(getattr(answers, "_workers", ()))
    for turn in resting:
        for _ in range(AHEAD):
            turn.release()
    try:
        getattr(answers, "_shutdown_workers", lambda: None)()
    finally:  # not before, as torch raises an error when a worker is killed that it has not yet given up
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join(SECONDS)
