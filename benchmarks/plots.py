"""Pictures of the rows of `make bench-ops`: python benchmarks/plots.py

One for each result file: how many times faster than the eager composition every provider is, on a logarithmic axis.
"""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from vitok.io.files import atomic_path

RESULTS = Path(__file__).with_name("results")
IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
OURS = {"native": "#d1495b", "widened": "#d1495b", "triton": "#edae49", "reference": "#8d99ae"}


def draw(axes: Axes, rows: list[dict[str, str]], title: str) -> None:
    labels, ratios, colours = [], [], []
    for row in rows:
        labels.append(f"{row['case']}: {row['provider']}")
        ratios.append(float(row["ratio_to_eager"]))
        colours.append(OURS.get(row["provider"], "#30638e"))
    axes.barh(range(len(rows)), ratios, color=colours, height=0.75)
    axes.set_yticks(range(len(rows)), labels, fontsize=6)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1.0, color="black", linewidth=0.8)
    for place, ratio in enumerate(ratios):
        axes.text(ratio, place, f" {ratio:.2f}", va="center", fontsize=6)
    axes.set_xlabel("times faster than the eager composition", fontsize=7)
    axes.set_title(title, fontsize=9)


def plot(path: Path) -> Path:
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["ratio_to_eager"] and float(row["ratio_to_eager"]) != 1.0]
    panels = sorted({(row["direction"], row["dtype"]) for row in rows}, reverse=True)
    chosen = [[r for r in rows if (r["direction"], r["dtype"]) == panel] for panel in panels]
    height = 0.14 * max(map(len, chosen)) + 1
    figure, grid = plt.subplots(len(panels), 1, figsize=(7, height * len(panels)), squeeze=False)
    for axes, panel, part in zip(grid[:, 0], panels, chosen, strict=True):
        draw(axes, part, f"{panel[0]}, {panel[1]}, {rows[0]['device']}, {rows[0]['threads']} threads")
    figure.tight_layout()
    target = IMAGES / f"{path.stem}.png"
    with atomic_path(target) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)
    return target


if __name__ == "__main__":
    for path in sorted(RESULTS.glob("ops-*.csv")):
        print(plot(path))
