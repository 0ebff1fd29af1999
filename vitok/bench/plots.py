"""Pictures of the rows that `vitok bench` writes, one beside each CSV file: python -m vitok.bench.plots FILE.csv ...

ops: times faster than the eager composition, and a roofline. model and peers: throughput against multiply-accumulates
with the line on which a model lies that costs as many times more time as it has more of them than ours. scale: cost a
pixel. packed: rate a token. cache: rate a picture.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from vitok.io.files import atomic_path

OURS = {"native": "#d1495b", "widened": "#d1495b", "triton": "#edae49", "reference": "#8d99ae"}
Row = dict[str, str]


def plot(path: Path) -> Path | None:
    """Draw a CSV file's rows as a PNG beside it; None when it has no times."""
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["ms_p50"]]
    if not rows:
        return None
    kind = path.name.split("-")[0]
    figure = plt.figure(figsize=(7, 4.5), layout="constrained")
    {
        "ops": _ops,
        "model": _model,
        "peers": _peers,
        "scale": _scale,
        "packed": _packed,
        "cache": _cache,
        "published": _published,
    }[kind](figure, rows)
    figure.suptitle(f"{rows[0]['device']}, {rows[0]['threads']} threads", fontsize=8)
    target = path.with_suffix(".png")
    with atomic_path(target) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)
    return target


def _grouped(rows: Iterable[Row], *names: str) -> dict[str, list[Row]]:
    groups = defaultdict(list)
    for row in rows:
        groups[" ".join(row[name] for name in names)].append(row)
    return groups


def _ops(figure: plt.Figure, rows: list[Row]) -> None:
    groups = _grouped((r for r in rows if float(r["ratio_to_eager"]) != 1.0), "direction", "dtype")
    height = 0.14 * max((len(part) for part in groups.values()), default=1) + 1
    figure.set_size_inches(7, height * len(groups) + 4)
    grid = figure.subplots(len(groups) + 1, 1, squeeze=False, height_ratios=[height] * len(groups) + [4])[:, 0]
    for axes, (title, part) in zip(grid, groups.items(), strict=False):
        _bars(axes, part, title)
    _roofline(grid[-1], rows)


def _bars(axes: Axes, rows: list[Row], title: str) -> None:
    ratios = [float(row["ratio_to_eager"]) for row in rows]
    colours = [OURS.get(row["provider"], "#30638e") for row in rows]
    axes.barh(range(len(rows)), ratios, color=colours, height=0.75)
    axes.set_yticks(range(len(rows)), [f"{row['case']}: {row['provider']}" for row in rows], fontsize=6)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1.0, color="black", linewidth=0.8)
    for place, ratio in enumerate(ratios):
        axes.text(ratio, place, f" {ratio:.2f}", va="center", fontsize=6)
    axes.set_xlabel("times faster than the eager composition", fontsize=7)
    axes.set_title(title, fontsize=9)


def _roofline(axes: Axes, rows: list[Row]) -> None:
    """Share of what bounds an op, the copy's or the product's rate measured in the same run."""
    ours = [row for row in rows if row["provider"] in OURS and row["direction"] == "forward"]
    for bound, marker in (("percent_of_copy", "o"), ("percent_of_matmul", "s")):
        points = [(row["case"], float(row[bound])) for row in ours if row[bound]]
        axes.scatter([y for _, y in points], [x for x, _ in points], marker=marker, s=14, label=bound.replace("_", " "))
    axes.axvline(100, color="black", linewidth=0.8)
    axes.tick_params(labelsize=6)
    axes.set_xlabel(
        "% of the copy's or the matrix product's rate in the same run, forward, our implementations", fontsize=7
    )
    axes.legend(fontsize=6)


def _cost(axes: Axes, rows: list[Row], title: str, ours: str = "vitok") -> None:
    """Calls a second against GMAC, and the line of equal cost a MAC through our fastest row."""
    for row in rows:
        x, y = float(row["gmac"]), 1e3 / float(row["ms_p50"])
        axes.scatter(x, y, s=18, color="#d1495b" if row["provider"].startswith(ours) else "#30638e")
        axes.annotate(row["provider"], (x, y), fontsize=5, xytext=(3, 2), textcoords="offset points")
    best = max((r for r in rows if r["provider"].startswith(ours)), key=lambda r: 1 / float(r["ms_p50"]), default=None)
    if best:
        xs = [min(float(r["gmac"]) for r in rows) / 1.5, max(float(r["gmac"]) for r in rows) * 1.5]
        rate = float(best["gmac"]) * 1e3 / float(best["ms_p50"])
        axes.plot(xs, [rate / x for x in xs], color="#8d99ae", linewidth=0.8, label="FLOP-equal to ours")
        axes.legend(fontsize=6)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(title, fontsize=8)
    axes.set_xlabel("GMAC a call", fontsize=7)
    axes.set_ylabel("calls a second", fontsize=7)
    axes.tick_params(labelsize=6, which="both")


def _panels(figure: plt.Figure, groups: dict[str, list[Row]], columns: int) -> None:
    lines = -(-len(groups) // columns)
    figure.set_size_inches(4 * columns, 3.2 * lines)
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in grid[len(groups) :]:
        axes.set_visible(False)
    for axes, (title, part) in zip(grid, groups.items(), strict=False):
        _cost(axes, part, title)


def _model(figure: plt.Figure, rows: list[Row]) -> None:
    _panels(figure, _grouped(rows, "case", "frames", "size", "what", "batch"), 2)


def _peers(figure: plt.Figure, rows: list[Row]) -> None:
    _panels(figure, _grouped(rows, "case", "what"), 2)


def _scale(figure: plt.Figure, rows: list[Row]) -> None:
    axes = figure.subplots()
    for label, part in _grouped(rows, "case", "provider").items():
        pixels = [float(row["frames"]) * float(row["size"]) ** 2 for row in part]
        axes.plot(pixels, [float(row["ns_per_pixel"]) for row in part], marker="o", label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("pixels, all frames")
    axes.set_ylabel("ns a pixel, encode and decode")
    axes.legend(fontsize=7)


def _packed(figure: plt.Figure, rows: list[Row]) -> None:
    axes = figure.subplots()
    names = [f"{row['path']}, {row['what']}: {row['provider']}" for row in rows]
    axes.barh(names, [float(row["percent_of_uniform"] or 0) for row in rows], color="#30638e")
    axes.axvline(100, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("% of the uniform batch's rate a token")


def _cache(figure: plt.Figure, rows: list[Row]) -> None:
    axes = figure.subplots()
    names = [f"{row['case']}, batch {row['batch']}: {row['provider']}" for row in rows]
    axes.barh(names, [float(row["images_per_s"]) for row in rows], color="#30638e")
    axes.invert_yaxis()
    axes.set_xlabel("pictures a second")


def _published(figure: plt.Figure, rows: list[Row]) -> None:
    timed, loaded = figure.subplots(1, 2)
    for axes, column, title in (
        (timed, "ratio_to_plain", "times faster than the plain definition"),
        (loaded, "ratio_to_read", "times the time of reading the files"),
    ):
        part = [row for row in rows if row[column]]
        names = [" ".join(filter(None, (row["what"], row["batch"], row["provider"]))) for row in part]
        axes.barh(names, [float(row[column]) for row in part], color="#30638e")
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.tick_params(labelsize=6)
        axes.set_xlabel(title, fontsize=7)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(plot(Path(name)))
