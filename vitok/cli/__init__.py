"""The `vitok` command: one module a group of subcommands; errors are one sentence and exit code 2, never a traceback."""

from __future__ import annotations

import os
import sys

import click

import vitok
from vitok.cli.codec import decode, encode
from vitok.cli.inspect import info, models
from vitok.cli.reconstruct import reconstruct
from vitok.cli.training import evaluate, train
from vitok.errors import InputError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(vitok.__version__, prog_name="vitok")
def command() -> None:
    """A fast visual tokenizer: pictures and clips to a few latent vectors and back."""


for subcommand in (info, models, reconstruct, encode, decode, train, evaluate):
    command.add_command(subcommand)


def main() -> None:
    """Entry point of the console script."""
    try:
        command.main(standalone_mode=False)
    except InputError as error:
        _fail(str(error), 2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted; finished outputs are whole", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains while it closes stdout
        sys.exit(1)
    except Exception as error:
        if os.environ.get("VITOK_TRACEBACK"):
            raise
        reason = " ".join(str(error).split())[:500]
        _fail(f"{type(error).__name__}: {reason} (unexpected; VITOK_TRACEBACK=1 shows where)", 1)


def _fail(message: str, code: int) -> None:
    click.echo(f"error: {message}", err=True)
    sys.exit(code)
