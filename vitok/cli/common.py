"""What the commands share: options, opening a model, doing many inputs in spite of bad ones, progress, tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from vitok.checkpoint import load
from vitok.errors import InputError
from vitok.io.files import Entry, output_stems
from vitok.model import ViTok

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUIET_SECONDS = 10.0  # between progress lines where there is no terminal

F = TypeVar("F", bound=Callable[..., Any])


def model_options(command: F) -> F:
    """--model, --device and --dtype."""
    for option in (
        click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True, help="Arithmetic."),
        device_option,
        click.option("--model", "model_name", default="demo", show_default=True, help="Bundled model or a model directory."),
    ):
        command = option(command)
    return command


def device_option(command: F) -> F:
    return click.option("--device", default=None, help="Such as cpu or cuda:1.  [default: cuda if there is one, else cpu]")(command)


def open_device(name: str | None) -> torch.device:
    """The device of that name, the GPU if there is one for None; InputError when it cannot be used."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise InputError("--device 'meta' holds no numbers; use cpu or cuda")
    return device


def open_model(name: str, device: str | None, dtype: str) -> ViTok:
    return load(name, device=open_device(device), dtype=DTYPES[dtype])


def open_folder(path: Path) -> Path:
    """Make an output folder; InputError when that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to --out {path}: {error.strerror}") from error
    return path


def console() -> Console:
    """Standard output; wide enough for every table where it is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=160, color_system=None)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> None:
    """Print a table whose first `left` columns are text and the others numbers."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console().print(table)


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Any) -> Text:
        return Text(f"{task.speed:.2f} {self.unit}/s" if task.speed else "")


@contextmanager
def progress(total: int | None, unit: str) -> Iterator[Callable[[int, str], None]]:
    """Yields advance(count, label): a bar with rate and time left on a terminal, a quiet line now and then elsewhere."""
    if sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(unit), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda count, label: bar.update(task, advance=count, description=label)
        return
    done, begun, shown = 0, time.monotonic(), time.monotonic()

    def advance(count: int, label: str) -> None:
        nonlocal done, shown
        done += count
        now = time.monotonic()
        if now - shown >= QUIET_SECONDS:
            shown = now
            rate = done / (now - begun)
            left = f", {(total - done) / rate:.0f} s left" if total and rate else ""
            click.echo(f"{done}{f'/{total}' if total else ''} {unit}, {rate:.2f} {unit}/s{left} {label}".rstrip(), err=True)

    yield advance


def for_each(entries: Sequence[Entry], work: Callable[[Entry, str], None], reserved: str = "") -> int:
    """Do `work(entry, stem)` for every input; print the error of each that fails and go on. Returns how many failed.

    Stems are distinct, and none is `reserved`, the stem of a file that the command writes beside the others.
    """
    stems = output_stems([Path(reserved), *(entry.path for entry in entries)] if reserved else [entry.path for entry in entries])
    failed = 0
    with progress(len(entries), "inputs") as advance:
        for entry, stem in zip(entries, stems[1:] if reserved else stems, strict=True):
            try:
                if entry.error:
                    raise entry.error
                work(entry, stem)
            except InputError as error:
                failed += 1
                click.echo(f"error: {error}", err=True)
            advance(1, entry.path.name)
    return failed


def finish(total: int, failed: int, what: str) -> None:
    """The closing line; exit code 2 if anything failed."""
    click.echo(f"{total - failed} of {total} {what}, {failed} failed" if failed else f"{total} {what}")
    if failed:
        raise SystemExit(2)
