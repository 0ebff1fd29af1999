"""vitok reconstruct: pictures and clips through a model and back, beside the originals and with the numbers."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch import Tensor

from vitok.cli.chunks import decode_frames, encode_frames, frames_at_once
from vitok.cli.common import (
    finish,
    finite,
    for_each,
    inputs_argument,
    model_options,
    open_folder,
    open_model,
    show_table,
    size_option,
)
from vitok.cli.media import open_source, open_target, target_path
from vitok.cli.progress import Display
from vitok.errors import InputError
from vitok.evaluate.metrics import psnr, ssim
from vitok.io import ContactSheet, atomic_path, find_inputs, side_by_side, write_image
from vitok.io.files import Entry
from vitok.model import ViTok

SHEET, METRICS = "contact_sheet.png", "metrics.json"


@dataclass(frozen=True)
class Result:
    """One line of the table. PSNR (dB) and SSIM are means over frames; times are wall-clock, of the whole input."""

    input: str
    output: str
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

    def result(self, name: str, output: str, height: int, width: int, note: str) -> Result:
        frames, tokens = len(self.psnrs), int(self.tokens)
        return Result(
            name, output, frames, height, width, sum(self.psnrs) / frames, sum(self.ssims) / frames, tokens,
            tokens * self.model.config.channels, 1e3 * self.encode_s, 1e3 * self.decode_s, note,
        )  # fmt: skip

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()


@click.command()
@inputs_argument
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the results.")
@size_option
@model_options
def reconstruct(
    inputs: tuple[Path, ...], out: Path, size: int | None, model_name: str, device: str | None, dtype: str
) -> None:
    """Encode and decode pictures, clips, or folders of them.

    Writes original and reconstruction side by side (PNG or MP4), a contact sheet of all, and metrics.json.
    """
    entries = find_new_inputs(inputs, out)
    open_folder(out)
    model = open_model(model_name, device, dtype)
    names = Counter(entry.path.name for entry in entries)
    sheet, results = ContactSheet(), []

    @torch.inference_mode()
    def work(entry: Entry, stem: str, display: Display) -> None:
        target = target_path(out, stem, entry.kind == "clip")
        if entry.path.resolve() in (target.resolve(), (out / SHEET).resolve()):
            raise InputError(f"{entry.path} would be overwritten by the result; choose another --out")
        name = entry.path.name if names[entry.path.name] == 1 else str(entry.path)
        through, pair = Reconstructor(model), None
        with (
            open_source(entry, size) as source,
            open_target(target, source.fps) as write,
            display.track(source.frames, "frames", entry.path.name) as advance,
        ):
            for chunk in source.chunks(frames_at_once(model, source.height, source.width)):
                reconstruction = through(chunk)
                write(side_by_side(chunk, reconstruction))
                pair = pair or (chunk[0].clone(), reconstruction[0].clone())
                advance(len(chunk), entry.path.name)
        assert pair is not None  # a source gives at least one frame or raises
        result = through.result(name, target.name, source.height, source.width, source.note)
        results.append(result)
        sheet.add(*pair, f"{entry.path.name}\n{result.psnr:.2f} dB, {result.floats:,} floats")

    failed = for_each(entries, work, reserved=SHEET)
    if results:
        write_image(out / SHEET, sheet.render())
        with atomic_path(out / METRICS) as path:
            about = {"model": model_name, "dtype": dtype, "device": str(model.device)}
            path.write_text(json.dumps({**about, "results": [_as_json(result) for result in results]}, indent=2) + "\n")
        _show(model_name, results)
        click.echo(f"in {out}: {len(results)} side by side, {SHEET}, {METRICS}")
    finish(len(entries), failed, "reconstructed")


def find_new_inputs(paths: tuple[Path, ...], out: Path) -> list[Entry]:
    """The inputs without what an earlier run left in `out`, where that lies in one of the folders.

    Raises InputError if `out` is one of the folders: results and inputs could not be told apart any more.
    """
    out, named = out.resolve(), {path.resolve() for path in paths}
    if out in named:
        raise InputError(f"--out {out} is also an input; choose another folder for the results")

    def is_left_over(path: Path) -> bool:
        asked_for = named & {path, *path.parents}
        return out in path.parents and all(out not in place.parents for place in asked_for)

    entries = [entry for entry in find_inputs(paths) if not is_left_over(entry.path.resolve())]
    if not entries:
        raise InputError(f"there is no picture or clip but the results in --out {out}")
    return entries


def _as_json(result: Result) -> dict[str, object]:
    return {**dataclasses.asdict(result), "psnr": finite(result.psnr), "compression": result.compression}


def _show(model: str, results: list[Result]) -> None:
    columns = (
        "input", "frames", "size", "PSNR dB", "SSIM", "tokens", "floats", "compression", "encode ms", "decode ms",
        "note",
    )  # fmt: skip
    clips = any(r.frames > 1 for r in results)
    rows = [
        (
            r.input, str(r.frames) if clips else "", f"{r.width}x{r.height}", f"{r.psnr:.2f}", f"{r.ssim:.4f}",
            f"{r.tokens:,}", f"{r.floats:,}", f"{r.compression:.1f}x", f"{r.encode_ms:.0f}", f"{r.decode_ms:.0f}",
            r.note,
        )
        for r in results
    ]  # fmt: skip
    show_table(
        f"{model}: reconstructions (compression: pixel values for each latent float)", columns, rows, text=(0, 10)
    )
