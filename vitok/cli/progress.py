"""What a command says while it works, on standard error: bars on a terminal, a quiet line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import click
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

QUIET_SECONDS = 10.0  # between lines where there is no terminal

Item = TypeVar("Item")

Advance = Callable[[int, str], None]
"""advance(count, label): so much more is done, and this is what it was."""


def one_line(text: str) -> str:
    """`text` without line breaks and without what a terminal would obey: file names may hold anything."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.2f} {task.fields['unit']}/s" if task.speed else "")


class _Bars(Progress):
    """Bars, each with its label on a line of its own above: what training says of a step is longer than a column."""

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            if task.visible:
                if task.description:
                    yield Text(task.description)
                yield self.make_tasks_table([task])


class Display(AbstractContextManager["Display"]):
    """One place for all messages and bars of a command, so that neither overwrites the other.

    A `silent` one shows nothing: of several ranks one does the talking.
    """

    def __init__(self, silent: bool = False) -> None:
        self._silent = silent
        self._bars: Progress | None = None
        if sys.stderr.isatty() and not silent:
            columns = (
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                _Rate(),
                TimeRemainingColumn(),
                TextColumn("left"),
            )
            self._bars = _Bars(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False)

    def __enter__(self) -> Display:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def say(self, message: str) -> None:
        """Print one line, above the bars if there are any."""
        if self._bars:
            self._bars.console.print(Text(one_line(message)), soft_wrap=True)
        elif not self._silent:
            click.echo(one_line(message), err=True)

    @contextmanager
    def track(self, total: int | None, unit: str, label: str = "") -> Iterator[Advance]:
        """Follow `total` steps (None: unknown) of something that counts in `unit`; one may run inside another."""
        if self._silent:
            yield lambda count, label: None
            return
        if self._bars is None:
            yield _Lines(total, unit).advance
            return
        bars, task = self._bars, self._bars.add_task(one_line(label), total=total, unit=unit, visible=total != 1)
        try:
            yield lambda count, label: bars.update(task, advance=count, description=one_line(label))
        finally:
            bars.remove_task(task)

    def over(self, items: Sequence[Item], unit: str, label: str) -> Iterator[Item]:
        """The items, followed with `track`."""
        with self.track(len(items), unit, label) as advance:
            for item in items:
                yield item
                advance(1, label)


class _Lines:
    def __init__(self, total: int | None, unit: str) -> None:
        self.total, self.unit, self.done = total, unit, 0
        self.begun = self.shown = time.monotonic()

    def advance(self, count: int, label: str) -> None:
        self.done += count
        now = time.monotonic()
        if self.total == 1 or now - self.shown < QUIET_SECONDS:
            return
        self.shown = now
        rate = self.done / (now - self.begun) if now > self.begun else 0.0
        of, left = "", ""
        if self.total:
            of, left = f"/{self.total}", f", {(self.total - self.done) / rate:.0f} s left" if rate else ""
        click.echo(one_line(f"{self.done}{of} {self.unit}, {rate:.2f} {self.unit}/s{left} {label}"), err=True)
