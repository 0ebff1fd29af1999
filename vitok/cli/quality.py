"""vitok eval: how well a model reconstructs a folder of pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean

import click
from torch import Tensor

from vitok.cli.common import SIZE, finish, finite, model_options, open_model, show_table
from vitok.cli.progress import Display
from vitok.data.batches import Batches
from vitok.errors import InputError
from vitok.evaluate.pca import PCA_CROPS, fit_pca
from vitok.evaluate.reconstruction import Score, score_folder

PCA = "PCA"
BATCH = 8  # crops at a time while PCA is fitted


@click.command(name="eval")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--size", type=SIZE, default=256, show_default=True, help="Short side, then centre crop, pixels.")
@click.option(
    "--pca", "pca_folder", type=click.Path(path_type=Path), help="Also fit patch PCA on this folder and score it."
)
@click.option("--groups", default="", help="Regular expression; --pca draws evenly from files with the same match.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
@model_options
def evaluate(
    folder: Path,
    size: int,
    pca_folder: Path | None,
    groups: str,
    as_json: bool,
    model_name: str,
    device: str | None,
    dtype: str,
) -> None:
    """PSNR and SSIM of reconstructions of the pictures in FOLDER; --pca puts the best linear tokenizer beside.

    Posterior mean, output rounded to uint8, data range 255, every figure the mean over pictures.
    """
    model = open_model(model_name, device, dtype)
    patch, channels = model.config.patch, model.config.channels

    def through_model(pixels: Tensor) -> Tensor:
        return model.decode(model.encode(pixels, layout="channels_last").mode(), size=(size, size))

    with Display() as display:
        scores = {model_name: _score(folder, size, through_model, model_name, display)}
        failed = [score for score in scores[model_name] if score.error]
        for score in failed:
            display.say(f"error: {score.error}")
        if pca_folder and len(failed) < len(scores[model_name]):
            pca = fit_pca(_crops(pca_folder, groups, display), (1, patch), channels)
            scores[PCA] = _score(
                folder, size, lambda pixels: pca.reconstruct(pixels[:, None], channels)[:, :, 0], PCA, display
            )
    good = {name: [score for score in each if not score.error] for name, each in scores.items()}
    if as_json:
        click.echo(json.dumps({"size": size, "failed": len(failed), **_facts(good)}, indent=2))
    elif good[model_name]:
        title = f"{size} x {size} centre crops, {patch} x {patch} patches, {channels} channels"
        _show(title, good)
        if PCA in good:
            click.echo(f"{model_name} is {_mean(good[model_name])[0] - _mean(good[PCA])[0]:+.2f} dB against PCA")
    finish(len(scores[model_name]), len(failed), "scored", quiet=as_json)


def _score(
    folder: Path, size: int, reconstruct: Callable[[Tensor], Tensor], name: str, display: Display
) -> list[Score]:
    scores = []
    with display.track(None, "pictures") as advance:
        for score in score_folder(folder, size, reconstruct):
            scores.append(score)
            advance(1, f"{name}: {score.path.name}")
    return scores


def _crops(folder: Path, groups: str, display: Display) -> Iterator[Tensor]:
    """The crops that the baseline is fitted on: uint8 [8, 1, 256, 256, 3] each."""
    try:
        re.compile(groups)
    except re.error as error:
        raise InputError(f"--groups {groups!r} is no regular expression: {error}") from error
    data = Batches(folder, batch=BATCH, crop=256, short_side=(256, 512), seed=0, groups=groups)
    told: set[str] = set()
    with display.track(PCA_CROPS, "crops") as advance:
        for i in range(PCA_CROPS // BATCH):
            batch = data[i]
            for problem in dict.fromkeys((*data.skipped, *batch.skipped)):
                if problem not in told:
                    display.say(f"skipped: {problem}")
                    told.add(problem)
            yield batch.clips
            advance(BATCH, f"fitting {PCA}")


def _mean(scores: list[Score]) -> tuple[float, float]:
    return fmean(score.psnr for score in scores), fmean(score.ssim for score in scores)


def _facts(good: dict[str, list[Score]]) -> dict[str, object]:
    rows = list(zip(*good.values(), strict=True))
    means = {
        name: dict(zip(("psnr", "ssim"), map(finite, _mean(each)), strict=True)) for name, each in good.items() if each
    }
    pictures = [
        {"input": row[0].path.name, **{name: finite(score.psnr) for name, score in zip(good, row, strict=True)}}
        for row in rows
    ]
    return {"pictures": len(rows), "means": means, "psnr": pictures}


def _show(title: str, good: dict[str, list[Score]]) -> None:
    rows = list(zip(*good.values(), strict=True))
    lines = [(row[0].path.name, [(score.psnr, score.ssim) for score in row]) for row in rows]
    lines.append((f"mean of {len(rows)}", [_mean(each) for each in good.values()]))
    columns = ("picture", *(f"{name} {metric}" for name in good for metric in ("PSNR dB", "SSIM")))
    cells = [(name, *(text for psnr, ssim in each for text in (f"{psnr:.2f}", f"{ssim:.4f}"))) for name, each in lines]
    show_table(title, columns, cells)
