"""vitok export: a model in the layouts of other libraries."""

from __future__ import annotations

from pathlib import Path

import click

from vitok.cli.common import SIZE, model_options, open_folder, open_model
from vitok.errors import InputError

_PATH = click.Path(path_type=Path)


@click.group()
def export() -> None:
    """Write a model in the layouts of other libraries."""


@export.command()
@click.option("--out", required=True, type=_PATH, help="Folder to write; in a pipeline's folder it is called vae.")
@click.option("--stats", type=_PATH, help="summary.json of a latent cache: the scale of latents.")
@click.option("--data", type=_PATH, help="Folder of pictures or clips to measure the scale of latents on.")
@click.option("--size", type=SIZE, default=256, show_default=True, help="Pixels a side of what --data is cropped to.")
@click.option("--samples", type=click.IntRange(1), default=1000, show_default=True, help="At most so many of --data.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Which of --data.")
@model_options
def diffusers(
    out: Path,
    stats: Path | None,
    data: Path | None,
    size: int,
    samples: int,
    seed: int,
    model_name: str,
    device: str | None,
    dtype: str,
) -> None:
    """A folder that `AutoencoderViTok.from_pretrained` and pipelines of diffusers load.

    Its config holds the mean and deviation of latents, which pipelines and trainers take out, where they are known.
    """
    from vitok.integrations.diffusers import AutoencoderViTok
    from vitok.integrations.statistics import measure, read_statistics

    if stats and data:
        raise InputError("give --stats or --data, not both")
    model = open_model(model_name, device, dtype)
    known = read_statistics(stats) if stats else None
    open_folder(out)
    if data:
        known = measure(model, data, size=size, samples=samples, seed=seed)
        click.echo(f"measured on {known.samples}")
    vae = AutoencoderViTok.from_vitok(model, stats=known)
    vae.save_pretrained(out)
    click.echo(f"scaling_factor {vae.config.scaling_factor:.5g}, shift_factor {vae.config.shift_factor:.5g}")
    click.echo(out)
