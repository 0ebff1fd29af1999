"""vitok eval: how well a model reconstructs a folder of pictures or clips."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import torch
from torch import Tensor

import vitok
from vitok.checkpoint import load
from vitok.cli.common import DTYPES, SIZE, finish, finite, model_options, open_device, show_table
from vitok.cli.progress import Display
from vitok.data.batches import Batches
from vitok.errors import InputError
from vitok.evaluate.features import DISTANCES, EXTRACTORS, Comparison, Distance, Extractor, Unavailable
from vitok.evaluate.jpeg import jpeg_within
from vitok.evaluate.metrics import from_uint8
from vitok.evaluate.pca import PCA_CROPS, fit_pca
from vitok.evaluate.reconstruction import Score, merge_scores, score_folder
from vitok.model import ViTok
from vitok.parallel import Ranks, joined

PCA, JPEG = "PCA", "JPEG"
BATCH = 8  # crops at a time while PCA is fitted

TITLES = {
    "vgg-hed": "VGG-HED distance",
    "lpips": "LPIPS",
    "fid": "rFID",
    "is": "rIS",
    "fd-efficientnet-lite0": "FD-EfficientNet-Lite0",
    "fvd": "rFVD",
}
"""The metrics beside PSNR and SSIM, as options and the JSON name them, and their titles."""


ALWAYS = "vgg-hed"
"""The one of them that needs no asking: without its weights the output says that it is skipped."""


class MetricList(click.ParamType):
    name = "list"

    def convert(self, value: str, param: click.Parameter | None, context: click.Context | None) -> list[str]:
        names = list(TITLES) if value == "all" else [name.strip() for name in value.split(",") if name.strip()]
        for name in names:
            if name not in TITLES:
                self.fail(f"there is no metric {name!r}; there are {', '.join(TITLES)} and all", param, context)
        return names


@dataclass
class Metrics:
    """The metrics beside PSNR and SSIM: those that can be had, opened, and what each is or why it is skipped."""

    distances: dict[str, Distance] = field(default_factory=dict)
    extractors: dict[str, Extractor] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)


@dataclass
class Row:
    """One way of reconstructing: what it scored, and what each extractor saw of it."""

    scores: list[Score]
    comparisons: dict[Extractor, Comparison]
    bytes: dict[int, int] = field(default_factory=dict)  # of JPEG files, by the `index` of their scores

    @property
    def good(self) -> list[Score]:
        return [score for score in self.scores if not score.error]

    @property
    def failed(self) -> list[Score]:
        return [score for score in self.scores if score.error]

    def values(self) -> list[dict[str, float]]:
        """Of every picture that could be scored."""
        values = [{"psnr": score.psnr, "ssim": score.ssim, **score.distances} for score in self.good]
        for value, score in zip(values, self.good, strict=True):
            if score.index in self.bytes:
                value["bytes"] = self.bytes[score.index]
        return values

    def means(self) -> dict[str, float]:
        values = self.values()
        return {name: fmean(value[name] for value in values) for name in values[0]}

    def of_all(self, ranks: Ranks) -> Row:
        """The rows of all ranks, each of which scored a part of the files, as one."""
        scores = merge_scores(ranks.gathered([self.scores]))
        comparisons = {each: comparison.of_all(ranks) for each, comparison in self.comparisons.items()}
        return Row(scores, comparisons, dict(ranks.gathered(self.bytes.items())))


@dataclass(frozen=True)
class Scoring:
    """What is scored, by which metrics, and by which of the ranks."""

    folder: Path
    size: int
    frames: int | None
    batch: int  # pictures or frames
    metrics: Metrics
    device: torch.device
    ranks: Ranks
    display: Display

    def row(self, name: str, reconstruct: Callable[[Tensor], Tensor], first: Row | None = None) -> Row:
        """This rank's part of a row; the originals are looked at once, for the `first` row."""
        comparisons = {
            each: Comparison(each, first.comparisons[each].originals, shared=True) if first else Comparison(each)
            for each in self.metrics.extractors.values()
        }
        scores = score_folder(
            self.folder, self.size, reconstruct, batch=max(1, self.batch // (self.frames or 1)), frames=self.frames,
            distances=self.metrics.distances, comparisons=tuple(comparisons.values()), device=self.device,
            rank=self.ranks.rank, world=self.ranks.count,
        )  # fmt: skip
        row = Row([], comparisons)
        with self.display.track(None, "clips" if self.frames else "pictures") as advance:
            for score in scores:
                row.scores.append(score)
                advance(1, f"{name}: {score.path.name}")
        return row


def _path_option(name: str, text: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(name, type=click.Path(path_type=Path), help=text)


@click.command(name="eval")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--size", type=SIZE, default=256, show_default=True, help="Short side, then centre crop, pixels.")
@click.option("--frames", type=click.IntRange(1), help="Score clips, not pictures: the first so many frames of each.")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Pictures or frames at a time.")
@click.option("--metrics", "wanted", type=MetricList(), default="", help=f"More: {', '.join(TITLES)} or all.")
@_path_option("--vgg-hed", "Weights of the VGG-HED distance, safetensors; without them it is skipped.")
@_path_option("--lpips-weights", "torchvision's AlexNet for LPIPS; adds it.")
@_path_option("--fid-weights", "torch-fidelity's TF-2015 Inception; adds rFID and rIS.")
@_path_option("--fvd-weights", "StyleGAN-V's I3D, a TorchScript file, which is a program that is run; adds rFVD.")
@click.option(
    "--pca", "pca_folder", type=click.Path(path_type=Path), help="Also fit patch PCA on this folder and score it."
)
@click.option("--groups", default="", help="Regular expression; --pca draws evenly from files with the same match.")
@click.option("--jpeg", "with_jpeg", is_flag=True, help="Also score latents of 8 bits, and JPEG of as many bytes.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
@model_options
def evaluate(
    folder: Path,
    size: int,
    frames: int | None,
    batch: int,
    wanted: list[str],
    vgg_hed: Path | None,
    lpips_weights: Path | None,
    fid_weights: Path | None,
    fvd_weights: Path | None,
    pca_folder: Path | None,
    groups: str,
    with_jpeg: bool,
    as_json: bool,
    model_name: str,
    device: str | None,
    dtype: str,
) -> None:
    """PSNR, SSIM and more of reconstructions of the pictures or clips in FOLDER, beside PCA and JPEG.

    Posterior mean, both sides rounded to uint8, data range 255, every figure the mean over pictures; of clips the mean
    over frames, then over clips. The VGG-HED distance, or a metric that is asked for, is skipped where it cannot be
    had, and says why.
    """
    paths = {"vgg-hed": vgg_hed, "lpips": lpips_weights, "fid": fid_weights, "is": fid_weights, "fvd": fvd_weights}
    with joined(open_device(device)) as own:
        ranks = Ranks.current()
        model = load(model_name, device=own, dtype=DTYPES[dtype])
        asked = {name for name in TITLES if name in wanted or paths.get(name)}
        metrics = _open(asked | {ALWAYS}, paths, frames, own)
        baseline = _baseline(model, pca_folder, groups, frames) if pca_folder else None
        with Display(silent=ranks.rank > 0) as display:
            scoring = Scoring(folder, size, frames, batch, metrics, own, ranks, display)
            rows = _rows(scoring, model, model_name, baseline, with_jpeg)
        good, failed = rows[model_name].good, rows[model_name].failed
        silent = ranks.rank > 0
        try:
            if not silent:
                _report(rows, metrics, model, size, frames, as_json)
            finish(len(good) + len(failed), len(failed), "scored", quiet=as_json or silent)
        finally:
            ranks.wait()  # torchrun ends all others as soon as one has failed


def _rows(
    scoring: Scoring, model: ViTok, name: str, baseline: tuple[Batches, tuple[int, int], int] | None, with_jpeg: bool
) -> dict[str, Row]:
    """The model's row, and what it is compared with if any picture could be scored."""
    display, ranks, frames = scoring.display, scoring.ranks, scoring.frames
    first = scoring.row(name, partial(_through, model)).of_all(ranks)
    for score in first.failed:
        display.say(f"error: {score.error}")
    rows = {name: first}
    if baseline and first.good:
        rows[PCA] = scoring.row(PCA, _fit(*baseline, frames, display), first).of_all(ranks)
    if with_jpeg and first.good:
        rounded = f"{name} 8-bit"
        rows[rounded] = scoring.row(rounded, partial(_through, model, eight_bits=True), first).of_all(ranks)
        rows[JPEG] = _jpeg_row(scoring, first, _bytes(model, scoring.size, frames))
    return rows


def _jpeg_row(scoring: Scoring, first: Row, budgets: list[int]) -> Row:
    sizes: list[int] = []
    part = scoring.row(JPEG, lambda pixels: _through_jpeg(pixels, budgets, sizes), first)
    part.bytes.update(zip((score.index for score in part.good), sizes, strict=True))
    row = part.of_all(scoring.ranks)
    over = sum(each > sum(budgets) for each in row.bytes.values())
    if over:
        scoring.display.say(
            f"JPEG cannot be as small as {sum(budgets)} bytes for {over} of {len(row.bytes)}, even at quality 1"
        )
    return row


def _report(
    rows: Mapping[str, Row], metrics: Metrics, model: ViTok, size: int, frames: int | None, as_json: bool
) -> None:
    """The table and what stands under it, or JSON; no table where nothing could be scored."""
    first = next(iter(rows.values()))
    facts = _facts(rows, metrics, model, size, frames) if first.good else {"pictures": 0, "means": {}, "scores": []}
    if as_json:
        click.echo(json.dumps({"size": size, "failed": len(first.failed), **facts}, indent=2))
    elif first.good:
        _show(rows, metrics, facts)


def _open(wanted: set[str], paths: Mapping[str, Path | None], frames: int | None, device: torch.device) -> Metrics:
    metrics = Metrics()
    opened: dict[Callable[..., Extractor], Extractor | Unavailable] = {}  # rFID and rIS look through the same network
    for name in (name for name in TITLES if name in wanted):
        try:
            if name == "fvd" and frames is None:
                raise Unavailable("it is a distance of clips; score those by --frames")
            if name in DISTANCES:
                metrics.distances[name], metrics.sources[name] = DISTANCES[name](paths.get(name), device)
                continue
            opener = EXTRACTORS[name]
            if opener not in opened:
                try:
                    opened[opener] = opener(paths.get(name), device)
                except Unavailable as error:
                    opened[opener] = error
            extractor = opened[opener]
            if isinstance(extractor, Unavailable):
                raise extractor
            metrics.extractors[name], metrics.sources[name] = extractor, extractor.source
        except Unavailable as error:
            metrics.sources[name] = f"skipped: {error}"
    return metrics


def _through(model: ViTok, pixels: Tensor, eight_bits: bool = False) -> Tensor:
    """Pictures [B, H, W, 3] or clips [B, T, H, W, 3], uint8, through the model: [B, 3, H, W] or [B, 3, T, H, W].

    A model of clips takes as many frames at once as it was trained on, one of pictures takes each frame by itself.
    """
    if pixels.dim() == 5 and model.config.clip_frames > 1:
        return torch.cat([_once(model, part, eight_bits) for part in pixels.split(model.config.clip_frames, 1)], 2)
    if pixels.dim() == 5:
        return _once(model, pixels.flatten(0, 1), eight_bits).unflatten(0, pixels.shape[:2]).transpose(1, 2)
    return _once(model, pixels, eight_bits)


def _once(model: ViTok, pixels: Tensor, eight_bits: bool) -> Tensor:
    latents = model.encode(pixels, layout="channels_last").mode()
    if eight_bits:  # -127..127 with a float16 scale for each channel of a picture, or of what is encoded at once
        exact = latents.float()
        step = (exact.flatten(2).abs().amax(2) / 127).half().float().clamp(min=1e-7)
        step = step.view(*step.shape, *(1,) * (latents.dim() - 2))
        latents = ((exact / step).round().clamp(-127, 127) * step).to(latents.dtype)
    return model.decode(latents, size=tuple(pixels.shape[1:-1]))


def _bytes(model: ViTok, size: int, frames: int | None) -> list[int]:
    """Bytes of latents at 8 bits a float, scales included: of a picture, or of a clip shared out over its frames."""
    count, step = frames or 1, model.config.clip_frames
    parts = [prod(model.config.grid(min(step, count - start), size, size)) for start in range(0, count, step)]
    total = (sum(parts) + 2 * len(parts)) * model.config.channels
    return [total * (i + 1) // count - total * i // count for i in range(count)]


def _through_jpeg(pixels: Tensor, budgets: list[int], sizes: list[int]) -> Tensor:
    """Pictures or the frames of clips as JPEG within `budgets`; adds the bytes of each picture or clip to `sizes`."""
    decoded = []
    for item in pixels.flatten(0, -4).unflatten(0, (-1, len(budgets))):
        frames, lengths = zip(*map(jpeg_within, item, budgets), strict=True)
        decoded.append(torch.stack(frames))
        sizes.append(sum(lengths))
    return from_uint8(torch.stack(decoded).view_as(pixels)).movedim(-1, 1)


def _baseline(model: ViTok, folder: Path, groups: str, frames: int | None) -> tuple[Batches, tuple[int, int], int]:
    """What PCA is fitted on, and its tubelet and channels, which make as many floats as the model has: the model's own
    in clips, or its patches in single pictures."""
    (q, p), channels = model.config.tubelet, model.config.channels
    try:
        re.compile(groups)
    except re.error as error:
        raise InputError(f"--groups {groups!r} is no regular expression: {error}") from error
    try:
        data = Batches(folder, batch=BATCH, crop=256, short_side=(256, 512), seed=0, groups=groups, frames=q)
    except InputError as error:
        raise InputError(f"--pca: {error}") from error
    if frames is None or data.sources[0].kind == "pictures":
        channels, spare = divmod(channels, q if frames else 1)
        if spare or not channels:
            raise InputError(
                f"--pca gives each of a tubelet's {q} frames the same share of the {model.config.channels} channels, "
                "a whole number"
            )
        q = 1
    return data, (q, p), channels


def _fit(
    data: Batches, tubelet: tuple[int, int], channels: int, frames: int | None, display: Display
) -> Callable[[Tensor], Tensor]:
    pca = fit_pca(_crops(data, display), tubelet, channels)

    def reconstruct(pixels: Tensor) -> Tensor:
        return pca.reconstruct(pixels, channels) if frames else pca.reconstruct(pixels[:, None], channels)[:, :, 0]

    return reconstruct


def _crops(data: Batches, display: Display) -> Iterator[Tensor]:
    """As clips, uint8 [8, T, 256, 256, 3] each; tells of files that cannot be read."""
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


def _distributions(row: Row, metrics: Metrics) -> dict[str, float]:
    """The metrics of all pictures together; one that cannot be had of so few says so in `metrics.sources`."""
    found = {}
    for name, extractor in metrics.extractors.items():
        comparison = row.comparisons[extractor]
        try:
            if name == "is":
                found[name], found["is-deviation"] = comparison.inception_score()
            else:
                found[name] = comparison.frechet_distance()
        except InputError as error:
            metrics.sources[name] = f"skipped: {error}"
    return found


def _facts(rows: Mapping[str, Row], metrics: Metrics, model: ViTok, size: int, frames: int | None) -> dict[str, Any]:
    """What the JSON holds; one entry of `scores` a picture or clip that could be scored."""
    values = {name: row.values() for name, row in rows.items()}
    distributions = {name: _distributions(row, metrics) for name, row in rows.items()}
    good = next(iter(rows.values())).good
    scores = [
        {"input": score.path.name, **{name: _finite(each[i]) for name, each in values.items()}}
        for i, score in enumerate(good)
    ]
    packages = ("vitok", "torch", "numpy", "pillow", *(["av"] if frames else []))
    q, p = model.config.temporal_patch, model.config.patch
    return {
        "size": size,
        "clips" if frames else "pictures": len(scores),
        "frames": frames,
        "model": f"{f'{q} x ' if q > 1 else ''}{p} x {p} patches, {model.config.channels} channels",
        "bytes_8_bit": sum(_bytes(model, size, frames)),
        "protocol": {
            "resize": f"short side to {size} pixels, Pillow bicubic, antialiased",
            "crop": f"centre {size} x {size}",
            "latents": "posterior mean",
            "rounding": "originals and reconstructions uint8, data range 255",
            "mean": "over frames, then over clips" if frames else "over pictures",
            "frames": f"the first {frames} of each clip" if frames else "pictures",
        },
        "metrics": {
            "psnr": "10 log10(255^2 / MSE) in dB",
            "ssim": "Wang et al. 2004, Gaussian 11 x 11, sigma 1.5, valid positions, mean over colours",
            **metrics.sources,
        },
        "versions": {name: _version(name) for name in packages},
        "means": {name: _finite(row.means()) for name, row in rows.items()},
        "distributions": {name: found for name, found in distributions.items() if found},
        "scores": scores,
    }


def _version(package: str) -> str | None:
    if package == "vitok":
        return vitok.__version__
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: finite(value) for name, value in values.items()}


def _show(rows: Mapping[str, Row], metrics: Metrics, facts: Mapping[str, Any]) -> None:
    protocol, kind = facts["protocol"], "clip" if facts["frames"] else "picture"
    styles = {"psnr": ("PSNR dB", ".2f"), "ssim": ("SSIM", ".4f"), "bytes": ("bytes", ".0f")}
    values = {name: [row.means(), *row.values()] for name, row in rows.items()}
    columns = [(name, key, *styles.get(key, (TITLES.get(key, key), ".4f"))) for name in rows for key in values[name][0]]
    labels = [f"mean of {len(facts['scores'])}", *(score["input"] for score in facts["scores"])]
    cells = [
        (label, *(f"{values[name][i][key]:{style}}" for name, key, _, style in columns))
        for i, label in enumerate(labels)
    ]
    title = f"{facts['size']} x {facts['size']} centre crops, {facts['model']}"
    show_table(title, (kind, *(f"{name} {metric}" for name, _, metric, _ in columns)), [*cells[1:], cells[0]])
    found = facts["distributions"]
    if found:
        keys = [key for key in TITLES if any(key in each for each in found.values())]
        lines = [(TITLES[key], *(f"{found[name][key]:.3f}" for name in rows)) for key in keys]
        show_table(f"all {len(facts['scores'])} {kind}s together", ("metric", *rows), lines)
    for name, source in metrics.sources.items():
        click.echo(f"{TITLES[name]}: {source}")
    said = [f"{name} {value}" for name, value in facts["versions"].items()]
    click.echo("; ".join([*(f"{name}: {value}" for name, value in protocol.items()), *said]))
    first, *others = rows
    for name in others:
        if name in (PCA, JPEG):
            ours = f"{first} 8-bit" if name == JPEG else first
            gain = rows[ours].means()["psnr"] - rows[name].means()["psnr"]
            click.echo(f"{ours} is {gain:+.2f} dB against {name}")
