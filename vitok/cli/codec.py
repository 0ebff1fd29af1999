"""vitok encode and vitok decode: pictures and clips to latents files and back."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from vitok.checkpoint import weights_hash
from vitok.cli.chunks import decode_frames, encode_frames, frames_at_once, latent_chunks
from vitok.cli.common import finish, for_each, model_options, open_folder, open_model, progress
from vitok.errors import InputError
from vitok.evaluate.metrics import to_uint8
from vitok.io import ClipReader, ClipWriter, Latents, find_inputs, read_image, read_latents, resize_and_crop, write_image, write_latents
from vitok.io.files import Entry
from vitok.io.video import DEFAULT_FPS
from vitok.model import ViTok


@click.command()
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the latents files.")
@click.option("--size", type=click.IntRange(1), help="Short side to this many pixels, then the centre square.  [default: as it is]")
@model_options
def encode(inputs: tuple[Path, ...], out: Path, size: int | None, model_name: str, device: str | None, dtype: str) -> None:
    """Write the latents (posterior mean) of pictures, clips, or folders of them as .safetensors files."""
    model = open_model(model_name, device, dtype)
    entries = find_inputs(inputs)
    open_folder(out)
    hashes = {"config_hash": model.config.hash(), "weights_hash": weights_hash(model)}

    @torch.inference_mode()
    def work(entry: Entry, stem: str) -> None:
        target = out / f"{stem}.safetensors"
        common = {"model": model_name, "source": entry.path.name, **hashes}
        if entry.kind == "clip":
            with ClipReader(entry.path) as reader, progress(reader.frames, "frames") as advance:
                height, width = (reader.height, reader.width) if size is None else (size, size)
                parts, frames = [], 0
                for chunk in reader.chunks(frames_at_once(model, height, width)):
                    parts.append(encode_frames(model, chunk if size is None else resize_and_crop(chunk, size)).cpu())
                    frames += len(chunk)
                    advance(len(chunk), entry.path.name)
                write_latents(target, Latents(torch.cat(parts, 2), (frames, height, width), fps=reader.fps, **common))
        else:
            pixels = read_image(entry.path).pixels
            pixels = pixels if size is None else resize_and_crop(pixels, size)
            mean = model.encode(pixels[None], layout="channels_last").mode()
            write_latents(target, Latents(mean, tuple(pixels.shape[:2]), **common))

    finish(len(entries), for_each(entries, work), "encoded")


@click.command()
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the pictures and clips.")
@model_options
def decode(inputs: tuple[Path, ...], out: Path, model_name: str, device: str | None, dtype: str) -> None:
    """Turn latents files of `vitok encode` back into PNG pictures and MP4 clips."""
    model = open_model(model_name, device, dtype)
    entries = find_inputs(inputs, kinds=("latents",))
    open_folder(out)
    hashes = {"config_hash": model.config.hash(), "weights_hash": weights_hash(model)}

    @torch.inference_mode()
    def work(entry: Entry, stem: str) -> None:
        stored = read_latents(entry.path, model=model_name, **hashes)
        if len(stored.latents) != 1:
            raise InputError(f"{entry.path} holds a batch of {len(stored.latents)}; decode takes files of one picture or clip")
        if len(stored.size) == 2:
            pixels = to_uint8(model.decode(stored.latents, size=stored.size))
            write_image(out / f"{stem}.png", pixels[0].movedim(0, -1).cpu())
        else:
            _decode_clip(model, stored, out / f"{stem}.mp4")

    finish(len(entries), for_each(entries, work), "decoded")


def _decode_clip(model: ViTok, stored: Latents, target: Path) -> None:
    size = (stored.size[0], stored.size[1], stored.size[2])
    with ClipWriter(target, stored.fps or DEFAULT_FPS) as writer, progress(size[0], "frames") as advance:
        for piece, piece_size in latent_chunks(model, stored.latents, size):
            writer.write(decode_frames(model, piece, piece_size))
            advance(piece_size[0], target.name)
