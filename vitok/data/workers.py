"""Items of a data set prepared by worker processes, in order, ahead of who asks for them."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

from vitok.errors import InputError

T = TypeVar("T")

PR_SET_PDEATHSIG = 1  # of prctl(2)
SECONDS = 5.0  # that a killed process may take to end


def stream(
    dataset: Dataset[T], items: Sequence[Any], workers: int, *, pinned: bool = False
) -> Generator[T, None, None]:
    """`dataset[item]` for each of `items`, prepared by that many processes, or by this one for 0.

    `pinned` puts tensors into page-locked memory. An InputError is raised here as it was raised there.
    """
    # Linux reports the end of the thread that started a worker, which for other threads is not that of the process.
    bound = threading.current_thread() is threading.main_thread() and multiprocessing.get_start_method() != "forkserver"
    loader = DataLoader(
        _Answers(dataset), batch_size=None, sampler=items, num_workers=workers, collate_fn=_as_it_is,
        worker_init_fn=partial(_begin, os.getpid() if bound else None), pin_memory=pinned,
    )  # fmt: skip
    answers = iter(loader)
    end = partial(_end, answers)
    # Workers ignore being asked to end, so they are told to, before the interpreter waits for them at its exit.
    atexit.register(end)
    try:
        for answer in answers:
            if isinstance(answer, InputError):
                raise answer
            yield answer
    finally:
        end()
        atexit.unregister(end)


class _Answers(Dataset[Any]):
    """Hands errors on as values: raised in a worker they would arrive wrapped into a traceback."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, item: Any) -> Any:
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


def _end(answers: Any) -> None:
    """End the workers: torch asks each to and waits for some seconds, and those that are stuck are killed."""
    workers = list(getattr(answers, "_workers", ()))
    try:
        getattr(answers, "_shutdown_workers", lambda: None)()
    finally:  # not before, as torch raises an error when a worker is killed that it has not yet given up
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join(SECONDS)
