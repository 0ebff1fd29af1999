"""vitok encode and vitok decode: pictures and clips to latents files and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from vitok.checkpoint import weights_hash
from vitok.cli.cache import cache_options, fill
from vitok.cli.chunks import decode_frames, encode_frames, frames_at_once, latent_chunks
from vitok.cli.common import finish, for_each, inputs_argument, model_options, open_folder, open_model, size_option
from vitok.cli.media import open_source, open_target, target_path
from vitok.cli.progress import Display
from vitok.errors import InputError
from vitok.io import LatentsReader, LatentsWriter, find_inputs
from vitok.io.files import Entry
from vitok.io.video import DEFAULT_FPS
from vitok.model import ViTok


@click.command()
@inputs_argument
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the latents files.")
@size_option
@model_options
@cache_options
def encode(
    inputs: tuple[Path, ...],
    out: Path,
    size: int | None,
    model_name: str,
    device: str | None,
    dtype: str,
    **of_caches: Any,
) -> None:
    """Write the latents (posterior mean) of pictures, clips, or folders of them as .safetensors files.

    With --format INPUTS is one data set, a folder of pictures, tar shards or videos or a Hugging Face data set
    (hf:NAME, or a folder it saved), and --out becomes a latent cache of it, of 256 pixels a side by default.
    The same command goes on with a cache that is not finished. Under torchrun all processes work on it.
    """
    given = {name: value for name, value in of_caches.items() if value is not None}
    if "format" in given:
        fill(inputs, out, size, model_name, device, dtype, given)
        return
    if given:
        raise InputError(f"--{next(iter(given)).replace('_', '-')} is of latent caches: give a --format as well")
    open_folder(out)
    model = open_model(model_name, device, dtype)
    entries = find_inputs(inputs)
    made_by = _identity(model_name, model)

    @torch.inference_mode()
    def work(entry: Entry, stem: str, display: Display) -> None:
        with (
            open_source(entry, size) as source,
            LatentsWriter(
                out / f"{stem}.safetensors",
                (source.height, source.width),
                clip=source.fps is not None,
                fps=source.fps,
                source=entry.path.name,
                **made_by,
            ) as writer,
            display.track(source.frames, "frames", entry.path.name) as advance,
        ):
            for chunk in source.chunks(frames_at_once(model, source.height, source.width)):
                writer.write(encode_frames(model, chunk), len(chunk))
                advance(len(chunk), entry.path.name)

    finish(len(entries), for_each(entries, work), "encoded")


@click.command()
@inputs_argument
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the pictures and clips.")
@model_options
def decode(inputs: tuple[Path, ...], out: Path, model_name: str, device: str | None, dtype: str) -> None:
    """Turn latents files of `vitok encode` back into PNG pictures and MP4 clips."""
    open_folder(out)
    model = open_model(model_name, device, dtype)
    entries = find_inputs(inputs, kinds=("latents",))
    made_by = _identity(model_name, model)

    @torch.inference_mode()
    def work(entry: Entry, stem: str, display: Display) -> None:
        with LatentsReader(entry.path, **made_by) as reader:
            clip = len(reader.size) == 3
            frames, fps = (reader.size[0], reader.fps or DEFAULT_FPS) if clip else (1, None)
            target = target_path(out, stem, clip)
            with open_target(target, fps) as write, display.track(frames, "frames", target.name) as advance:
                for latents, size in latent_chunks(model, reader):
                    write(decode_frames(model, latents, size))
                    advance(size[0], target.name)

    finish(len(entries), for_each(entries, work), "decoded")


def _identity(name: str, model: ViTok) -> dict[str, str]:
    """What a latents file says of the model that made it."""
    return {"model": name, "config_hash": model.config.hash(), "weights_hash": weights_hash(model)}
