"""vitok convert: weights in their authors' layouts to a model directory."""

from __future__ import annotations

from pathlib import Path

import click

from vitok.cli.common import open_folder
from vitok.errors import InputError

_FILE = click.Path(path_type=Path)
_out = click.option("--out", required=True, type=_FILE, help="The model directory to write.")
_pickle = click.option("--allow-pickle", is_flag=True, help="Also read pickles; only tensors are admitted.")


@click.group()
def convert() -> None:
    """Read weights in their authors' layouts and write a model directory."""


@convert.command()
@click.option("--encoder", type=_FILE, help="safetensors file, or the index of sharded ones.")
@click.option("--decoder", type=_FILE, help="The same of the decoder.")
@click.option("--variant", default="", help="Such as Ld4-Ld24/1x16x64, or a published model such as 350M-f16x64.")
@_pickle
@_out
def v2(encoder: Path | None, decoder: Path | None, variant: str, allow_pickle: bool, out: Path) -> None:
    """ViTok-v2: its two files, or the name of a published model, which is fetched."""
    from vitok.integrations import load_vitok_v2

    if (encoder is None) != (decoder is None):
        raise InputError(f"a model directory needs both parts: name --{'decoder' if encoder else 'encoder'} too")
    open_folder(out)
    load_vitok_v2(encoder, decoder, variant=variant, allow_pickle=allow_pickle).save(out)
    click.echo(out)


@convert.command()
@click.argument("source", type=_FILE)
@click.option("--heads", type=click.IntRange(1), help="Of both stacks.  [default: width / 64]")
@_pickle
@_out
def v1(source: Path, heads: int | None, allow_pickle: bool, out: Path) -> None:
    """The first paper's code: one file SOURCE with encoder and decoder."""
    from vitok.integrations.published import Missing, load_vitok_v1

    open_folder(out)
    model = load_vitok_v1(source, heads=heads, allow_pickle=allow_pickle)
    if any(isinstance(part, Missing) for part in (model.encoder, model.decoder)):
        raise InputError(f"a model directory needs both parts, and {source} holds one of them")
    model.save(out)
    click.echo(out)
