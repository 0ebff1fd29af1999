"""vitok reconstruct: pictures and clips through a model and back, beside the originals and with the numbers."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch import Tensor

from vitok.cli.chunks import decode_frames, encode_frames, frames_at_once
from vitok.cli.common import finish, for_each, model_options, open_folder, open_model, progress, show_table
from vitok.evaluate.metrics import psnr, ssim
from vitok.io import ClipReader, ClipWriter, ContactSheet, atomic_path, find_inputs, read_image, resize_and_crop, side_by_side, write_image
from vitok.io.files import Entry
from vitok.model import ViTok

SHEET, METRICS = "contact_sheet", "metrics.json"


@dataclass(frozen=True)
class Result:
    """One line of the table. PSNR (dB) and SSIM are means over frames; times are wall-clock milliseconds of the whole input."""

    input: str
    frames: int
    height: int
    width: int
    psnr: float
    ssim: float
    tokens: int
    floats: int
    encode_ms: float
    decode_ms: float
    note: str

    @property
    def compression(self) -> float:
        """Pixel values for each latent float."""
        return self.frames * self.height * self.width * 3 / self.floats


class Reconstructor:
    """Takes frames through the model and adds up what a `Result` needs."""

    def __init__(self, model: ViTok) -> None:
        self.model = model
        self.psnrs: list[float] = []
        self.ssims: list[float] = []
        self.tokens = self.encode_s = self.decode_s = 0.0

    def __call__(self, frames: Tensor) -> Tensor:
        size = (len(frames), frames.shape[1], frames.shape[2])
        begin = self._now()
        latents = encode_frames(self.model, frames)
        middle = self._now()
        result = decode_frames(self.model, latents, size)
        self.encode_s, self.decode_s = self.encode_s + middle - begin, self.decode_s + self._now() - middle
        self.tokens += latents[0, 0].numel()
        self.psnrs += [psnr(a, b) for a, b in zip(result, frames, strict=True)]
        self.ssims += [ssim(a, b) for a, b in zip(result, frames, strict=True)]
        return result

    def result(self, name: str, height: int, width: int, note: str) -> Result:
        frames, tokens = len(self.psnrs), int(self.tokens)
        return Result(
            name, frames, height, width, sum(self.psnrs) / frames, sum(self.ssims) / frames, tokens,
            tokens * self.model.config.channels, 1e3 * self.encode_s, 1e3 * self.decode_s, note,
        )  # fmt: skip

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()


@click.command()
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the results.")
@click.option("--size", type=click.IntRange(1), help="Short side to this many pixels, then the centre square.  [default: as it is]")
@model_options
def reconstruct(inputs: tuple[Path, ...], out: Path, size: int | None, model_name: str, device: str | None, dtype: str) -> None:
    """Encode and decode pictures, clips, or folders of them.

    Writes original and reconstruction side by side (PNG or MP4), a contact sheet of all, and metrics.json.
    """
    model = open_model(model_name, device, dtype)
    entries = find_inputs(inputs)
    open_folder(out)
    sheet, results = ContactSheet(), []

    @torch.inference_mode()
    def work(entry: Entry, stem: str) -> None:
        run = _clip if entry.kind == "clip" else _picture
        result, pair = run(model, entry.path, out / stem, size)
        results.append(result)
        sheet.add(*pair, f"{entry.path.name}\n{result.psnr:.2f} dB, {result.floats:,} floats")

    failed = for_each(entries, work, reserved=SHEET)
    if results:
        write_image(out / f"{SHEET}.png", sheet.render())
        with atomic_path(out / METRICS) as path:
            rows = [{**dataclasses.asdict(result), "compression": result.compression} for result in results]
            path.write_text(json.dumps({"model": model_name, "dtype": dtype, "device": str(model.device), "results": rows}, indent=2) + "\n")
        _show(model_name, results)
        click.echo(f"pictures: {out / SHEET}.png and {len(results)} comparisons beside it")
    finish(len(entries), failed, "reconstructed")


def _picture(model: ViTok, path: Path, target: Path, size: int | None) -> tuple[Result, tuple[Tensor, Tensor]]:
    read = read_image(path)
    original = read.pixels if size is None else resize_and_crop(read.pixels, size)
    through = Reconstructor(model)
    reconstruction = through(original[None])[0]
    write_image(target.with_name(target.name + ".png"), side_by_side(original, reconstruction))
    return through.result(path.name, *original.shape[:2], read.note), (original, reconstruction)


def _clip(model: ViTok, path: Path, target: Path, size: int | None) -> tuple[Result, tuple[Tensor, Tensor]]:
    with ClipReader(path) as reader:
        height, width = (reader.height, reader.width) if size is None else (size, size)
        through, shown = Reconstructor(model), None
        with ClipWriter(target.with_name(target.name + ".mp4"), reader.fps) as writer, progress(reader.frames, "frames") as advance:
            for chunk in reader.chunks(frames_at_once(model, height, width)):
                frames = chunk if size is None else resize_and_crop(chunk, size)
                reconstruction = through(frames)
                writer.write(side_by_side(frames, reconstruction))
                shown = shown or (frames[0].clone(), reconstruction[0].clone())
                advance(len(frames), path.name)
    assert shown is not None  # a reader gives at least one frame or raises
    return through.result(path.name, height, width, ""), shown


def _show(model: str, results: list[Result]) -> None:
    columns = ("input", "note", "frames", "size", "PSNR dB", "SSIM", "tokens", "floats", "compression", "encode ms", "decode ms")
    rows = [
        (
            r.input, r.note, str(r.frames), f"{r.width}x{r.height}", f"{r.psnr:.2f}", f"{r.ssim:.4f}", f"{r.tokens:,}",
            f"{r.floats:,}", f"{r.compression:.1f}x", f"{r.encode_ms:.0f}", f"{r.decode_ms:.0f}",
        )
        for r in results
    ]  # fmt: skip
    show_table(f"{model}: reconstructions (compression: pixel values for each latent float)", columns, rows, left=2)
