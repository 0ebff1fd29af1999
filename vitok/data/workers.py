"""Items of a data set prepared by worker processes, in order, ahead of who asks for them."""

from __future__ import annotations

import atexit
import signal
from collections.abc import Generator, Sequence
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

from vitok.errors import InputError

T = TypeVar("T")


def stream(
    dataset: Dataset[T], items: Sequence[Any], workers: int, *, pinned: bool = False
) -> Generator[T, None, None]:
    """`dataset[item]` for each of `items`, prepared by that many processes, or by this one for 0.

    `pinned` puts tensors into page-locked memory. An InputError is raised here as it was raised there.
    """
    loader = DataLoader(
        _Answers(dataset), batch_size=None, sampler=items, num_workers=workers, collate_fn=_as_it_is,
        worker_init_fn=_leave_stopping, pin_memory=pinned,
    )  # fmt: skip
    answers = iter(loader)
    # Workers ignore being asked to end, so they are told to, before the interpreter waits for them at its exit.
    end = getattr(answers, "_shutdown_workers", lambda: None)
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


def _leave_stopping(worker: int) -> None:
    """Workers live until their owner ends them: a stop request to the whole process group is its affair."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
