"""What the commands share: options, opening a model, doing many inputs in spite of bad ones, tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from math import isfinite, isqrt
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitok.checkpoint import load
from vitok.cli.progress import Display, one_line
from vitok.errors import InputError
from vitok.io import MAX_PIXELS
from vitok.io.files import Entry, output_stems
from vitok.model import ViTok

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TRACEBACK = "VITOK_TRACEBACK"  # the environment variable that makes unexpected errors show where they come from
SIZE = click.IntRange(1, isqrt(MAX_PIXELS))  # what resize_and_crop takes

F = TypeVar("F", bound=Callable[..., Any])


def model_options(command: F) -> F:
    """--model, --device and --dtype."""
    for option in (
        click.option(
            "--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True, help="Arithmetic."
        ),
        device_option,
        click.option(
            "--model",
            "model_name",
            default="demo",
            show_default=True,
            help="Bundled model, a model directory or hf:OWNER/NAME.",
        ),
    ):
        command = option(command)
    return command


def device_option(command: F) -> F:
    return click.option("--device", help="Such as cpu or cuda:1.  [default: cuda if there is one, else cpu]")(command)


def size_option(command: F) -> F:
    what = "Short side to this many pixels, then the centre square.  [default: as it is]"
    return click.option("--size", type=SIZE, help=what)(command)


def inputs_argument(command: F) -> F:
    return click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path))(command)


def open_device(name: str | None) -> torch.device:
    """The device of that name, the GPU if there is one for None; InputError when it cannot be used."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except NotImplementedError:
        raise InputError(f"--device {name!r} cannot be used: this torch has no support for it") from None
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"--device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise InputError("--device 'meta' holds no numbers; use cpu or cuda")
    return device


def open_model(name: str, device: str | None, dtype: str) -> ViTok:
    return load(name, device=open_device(device), dtype=DTYPES[dtype])


def open_folder(path: Path) -> None:
    """Make the output folder; InputError when it cannot be made or written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"cannot write to --out {path}: there is a file where a folder should be") from None
    except OSError as error:
        raise InputError(f"cannot write to --out {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to --out {path}: no permission")


def show_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, text: Sequence[int] = (0,)
) -> None:
    """Print a table whose columns `text` are text and the others numbers, without columns that hold nothing.

    A row is one line, however long: a narrow terminal wraps it, which reads better than numbers folded in cells.
    """
    console = Console(width=10_000)
    used = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i in used:
        table.add_column(columns[i], justify="left" if i in text else "right")
    for row in rows:
        table.add_row(*(Text(one_line(row[i])) for i in used))
    console.print(Text(one_line(title), style="bold"))
    console.print(table)


def finite(value: float) -> float | None:
    """A PSNR for JSON, which has no infinity: None for a perfect reconstruction."""
    return value if isfinite(value) else None


def describe(error: Exception) -> str:
    """The sentence that stands for an error."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return "there is not enough memory for this; a smaller picture (--size) or another --device may do"
    return f"{type(error).__name__}: {one_line(str(error))[:500]} (unexpected; {TRACEBACK}=1 shows where)"


def for_each(entries: Sequence[Entry], work: Callable[[Entry, str, Display], None], reserved: str = "") -> int:
    """Do `work(entry, stem, display)` for every input, and say what failed and why. Returns how many failed.

    Stems are distinct, and none is `reserved`, the stem of a file that the command writes beside the others.
    """
    *stems, _ = output_stems([*(entry.path for entry in entries), Path(reserved)])
    failed = 0
    with Display() as display, display.track(len(entries), "inputs") as advance:
        for entry, stem in zip(entries, stems, strict=True):
            try:
                if entry.error:
                    raise entry.error
                work(entry, stem, display)
            except BrokenPipeError:
                raise
            except Exception as error:
                if TRACEBACK in os.environ and not isinstance(error, InputError):
                    raise
                failed += 1
                message = describe(error)
                display.say(f"error: {message if str(entry.path) in message else f'{entry.path}: {message}'}")
            advance(1, entry.path.name)
    return failed


def finish(total: int, failed: int, what: str, *, quiet: bool = False) -> None:
    """The closing line unless `quiet`; exit code 2 if anything failed."""
    if not quiet:
        click.echo(f"{total - failed} of {total} {what}, {failed} failed" if failed else f"{total} {what}")
    if failed:
        raise SystemExit(2)
