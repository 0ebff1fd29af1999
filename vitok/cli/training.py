"""vitok train and vitok eval."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import click

from vitok.cli.common import device_option, model_options, open_device, open_model, progress, show_table
from vitok.data.images import ImageCrops
from vitok.errors import InputError
from vitok.evaluate.pca import PCA_CROPS, fit_pca
from vitok.evaluate.reconstruction import score_folder


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("assignments", nargs=-1, metavar="[KEY=VALUE]...")
@device_option
def train(config: Path, assignments: tuple[str, ...], device: str | None) -> None:
    """Train a model as a YAML file says, with fields replaced by KEY=VALUE; goes on where a stopped run left off."""
    from vitok.train.config import TrainConfig
    from vitok.train.trainer import MODEL, Trainer

    settings = TrainConfig.load(config, assignments)
    trainer = Trainer(settings, open_device(device))
    for problem in trainer.data.skipped:
        click.echo(f"skipped: {problem}", err=True)
    click.echo(f"{trainer.parameters / 1e6:.2f} M parameters, {len(trainer.data)} pictures, step {trainer.step} of {settings.steps}")
    with progress(settings.steps - trainer.step, "steps") as advance:
        trainer.run(lambda step, m: advance(1, f"loss {m['loss']:.5f} kl {m['kl']:.3f} psnr {m['psnr']:.2f} dB"))
    click.echo(f"step {trainer.step} of {settings.steps}; averaged model in {trainer.out / MODEL}")


@click.command(name="eval")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--size", type=click.IntRange(1), default=256, show_default=True, help="Short side, then centre crop, pixels.")
@click.option("--pca", "pca_folder", type=click.Path(path_type=Path), help="Also fit and score patch PCA on this folder of pictures.")
@click.option("--groups", default="", help="Regular expression; file names with the same match are drawn evenly for --pca.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
@model_options
def evaluate(
    folder: Path, size: int, pca_folder: Path | None, groups: str, as_json: bool, model_name: str, device: str | None, dtype: str
) -> None:
    """PSNR and SSIM of reconstructions of the pictures in FOLDER, beside the best linear tokenizer of one patch.

    Posterior mean, output rounded to uint8, data range 255, every figure the mean over pictures.
    """
    model = open_model(model_name, device, dtype)
    config = model.config
    scores = {model_name: list(score_folder(folder, size, lambda pixels: model.decode(model.encode(pixels, layout="channels_last").mode(), size=(size, size))))}
    if pca_folder:
        crops = ImageCrops(pca_folder, batch=8, crop=256, short_side=(256, 512), seed=0, groups=groups)
        pca = fit_pca((crops[i][:, None] for i in range(PCA_CROPS // 8)), (1, config.patch), config.channels)
        scores["PCA"] = list(score_folder(folder, size, lambda pixels: pca.reconstruct(pixels[:, None], config.channels)[:, :, 0]))
    failed = [score for score in scores[model_name] if score.error]
    for score in failed:
        click.echo(f"error: {score.error}", err=True)
    good = {name: [score for score in each if not score.error] for name, each in scores.items()}
    if not good[model_name]:
        raise InputError(f"no picture of {folder} could be scored")
    means = {name: {"psnr": fmean(s.psnr for s in each), "ssim": fmean(s.ssim for s in each)} for name, each in good.items()}
    if as_json:
        pictures = [{"input": row[0].path.name} | {name: s.psnr for name, s in zip(good, row, strict=True)} for row in zip(*good.values(), strict=True)]
        click.echo(json.dumps({"size": size, "pictures": len(pictures), "means": means, "psnr": pictures}, indent=2))
    else:
        columns = ("picture", *(f"{name} {metric}" for name in good for metric in ("PSNR dB", "SSIM")))
        rows = [(row[0].path.name, *(text for s in row for text in (f"{s.psnr:.2f}", f"{s.ssim:.4f}"))) for row in zip(*good.values(), strict=True)]
        rows.append((f"mean of {len(rows)}", *(text for m in means.values() for text in (f"{m['psnr']:.2f}", f"{m['ssim']:.4f}"))))
        title = f"{size} x {size} centre crops, {config.patch} x {config.patch} patches, {config.channels} channels"
        show_table(title, columns, rows)
        if pca_folder:
            click.echo(f"{model_name} is {means[model_name]['psnr'] - means['PCA']['psnr']:+.2f} dB against PCA")
    if failed:
        raise SystemExit(2)
