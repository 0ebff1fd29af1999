"""The paper's findings (arXiv:2501.09755, section 3) on a scale that two CPU cores reach:

    python benchmarks/findings.py --data PHOTOS/train --heldout PHOTOS/heldout --vgg-hed vgg16_hed.safetensors

trains every experiment of the list below that has no row yet in benchmarks/results/findings.csv, scores it on the
held-out photographs, writes the row at once, and draws findings.png from all rows. `python docs/generate.py` then makes
the tables of docs/findings.md. A run that is stopped goes on where it was, and loses the experiment it was at.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import torch
from torch import Tensor

from vitok import InputError, ViTok, create_model, load
from vitok.bench.machine import facts
from vitok.data.batches import Batches
from vitok.evaluate.pca import PCA_CROPS, PatchPCA, fit_pca
from vitok.evaluate.perceptual import VGGHED
from vitok.evaluate.reconstruction import score_folder
from vitok.io.files import atomic_path
from vitok.train.config import TrainConfig
from vitok.train.init import init_from_pca
from vitok.train.trainer import Trainer

RESULTS = Path(__file__).with_name("results") / "findings.csv"
SIZE = 256  # pixels a side of the pictures that are scored
WIDTH, HEADS = 128, 4
GROUPS = "^[^_]+"  # file names begin with the package they come from; packages are drawn evenly
SWITCHES = {"final_norm": False, "qk_norm": True, "pixel_bias": "element"}  # what a start from PCA needs; always so
RATE = {"pca": 1e-3, "random": 2e-3}
CLIP = {"pca": 0.05, "random": 1.0}
STARTS = {"pca": "trained from PCA", "random": "trained from random weights"}
MEASURED = ("psnr", "ssim", "vgg_hed", "kl", "seconds")
FACTS = ("date", "commit", "torch", "device", "cpu_isa", "threads")


@dataclass(frozen=True)
class Experiment:
    """One training run; 0 steps are the start as it is, which from "pca" is the best linear tokenizer of a patch."""

    finding: str
    patch: int
    channels: int
    init: str = "pca"
    steps: int = 400
    encoder: int = 2  # blocks
    decoder: int = 4
    pixel_loss: str = "l2"
    eta: float = 0.0  # of the VGG-HED distance
    beta: float = 1e-5
    batch: int = 4
    crop: int = 128
    seed: int = 0

    @property
    def floats(self) -> int:
        """E of a picture of 256 x 256 pixels."""
        return (SIZE // self.patch) ** 2 * self.channels

    @property
    def model(self) -> str:
        stacks = (f"Tiw{WIDTH}d{depth}h{HEADS}" for depth in (self.encoder, self.decoder))
        return f"{'-'.join(stacks)}/1x{self.patch}x{self.channels}"

    def config(self, data: str, out: Path, start: Path, vgg_hed: str) -> TrainConfig:
        """The run from the model in `start`."""
        return TrainConfig(
            data=data, out=str(out), init=str(start), model=self.model, channels=self.channels, overrides=SWITCHES,
            steps=self.steps, batch=self.batch, crop=self.crop, short_side=(256, 384), groups=GROUPS,
            pixel_loss=self.pixel_loss, beta=self.beta, eta=self.eta, perceptual="vgg_hed" if self.eta else "none",
            perceptual_weights=vgg_hed if self.eta else "", learning_rate=RATE[self.init], warmup=20,
            grad_clip=CLIP[self.init], ema=0.998, precision="fp32", seed=self.seed, workers=0, save_every=10**6,
        )  # fmt: skip


def law(init: str, seed: int, channels: Sequence[int] = (4, 16, 64), steps: int = 400) -> list[Experiment]:
    return [Experiment("law", patch, c, init, steps, seed=seed) for c in channels for patch in (16, 8)]


def sizes(seed: int) -> list[Experiment]:
    return [Experiment("sizes", 16, 4, encoder=e, decoder=d, seed=seed) for e, d in ((2, 2), (2, 6), (6, 2))]


def losses(seed: int) -> list[Experiment]:
    base = Experiment("losses", 8, 4, steps=150, batch=8, crop=64, seed=seed)
    changes: tuple[dict[str, Any], ...] = (
        {"steps": 0}, {}, {"pixel_loss": "l1"}, {"eta": 0.1}, {"eta": 1.0}, {"beta": 0.0}, {"beta": 1e-3},
        {"beta": 1e-1},
    )  # fmt: skip
    return [dataclasses.replace(base, **change) for change in changes]


EXPERIMENTS = [
    *law("pca", 0, (4, 8, 16, 32, 64), steps=0),
    *law("pca", 0),
    *sizes(0),
    *losses(0),
    *sizes(1),
    *law("random", 0),
    *law("pca", 1, (4, 16)),
    *sizes(2),
    *(Experiment("longer", patch, c, steps=800) for patch, c in ((8, 4), (16, 16))),
]
"""The most important first."""

Row = dict[str, str]


def key(experiment: Experiment) -> Row:
    return {name: str(value) for name, value in dataclasses.asdict(experiment).items()}


def read_rows(path: Path, experiments: Iterable[Experiment]) -> list[Row]:
    """The rows there are of these experiments, in their order; what else the file holds is of a list that is gone."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    found = [[row for row in rows if key(each).items() <= row.items()] for each in experiments]
    return [row for matches in found for row in matches[:1]]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    names = [*(field.name for field in dataclasses.fields(Experiment)), "floats", *MEASURED, *FACTS]
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def run(
    experiments: Sequence[Experiment], data: str, heldout: str, vgg_hed: str, path: Path, say: Callable[[str], None]
) -> list[Row]:
    """Measure what has no row yet; returns all rows."""

    @functools.cache
    def pca(patch: int) -> PatchPCA:
        crops = Batches(data, batch=8, crop=SIZE, short_side=(SIZE, 2 * SIZE), seed=0, groups=GROUPS)
        return fit_pca((crops[i].clips for i in range(PCA_CROPS // 8)), (1, patch), WIDTH)

    rows = read_rows(path, experiments)
    for experiment in experiments:
        if any(key(experiment).items() <= row.items() for row in rows):
            continue
        if experiment.finding == "losses" and not vgg_hed:
            say(f"left out, since it needs --vgg-hed: {experiment}")
            continue
        begun = time.perf_counter()
        model = train(experiment, data, pca, vgg_hed)
        seconds = time.perf_counter() - begun
        measured = score(model, heldout, vgg_hed if experiment.finding == "losses" else "") | {"seconds": seconds}
        numbers = {name: f"{value:.6g}" for name, value in measured.items()}
        known = facts(torch.device("cpu"))
        row = key(experiment) | {"floats": str(experiment.floats)} | numbers | {f: str(known[f]) for f in FACTS}
        rows.append(row)
        write_rows(path, rows)
        say(", ".join(f"{name} {value}" for name, value in row.items() if value and name not in FACTS))
    return rows


def train(experiment: Experiment, data: str, pca: Callable[[int], PatchPCA], vgg_hed: str) -> ViTok:
    """The averaged model after the last step. The seed decides the first weights, the crops and the noise."""
    torch.manual_seed(experiment.seed)
    model = create_model(experiment.model, channels=experiment.channels, **SWITCHES)
    if experiment.init == "pca":
        init_from_pca(model, pca(experiment.patch), experiment.beta)
    if not experiment.steps:
        return model.eval()
    with tempfile.TemporaryDirectory() as folder:
        start, out = Path(folder, "start"), Path(folder, "run")
        model.save(start)
        trainer = Trainer(experiment.config(data, out, start, vgg_hed))
        trainer.run()
        if trainer.step < experiment.steps:  # the trainer takes the first Ctrl-C for a wish to save
            raise click.Abort
        return load(out / "model")


def score(model: ViTok, heldout: str, vgg_hed: str) -> dict[str, float]:
    """Means over the held-out pictures: short side to 256, centre crop, posterior mean, uint8; KL a float in nats."""
    kl: list[Tensor] = []

    def reconstruct(pixels: Tensor) -> Tensor:
        posterior = model.encode(pixels, layout="channels_last")
        kl.append(posterior.kl().float().mean())
        return model.decode(posterior.mode(), size=(SIZE, SIZE))

    distances = {"vgg_hed": VGGHED(vgg_hed)} if vgg_hed else {}
    scores = list(score_folder(heldout, SIZE, reconstruct, distances=distances))
    for each in scores:
        if each.error:
            raise each.error
    far = {name: fmean(each.distances[name] for each in scores) for name in distances}
    means = {"psnr": fmean(each.psnr for each in scores), "ssim": fmean(each.ssim for each in scores)}
    return means | far | {"kl": torch.stack(kl).mean().item()}


def plot(path: Path, rows: Sequence[Row]) -> Path:
    """Draw the rows as a PNG beside their file: a panel a finding."""
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("plots need matplotlib; install it with: pip install 'vitok[bench]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(9, 7), layout="constrained")
    panels = figure.subplots(2, 2).flatten()
    found = {name: [row for row in rows if row["finding"] == name] for name in ("law", "sizes", "losses")}
    _law(panels[0], found["law"])
    _sizes(panels[1], found["sizes"])
    _losses(panels[2], [row for row in found["losses"] if row["beta"] == "1e-05"])
    plain = [row for row in found["losses"] if row["eta"] == "0.0" and row["pixel_loss"] == "l2"]
    _divergence(panels[3], [row for row in plain if int(row["steps"])])
    for axes in panels:
        axes.set_ylabel("PSNR dB, held-out photographs", fontsize=7)
        axes.tick_params(labelsize=6, which="both")
    target = path.with_suffix(".png")
    with atomic_path(target) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)
    return target


def _law(axes: Any, rows: Sequence[Row]) -> None:
    groups: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        kind = STARTS[row["init"]] if int(row["steps"]) else "PCA"
        groups[kind, row["patch"]][int(row["floats"])].append(float(row["psnr"]))
    axes.set_prop_cycle(markersize=[4], linewidth=[0.8])
    colours = {"PCA": "#8d99ae", STARTS["pca"]: "#d1495b", STARTS["random"]: "#30638e"}
    for (kind, patch), points in groups.items():
        xs = sorted(points)
        spread = [[fmean(points[x]) - min(points[x]) for x in xs], [max(points[x]) - fmean(points[x]) for x in xs]]
        marker, line = ("o", "-") if patch == "8" else ("s", "--")
        means = [fmean(points[x]) for x in xs]
        axes.errorbar(
            xs, means, spread, marker=marker, linestyle=line, color=colours[kind], label=f"{kind}, p = {patch}"
        )
    axes.set_xscale("log", base=2)
    axes.set_title("PSNR and E", fontsize=9)
    axes.set_xlabel("E, floats for 256 x 256 pixels", fontsize=7)
    axes.legend(fontsize=6)


def _sizes(axes: Any, rows: Sequence[Row]) -> None:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["seed"]].append(row)
    for seed, part in groups.items():
        names = [f"{row['encoder']} + {row['decoder']}" for row in part]
        axes.plot(names, [float(row["psnr"]) for row in part], "o", markersize=4, label=f"seed {seed}")
    axes.set_title("sizes, p = 16, c = 4", fontsize=9)
    axes.set_xlabel("blocks, encoder + decoder", fontsize=7)
    if groups:
        axes.legend(fontsize=6)


def _losses(axes: Any, rows: Sequence[Row]) -> None:
    for row in rows:
        name = row["pixel_loss"].upper() + (f" + {float(row['eta']):g} VGG-HED" if float(row["eta"]) else "")
        label = name if int(row["steps"]) else "PCA, the start"
        axes.plot(float(row["vgg_hed"]), float(row["psnr"]), "o", markersize=4, label=label)
    axes.set_title("losses, p = 8, c = 4", fontsize=9)
    axes.set_xlabel("VGG-HED distance", fontsize=7)
    if rows:
        axes.legend(fontsize=6)


def _divergence(axes: Any, rows: Sequence[Row]) -> None:
    for row in rows:
        axes.plot(float(row["kl"]), float(row["psnr"]), "o", markersize=4, label=f"beta {float(row['beta']):g}")
    axes.set_title("weight of the KL divergence, p = 8, c = 4", fontsize=9)
    axes.set_xlabel("KL divergence, nats a float", fontsize=7)
    axes.set_xscale("log", base=2)
    if rows:
        axes.legend(fontsize=6)


@click.command()
@click.option("--data", required=True, help="Photographs to train on.")
@click.option("--heldout", required=True, help="Photographs to score, none of them trained on.")
@click.option("--vgg-hed", default="", help="Weights of the VGG-HED distance; without them the losses are left out.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True, help="The CSV file.")
def main(data: str, heldout: str, vgg_hed: str, out: Path) -> None:
    """Measure every experiment that has no row yet, and draw all rows."""
    try:
        click.echo(plot(out, run(EXPERIMENTS, data, heldout, vgg_hed, out, click.echo)))
    except InputError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
