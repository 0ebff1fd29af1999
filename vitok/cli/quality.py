"""vitok eval: how well a model reconstructs a folder of pictures or clips."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import torch
from torch import Tensor

import vitok
from vitok.cli.common import SIZE, finish, finite, model_options, open_model, show_table
from vitok.cli.progress import Display
from vitok.data.batches import Batches
from vitok.errors import InputError
from vitok.evaluate.features import DISTANCES, EXTRACTORS, Comparison, Distance, Extractor, Unavailable
from vitok.evaluate.jpeg import jpeg_within
from vitok.evaluate.metrics import from_uint8
from vitok.evaluate.pca import PCA_CROPS, fit_pca
from vitok.evaluate.reconstruction import Score, score_folder
from vitok.model import ViTok

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
    """The metrics that were asked for: those that can be had, opened, and what each is or why it is skipped."""

    distances: dict[str, Distance] = field(default_factory=dict)
    extractors: dict[str, Extractor] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)


@dataclass
class Row:
    """One way of reconstructing: what it scored, and what each extractor saw of it."""

    scores: list[Score]
    comparisons: dict[Extractor, Comparison]
    bytes: list[int] = field(default_factory=list)  # of JPEG files, as many as scores without an error

    @property
    def good(self) -> list[Score]:
        return [score for score in self.scores if not score.error]

    def values(self) -> list[dict[str, float]]:
        """Of every picture that could be scored."""
        values = [{"psnr": score.psnr, "ssim": score.ssim, **score.distances} for score in self.good]
        for value, size in zip(values, self.bytes, strict=False):
            value["bytes"] = size
        return values

    def means(self) -> dict[str, float]:
        values = self.values()
        return {name: fmean(value[name] for value in values) for name in values[0]}


def _path_option(name: str, text: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(name, type=click.Path(path_type=Path), help=text)


@click.command(name="eval")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--size", type=SIZE, default=256, show_default=True, help="Short side, then centre crop, pixels.")
@click.option("--frames", type=click.IntRange(1), help="Score clips, not pictures: the first so many frames of each.")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Pictures or frames at a time.")
@click.option("--metrics", "wanted", type=MetricList(), default="", help=f"More: {', '.join(TITLES)} or all.")
@_path_option("--vgg-hed", "Weights of the VGG-HED distance, safetensors; adds it.")
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
    over frames, then over clips. A metric that is asked for and cannot be had is skipped and says why.
    """
    model = open_model(model_name, device, dtype)
    paths = {"vgg-hed": vgg_hed, "lpips": lpips_weights, "fid": fid_weights, "is": fid_weights, "fvd": fvd_weights}
    metrics = _open({name for name in TITLES if name in wanted or paths.get(name)}, paths, frames, model.device)
    rows: dict[str, Row] = {}
    with Display() as display:

        def score(name: str, reconstruct: Callable[[Tensor], Tensor]) -> None:
            before = next(iter(rows.values())).comparisons if rows else None
            comparisons = {
                each: Comparison(each, before[each].originals, shared=True) if before else Comparison(each)
                for each in metrics.extractors.values()
            }
            rows[name] = Row([], comparisons)
            scores = score_folder(
                folder, size, reconstruct, batch=max(1, batch // (frames or 1)), frames=frames,
                distances=metrics.distances, comparisons=tuple(comparisons.values()), device=model.device,
            )  # fmt: skip
            with display.track(None, "clips" if frames else "pictures") as advance:
                for each in scores:
                    rows[name].scores.append(each)
                    advance(1, f"{name}: {each.path.name}")

        score(model_name, lambda pixels: _through(model, pixels))
        failed = [each for each in rows[model_name].scores if each.error]
        for each in failed:
            display.say(f"error: {each.error}")
        total = len(rows[model_name].scores)
        if pca_folder and len(failed) < total:
            score(PCA, _fit(model, pca_folder, groups, frames, display))
        if with_jpeg and len(failed) < total:
            budgets = _bytes(model, size, frames)
            score(f"{model_name} 8-bit", lambda pixels: _through(model, pixels, eight_bits=True))
            sizes: list[int] = []
            score(JPEG, lambda pixels: _through_jpeg(pixels, budgets, sizes))
            rows[JPEG].bytes = sizes
            over = sum(each > sum(budgets) for each in sizes)
            if over:
                display.say(
                    f"JPEG cannot be as small as {sum(budgets)} bytes for {over} of {len(sizes)}, even at quality 1"
                )
    facts = (
        _facts(rows, metrics, model, size, frames)
        if len(failed) < total
        else {"pictures": 0, "means": {}, "scores": []}
    )
    if as_json:
        click.echo(json.dumps({"size": size, "failed": len(failed), **facts}, indent=2))
    elif len(failed) < total:
        _show(rows, metrics, facts)
    finish(total, len(failed), "scored", quiet=as_json)


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


def _fit(model: ViTok, folder: Path, groups: str, frames: int | None, display: Display) -> Callable[[Tensor], Tensor]:
    """PCA of as many floats as the model has: of its tubelets in clips, or of its patches in single pictures."""
    (q, p), channels = model.config.tubelet, model.config.channels
    data = _training_data(folder, groups, q)
    if frames is None or data.sources[0].kind == "pictures":
        channels, spare = divmod(channels, q if frames else 1)
        if spare or not channels:
            raise InputError(
                f"--pca gives each of a tubelet's {q} frames the same share of the {model.config.channels} channels, "
                "a whole number"
            )
        q = 1
    pca = fit_pca(_crops(data, display), (q, p), channels)

    def reconstruct(pixels: Tensor) -> Tensor:
        return pca.reconstruct(pixels, channels) if frames else pca.reconstruct(pixels[:, None], channels)[:, :, 0]

    return reconstruct


def _training_data(folder: Path, groups: str, frames: int) -> Batches:
    """The crops that the baseline is fitted on: uint8 [8, 256, 256, 3] each, or [8, frames, 256, 256, 3]."""
    try:
        re.compile(groups)
    except re.error as error:
        raise InputError(f"--groups {groups!r} is no regular expression: {error}") from error
    return Batches(folder, batch=BATCH, crop=256, short_side=(256, 512), seed=0, groups=groups, frames=frames)


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
