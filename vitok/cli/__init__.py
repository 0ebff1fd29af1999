"""The `vitok` command. What a user did wrong is one sentence and exit code 2, never a traceback."""

from __future__ import annotations

import os
import signal
import sys

import click

import vitok
from vitok.cli.bench import bench
from vitok.cli.cache import cache
from vitok.cli.codec import decode, encode
from vitok.cli.common import TRACEBACK, describe
from vitok.cli.convert import convert
from vitok.cli.export import export
from vitok.cli.inspect import info, models
from vitok.cli.progress import one_line
from vitok.cli.quality import evaluate
from vitok.cli.reconstruct import reconstruct
from vitok.cli.training import train
from vitok.errors import InputError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(vitok.__version__, prog_name="vitok")
def command() -> None:
    """A fast visual tokenizer: pictures and clips to a few latent vectors and back."""


for subcommand in (info, models, reconstruct, encode, decode, cache, convert, export, train, evaluate, bench):
    command.add_command(subcommand)


class Stopped(BaseException):
    """Ctrl-C, SIGTERM or a closed terminal: unwinds everything, so that half-written files are removed."""

    def __init__(self, number: int) -> None:
        self.number = number


def _stop(number: int, _: object) -> None:
    raise Stopped(number)


def main() -> None:
    """Entry point of the console script."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]  # Windows has no SIGHUP
    heeded = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # as nohup sets it
    for number in heeded:
        signal.signal(number, _stop)
    try:
        sys.exit(command.main(prog_name="vitok", standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except Stopped as stopped:
        _fail("interrupted; outputs under their final names are complete", 128 + stopped.number)
    except Exception as error:
        if TRACEBACK in os.environ and not isinstance(error, InputError):
            raise
        _fail(describe(error), 2 if isinstance(error, InputError) else 1)
    finally:
        # Nothing is left to undo. Where one rank has failed torchrun stops the others, which end as they would have.
        for number in heeded:
            signal.signal(number, signal.SIG_IGN if number == signal.SIGTERM else signal.SIG_DFL)


def _fail(message: str, code: int) -> None:
    click.echo(f"error: {one_line(message)}", err=True)
    sys.exit(code)
