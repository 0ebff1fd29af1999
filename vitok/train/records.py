"""What a run leaves for people to look at: a log, scalars for TensorBoard, reconstructions, and curves at the end."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from vitok.data.batches import Batch, Batches
from vitok.errors import InputError
from vitok.evaluate.metrics import psnr
from vitok.io.files import atomic_path
from vitok.io.images import write_image
from vitok.io.sheet import ContactSheet
from vitok.train.config import TrainConfig

LOG, CURVES, SHEETS, SCALARS = "log.csv", "curves.png", "reconstructions", "tensorboard"
PACE = ("images_per_s", "operations_per_s", "data_wait")
"""Metrics that are no function of configuration and step, so that the log is without them."""
SHOWN = 8
"""Pictures or clips on a sheet of reconstructions."""
SHOWN_STEP = 2**33
"""They are those of the steps from here on, beyond the steps of any run, so that they do not change with its length."""
POINTS = 400
"""Most points of a curve, so that a long one is smooth."""


class Pace:
    """How fast the last ten steps or so were, and what for; and how long all of them waited."""

    def __init__(self) -> None:
        self._totals = [0.0, 0.0, 0.0, 0.0]
        self._steps, self._waited, self._seconds = 0, 0.0, 0.0

    def add(self, waited: float, worked: float, images: int, operations: float) -> dict[str, float]:
        """Count a step in, by its seconds; returns `PACE`, the last as a percentage of the time."""
        if self._steps:
            self._waited, self._seconds = self._waited + waited, self._seconds + waited + worked
        self._steps += 1
        new = (waited, worked, images, operations)
        self._totals = [0.9 * total + more for total, more in zip(self._totals, new, strict=True)]
        waited, worked, seen, done = self._totals
        seconds = waited + worked
        return dict(zip(PACE, (seen / seconds, done / seconds, 100 * waited / seconds), strict=True))

    @property
    def data_wait(self) -> float:
        """Percentage of the time spent waiting for batches, over all steps but the first, for which workers start."""
        return 100 * self._waited / self._seconds if self._seconds else 0.0


class Log:
    """A CSV file that gets a row every so many steps, each on the disk at once.

    Opened at the step from which a run goes on: rows after it are dropped, and half a row that a kill left. So the log
    of a run that was killed ends up as that of one that was not. InputError when the file cannot be written.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.columns = path, list[str]()
        lines = self._lines()
        kept = [line for line in lines[1:] if line.endswith("\n") and _step(line) <= step]
        if kept:
            self.columns = lines[0].strip().split(",")
        if len(kept) < len(lines) - 1:
            self._write([lines[0], *kept])

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a row; a metric that there was not before makes a column, empty in the rows above."""
        row = {"step": str(step), **{name: f"{value:.6g}" for name, value in metrics.items()}}
        if new := [name for name in row if name not in self.columns]:
            self.columns += new
            self._write([f"{','.join(self.columns)}\n", *(f"{x[:-1]}{',' * len(new)}\n" for x in self._lines()[1:])])
        try:
            with open(self.path, "a") as file:
                file.write(",".join(row.get(name, "") for name in self.columns) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}") from error

    def _lines(self) -> list[str]:
        return self.path.read_text(errors="replace").splitlines(keepends=True) if self.path.exists() else []

    def _write(self, lines: Iterable[str]) -> None:
        with atomic_path(self.path) as path:
            path.write_text("".join(lines))


class Records(AbstractContextManager["Records"]):
    """The log, TensorBoard's scalars where that is installed, and the sheets of a run that goes on from `step`.

    The first rank writes; the others only take part in reconstructing.
    """

    def __init__(self, config: TrainConfig, step: int, rank: int = 0) -> None:
        self.config, self.out, self.rank = config, Path(config.out), rank
        self._samples: list[Batch] = []
        if rank == 0:
            self.log = Log(self.out / LOG, step)
            writer = _summary_writer()
            self.scalars = writer and writer(str(self.out / SCALARS), purge_step=step + 1)

    def __exit__(self, *_: object) -> None:
        if self.rank == 0 and self.scalars:
            self.scalars.close()

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log a step's metrics, if it is one of those that are logged."""
        if self.rank > 0 or not self._due(step, self.config.log_every):
            return
        self.log.add(step, {name: metrics[name] for name in metrics if name not in PACE})
        if self.scalars:
            for name, value in metrics.items():
                self.scalars.add_scalar(name, value, step)
            self.scalars.flush()

    def show(self, step: int, data: Batches, reconstruct: Callable[[Tensor], Tensor]) -> None:
        """Draw a sheet of the same few samples, if the step is one of those that have one; all ranks together.

        Of a clip the first and the last frame are drawn. `reconstruct` maps clips [1, T, H, W, 3], uint8, to clips.
        """
        if not self._due(step, self.config.sample_every):
            return
        self._samples = self._samples or [data.first(SHOWN_STEP + i, 1) for i in range(SHOWN)]
        side = min(max(self.config.crop, 128), 256)
        sheet = ContactSheet(cell=(side, side), max_width=8 * side + 160)  # four pairs in a row
        for sample in self._samples:
            original, found, (name,) = sample.clips[0], reconstruct(sample.clips)[0], sample.names
            ends = {", first frame": 0, ", last frame": -1} if len(original) > 1 else {"": 0}
            for end, frame in ends.items():
                caption = f"{psnr(original[frame], found[frame]):.2f} dB\n{name}{end}"
                sheet.add(original[frame], found[frame], caption)
        if self.rank == 0:
            write_image(self.out / SHEETS / f"{step:08d}.png", sheet.render())

    def _due(self, step: int, every: int) -> bool:
        return every > 0 and (step % every == 0 or step == self.config.steps)


def lacking() -> list[str]:
    """What a run does not leave behind because a package is missing, and how to have it."""
    told = []
    if _summary_writer() is None:
        told.append("TensorBoard: not installed (pip install tensorboard)")
    if not find_spec("matplotlib"):
        told.append(f"{CURVES}: matplotlib is not installed (pip install matplotlib)")
    return told


def draw_curves(out: Path) -> None:
    """Loss, PSNR and learning rate over the steps of a run's log, where there is one and matplotlib is installed."""
    rows = _rows(out / LOG)
    if not rows or not find_spec("matplotlib"):
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    grid = figure.subplots(3, 1, sharex=True)
    each = -(-len(rows) // POINTS)
    points = [rows[i : i + each] for i in range(0, len(rows), each)]
    steps = [int(point[-1]["step"]) for point in points]
    for axes, name, label in zip(grid, ("loss", "psnr", "lr"), ("loss", "PSNR, dB", "learning rate"), strict=True):
        values = [fmean(float(row[name]) for row in point) for point in points]
        axes.plot(steps, values, color="#30638e", linewidth=1)
        if name == "loss" and min(values) > 0:
            axes.set_yscale("log")
        axes.set_ylabel(label, fontsize=8)
        axes.tick_params(labelsize=6, which="both")
        axes.yaxis.offsetText.set_fontsize(6)
    grid[-1].set_xlabel("steps" if each == 1 else f"steps; a point is the mean of {each} rows of the log", fontsize=8)
    with atomic_path(out / CURVES) as path:
        figure.savefig(path, dpi=110)


def _rows(log: Path) -> list[dict[str, str]]:
    if not log.exists():
        return []
    with open(log, newline="") as file:
        return list(csv.DictReader(file))


def _step(line: str) -> float:
    """Of a row; beyond all steps where it has none."""
    text = line.partition(",")[0]
    return int(text) if text.isdecimal() else float("inf")


def _summary_writer() -> Any:
    """TensorBoard's, or None where that is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter
