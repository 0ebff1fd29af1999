"""Rewrite the generated tables of README.md, docs and model cards: python docs/generate.py

A table stands between `<!-- generated: NAME -->` and `<!-- end -->` and comes from the code or from a result file.
"""

import csv
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean

import vitok

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def models() -> str:
    """Counts of the paper's models, from `vitok.count`."""
    lines = [
        "| model, c = 16 | input | parameters, encoder + decoder | tokens | floats | GMAC | GFLOP |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, frames, size in (
        ("S-B/16", 1, 256), ("S-B/16", 1, 512), ("S-L/16", 1, 256), ("S-B/4x8", 16, 128), ("S-B/8x8", 16, 128),
        ("S-B/4x16", 16, 128),
    ):  # fmt: skip
        c = vitok.count(name, size=size, frames=frames, channels=16, preset="author-v1")
        lines.append(
            f"| {name} | {frames} x {size} x {size} | {c.encoder_params:,} + {c.decoder_params:,} | {c.tokens:,} "
            f"| {c.floats:,} | {c.macs / 1e9:.2f} | {c.flops / 1e9:.2f} |"
        )
    return "\n".join(lines)


def means(name: str) -> tuple[dict, dict[str, dict]]:
    """A result of `vitok eval --json`, and of it the means by what was scored."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    return result, result["means"]


def quality(scored: str, rows: dict[str, dict]) -> str:
    """Means by label."""
    lines = [f"| {scored} | PSNR dB | SSIM | VGG-HED distance |", "|---|---|---|---|"]
    for label, mean in rows.items():
        lines.append(f"| {label} | {mean['psnr']:.2f} | {mean['ssim']:.4f} | {mean['vgg-hed']:.4f} |")
    return "\n".join(lines)


def heldout() -> str:
    """`demo` beside PCA, and after 8-bit latents beside JPEG."""
    result, found = means("demo-heldout")
    rows = {"`demo`": found["demo"], f"PCA, {result['model']}": found["PCA"]} | after_8_bits("demo", result)
    return quality(f"{result['pictures']} held-out photographs, 256 x 256", rows)


def heldout_clips() -> str:
    """`demo-video` beside `demo` frame by frame and PCA, at as many floats, and after 8-bit latents beside JPEG."""
    result, found = means("demo-video-clips")
    frames, by_frame = means("demo-clips")
    rows = {
        f"`demo-video`, {result['model']}": found["demo-video"],
        f"`demo`, {frames['model']}": by_frame["demo"],
        f"PCA, {result['model']}": found["PCA"],
        f"PCA, {frames['model']}": by_frame["PCA"],
    } | after_8_bits("demo-video", result)
    return quality(f"{result['clips']} held-out clips, {result['frames']} x 256 x 256", rows)


def after_8_bits(model: str, result: dict) -> dict[str, dict]:
    found = result["means"]
    return {
        f"`{model}`, latents of 8 bits: {result['bytes_8_bit']:,} bytes": found[f"{model} 8-bit"],
        f"JPEG of at most as many bytes, {found['JPEG']['bytes']:,.0f} on average": found["JPEG"],
    }


def examples() -> str:
    """What `vitok reconstruct examples --size 256` measures, but for the times."""
    result = json.loads((RESULTS / "demo-examples.json").read_text())
    lines = [
        "| input | frames | size | PSNR dB | SSIM | tokens | floats | compression |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["results"]:
        lines.append(
            f"| {row['input']} | {row['frames']} | {row['width']} x {row['height']} | {row['psnr']:.2f} "
            f"| {row['ssim']:.4f} | {row['tokens']:,} | {row['floats']:,} | {row['compression']:.1f}x |"
        )
    return "\n".join(lines)


Rows = list[dict[str, str]]


def results(kind: str) -> list[Rows]:
    """The rows of every file of a kind that `vitok bench` wrote, a file a device; those of `make bench-large` after."""
    found = []
    for path in (*sorted(RESULTS.glob(f"{kind}-*.csv")), *sorted(RESULTS.glob(f"large/{kind}-*.csv"))):
        with open(path, newline="") as file:
            found.append(list(csv.DictReader(file)))
    return [rows for rows in found if rows]


def measured_with(row: dict[str, str]) -> str:
    peers = f", diffusers {row['diffusers']}" if row.get("diffusers") else ""
    return (
        f"{row['date']}, {row['device']}, {row['threads']} threads, {row['cpu_isa']}, torch {row['torch']}{peers}, "
        f"commit {row['commit'][:12]}"
    )


def table(kind: str, columns: dict[str, str], chosen: Callable[[Rows], Rows] = list) -> str:
    """Columns {name: heading} of the rows of a kind, with what they were measured with."""
    lines = []
    for rows in filter(None, map(chosen, results(kind))):
        lines += [f"| {' | '.join(columns.values())} |", "|---" * len(columns) + "|"]
        for row in rows:
            cells = [pretty(row[name]) for name in columns if not (row["refused"] and name == "ms_p50")]
            if row["refused"]:
                cells.insert(list(columns).index("ms_p50"), row["refused"])
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", measured_with(rows[0]), ""]
    return "\n".join(lines).rstrip() or f"No rows yet: `vitok bench {kind} --out benchmarks/results` writes them."


def pretty(text: str) -> str:
    """A number as people read it, anything else as it is."""
    try:
        number = float(text)
    except ValueError:
        return text
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def whole_models() -> str:
    return table(
        "model",
        {
            "case": "model", "batch": "batch", "what": "what", "provider": "provider", "ms_p50": "ms p50",
            "ms_p95": "p95", "images_per_s": "images/s", "percent_of_matmul": "% of matmul rate",
            "linear_share": "linear layers' share", "ratio_to_reference": "times eager reference", "peak_mb": "peak MB",
            "psnr_change_db": "PSNR change, dB",
        },
    )  # fmt: skip


def published() -> str:
    return table(
        "published",
        {
            "case": "model", "what": "what", "batch": "batch", "dtype": "dtype", "provider": "provider",
            "ms_p50": "ms p50", "ms_p95": "p95", "percent_of_matmul": "% of matmul rate",
            "ratio_to_plain": "times plain definition", "file_mb": "file, MB", "ratio_to_read": "times reading",
            "peak_mb": "peak MB",
        },
    )  # fmt: skip


def caches() -> str:
    return table(
        "cache",
        {
            "case": "model", "size": "pixels", "batch": "batch", "dtype": "dtype", "provider": "provider",
            "workers": "workers", "pictures": "pictures", "ms_p50": "ms a picture, p50", "ms_p20": "p20",
            "images_per_s": "images/s", "percent_of_encode": "% of encode alone",
        },
        lambda rows: [row for row in rows if not row.get("seconds")],
    )  # fmt: skip


def cache_samples() -> str:
    """Rows of how many samples there are, which have seconds and no milliseconds of a picture."""
    return table(
        "cache",
        {
            "provider": "what", "pictures": "samples", "workers": "workers", "seconds": "s", "peak_mb": "peak MB",
        },
        lambda rows: [row for row in rows if row.get("seconds")],
    )  # fmt: skip


def training() -> str:
    return table(
        "train/model",
        {
            "case": "model", "batch": "batch", "dtype": "dtype", "provider": "provider", "ms_p50": "ms p50",
            "ms_p20": "p20", "percent_of_matmul": "% of matmul rate",
            "linear_share": "linear layers' share", "ratio_to_reference": "times eager reference", "peak_mb": "peak MB",
        },
    )  # fmt: skip


def fastest(rows: Rows) -> Rows:
    """Of several variants of a provider the fastest, and what was skipped as a whole."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["case"], row["what"], row["provider"]].append(row)
    timed = {key: [row for row in group if row["ms_p50"]] for key, group in groups.items()}
    return [min(timed[key], key=lambda row: float(row["ms_p50"])) if timed[key] else groups[key][0] for key in groups]


def peers() -> str:
    return table(
        "peers",
        {
            "case": "size", "what": "what", "provider": "model", "dtype": "dtype", "layout": "layout",
            "ms_p50": "ms p50", "gmac": "GMAC", "macs_ratio": "times our MACs", "time_ratio": "times our time",
        },
        fastest,
    )  # fmt: skip


def scale() -> str:
    columns = ("case", "frames", "size", "provider", "ms_p50", "ns_per_pixel", "mpixel_per_s", "peak_mb")
    headings = ("model", "frames", "size", "provider", "ms p50", "ns a pixel", "Mpixel/s", "peak MB")
    return table("scale", dict(zip(columns, headings, strict=True)))


def packed() -> str:
    columns = ("case", "path", "what", "provider", "ms_p50", "tokens_per_s", "percent_of_uniform")
    headings = ("model", "path", "what", "pictures", "ms p50", "tokens/s", "% of the uniform batch's rate")
    return table("packed", dict(zip(columns, headings, strict=True)))


def flop_claim() -> str:
    """The saving in operations beside the saving in time, of the peers' fastest rows."""
    lines = []
    for rows in results("peers"):
        timed = [r for r in fastest(rows) if r["time_ratio"] and not r["provider"].startswith("vitok")]
        lines += [
            "| size | peer | what | times our MACs | times our time | of the saving realised |",
            "|---|---|---|---|---|---|",
        ]
        for r in timed:
            macs, time = float(r["macs_ratio"]), float(r["time_ratio"])
            what = f"| {r['case']} | {r['provider']} | {r['what']} "
            lines.append(f"{what}| {macs:.1f} | {time:.1f} | {100 * time / macs:.0f}% |")
        lines += ["", measured_with(rows[0]), ""]
    return "\n".join(lines).rstrip() or "No rows yet: `vitok bench peers --out benchmarks/results` writes them."


def speed() -> str:
    """Encode and decode in sum, ours and the peers', each in its fastest variant."""
    lines = []
    for rows in results("peers"):
        sums: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
        for row in fastest(rows):
            if row["ms_p50"]:
                sums[row["case"], row["provider"]].append(row)
        total = {k: [sum(float(r[n]) for r in g) for n in ("ms_p50", "gmac")] for k, g in sums.items() if len(g) == 2}
        lines += ["| input | model | ms | GMAC | times our time | times our MACs |", "|---|---|---|---|---|---|"]
        for (case, provider), (ms, gmac) in total.items():
            ours = min(v for (c, p), v in total.items() if c == case and p.startswith("vitok"))
            cells = (case, provider, f"{ms:,.0f}", f"{gmac:,.0f}", f"{ms / ours[0]:.1f}", f"{gmac / ours[1]:.1f}")
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", measured_with(rows[0]), ""]
    return "\n".join(lines).rstrip() or "No rows yet: `make bench` writes them."


def ops() -> str:
    """Every row of `make bench-ops`, the losing ones too."""
    lines = []
    for rows in results("ops"):
        lines += [
            "| op | shape | dtype | direction | provider | ms, p20 - p50 - p80 | times eager | of copy or matmul |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            share = row["percent_of_matmul"] or row["percent_of_copy"]
            what = f"| {row['case']} | {row['shape']} | {row['dtype']} | {row['direction']} | {row['provider']} "
            if row["refused"]:
                lines.append(f"{what}| refused: {row['refused']} | | |")
                continue
            times = " - ".join(row[f"ms_{p}"] for p in ("p20", "p50", "p80"))
            lines.append(f"{what}| {times} | {float(row['ratio_to_eager']):.2f} | {share and f'{float(share):.0f}%'} |")
        lines += ["", measured_with(rows[0]), ""]
    return "\n".join(lines).rstrip()


def kernel_rows(section: str) -> tuple[str, list[dict]]:
    """Version of the compiler and rows of one section of the committed resources, from `make kernels-table`."""
    result = json.loads((RESULTS / "kernel-resources.json").read_text())[section]
    return result["version"], result["rows"]


def slashed(values: Iterable[object]) -> str:
    """One value when all are the same, else all of them."""
    texts = [str(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def triton_kernels() -> str:
    """A row a compilation, its architectures side by side."""
    version, rows = kernel_rows("triton")
    archs = sorted({row["arch"] for row in rows})
    lines = [
        f"Triton {version}, for {', '.join(f'sm_{arch}' for arch in archs)}, in this order where they differ.",
        "",
        "| kernel | case | constants | warps | stages | registers | shared bytes | spills | matrix instruction |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["arch"]):
        groups[row["op"], row["kernel"], row["case"], row["tile"]].append(row)
    for (_, kernel, case, tile), group in groups.items():
        fields = [
            slashed(row[name] for row in group) for name in ("num_warps", "num_stages", "registers", "shared", "spills")
        ]
        matrix = slashed(", ".join(row["matrix"]) or "-" for row in group)
        lines.append(f"| `{kernel}` | {case} | {tile} | {' | '.join(fields)} | {matrix} |")
    return "\n".join(lines)


def cuda_kernels() -> str:
    """A row a kernel, the worst of its template instances."""
    version, rows = kernel_rows("cuda")
    groups = defaultdict(list)
    for row in rows:
        groups[row["kernel"]].append(row)
    archs = dict.fromkeys(f"sm_{row['arch']}" for row in rows)
    lines = [
        f"nvcc {version}, for {', '.join(archs)}, in this order where they differ.",
        "",
        "| kernel | instances | registers | shared bytes | stack bytes | local bytes |",
        "|---|---|---|---|---|---|",
    ]
    for kernel, group in groups.items():
        fields = [
            slashed(row[name] for row in group) for name in ("instances", "registers", "shared", "stack", "local")
        ]
        lines.append(f"| `{kernel}` | {' | '.join(fields)} |")
    return "\n".join(lines)


def findings(finding: str) -> Rows:
    """The rows of one finding that `benchmarks/findings.py` wrote."""
    path = RESULTS / "findings.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [row for row in csv.DictReader(file) if row["finding"] == finding]


def over_seeds(values: Iterable[float], style: str = ".2f") -> str:
    """Mean and, of several, the lowest and the highest."""
    numbers = sorted(values)
    if not numbers:
        return "-"
    spread = f" ({numbers[0]:{style}} to {numbers[-1]:{style}})" if len(numbers) > 1 else ""
    return f"{fmean(numbers):{style}}{spread}"


STARTS = ("PCA", "pca", "random")  # PCA: not trained at all
PAPER = {
    (8, 4): 26.17, (8, 8): 28.34, (8, 16): 30.95, (8, 32): 35.11, (8, 64): 39.94,
    (16, 4): 22.82, (16, 8): 24.29, (16, 16): 26.12, (16, 32): 28.12, (16, 64): 30.55,
}  # fmt: skip
"""PSNR of S-B/p on ImageNet at 256 pixels by (p, c), read off the paper's vector figure."""


def law() -> dict[tuple[int, int], dict[str, dict[str, float]]]:
    """PSNR by (patch, channels), then by how the run started, then by seed."""
    found: dict[tuple[int, int], dict[str, dict[str, float]]] = defaultdict(lambda: {name: {} for name in STARTS})
    for row in findings("law"):
        start = row["init"] if int(row["steps"]) else "PCA"
        found[int(row["patch"]), int(row["channels"])][start][row["seed"]] = float(row["psnr"])
    return dict(sorted(found.items(), key=lambda item: (item[0][1] / item[0][0] ** 2, item[0][0])))


def findings_law() -> str:
    """PSNR over E, with the best linear tokenizer beside it."""
    headings = ("E", "p", "c", "PCA", "trained from PCA", "gained", "trained from random weights", "the paper's S-B")
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for (patch, channels), psnr in law().items():
        gained = [value - base for value in psnr["pca"].values() for base in psnr["PCA"].values()]
        before, after, other = (over_seeds(psnr[name].values()) for name in STARTS)
        cells = (before, after, over_seeds(gained, "+.2f"), other, f"{PAPER[patch, channels]:.2f}")
        lines.append(f"| {(256 // patch) ** 2 * channels:,} | {patch} | {channels} | {' | '.join(cells)} |")
    return "\n".join(lines)


def findings_pairs() -> str:
    """At equal E, what the patches of 16 pixels have over those of 8."""
    lines = [
        "| E | p16 minus p8, dB: PCA | trained from PCA | trained from random weights | the paper's S-B |",
        "|---|---|---|---|---|",
    ]
    found = law()
    for (patch, channels), large in found.items():
        small = found.get((8, channels // 4))
        if patch != 16 or small is None:
            continue
        gaps = [
            over_seeds([large[name][seed] - small[name][seed] for seed in large[name] if seed in small[name]], "+.2f")
            for name in STARTS
        ]
        paper = PAPER[16, channels] - PAPER[8, channels // 4]
        lines.append(f"| {256 * channels:,} | {' | '.join(gaps)} | {paper:+.2f} |")
    return "\n".join(lines)


def findings_longer() -> str:
    """The pair of 4,096 floats over the steps of training from PCA, seed 0."""
    lines = ["| steps | p8, c4 | p16, c16 | p16 minus p8, dB |", "|---|---|---|---|"]
    groups: dict[int, dict[tuple[str, str], float]] = defaultdict(dict)
    for row in findings("law") + findings("longer"):
        if row["init"] == "pca" and row["seed"] == "0":
            groups[int(row["steps"])][row["patch"], row["channels"]] = float(row["psnr"])
    for steps, psnr in sorted(groups.items()):
        small, large = psnr.get(("8", "4")), psnr.get(("16", "16"))
        if small is not None and large is not None:
            lines.append(f"| {steps:,} | {small:.2f} | {large:.2f} | {large - small:+.2f} |")
    return "\n".join(lines)


def findings_sizes() -> str:
    """What blocks are worth in either stack, seed by seed beside the smallest model."""
    rows = findings("sizes")
    groups = defaultdict(dict)
    for row in rows:
        groups[int(row["encoder"]), int(row["decoder"])][row["seed"]] = float(row["psnr"])
    smallest = groups[min(groups)] if groups else {}
    lines = ["| blocks, encoder + decoder | PSNR dB | over the smallest, same seed |", "|---|---|---|"]
    for (encoder, decoder), psnr in groups.items():
        gained = [psnr[seed] - smallest[seed] for seed in psnr if seed in smallest]
        lines.append(f"| {encoder} + {decoder} | {over_seeds(psnr.values(), '.3f')} | {over_seeds(gained, '+.3f')} |")
    return "\n".join(lines)


def findings_losses() -> str:
    """The same model by other losses."""
    lines = ["| loss | beta | PSNR dB | SSIM | VGG-HED distance | KL, nats a float |", "|---|---|---|---|---|---|"]
    groups = defaultdict(list)
    for row in findings("losses"):
        groups[int(row["steps"]), row["pixel_loss"], float(row["eta"]), float(row["beta"])].append(row)
    for (steps, pixel, eta, beta), rows in groups.items():
        name = (pixel.upper() + (f" + {eta:g} VGG-HED" if eta else "")) if steps else "PCA, the start"
        styles = {"psnr": ".2f", "ssim": ".4f", "vgg_hed": ".4f", "kl": ".2f"}
        cells = [over_seeds((float(row[column]) for row in rows), style) for column, style in styles.items()]
        lines.append(f"| {name} | {f'{beta:g}' if steps else '-'} | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {
    "ops": ops,
    "models": models,
    "heldout": heldout,
    "heldout_clips": heldout_clips,
    "examples": examples,
    "whole_models": whole_models,
    "training": training,
    "published": published,
    "caches": caches,
    "cache_samples": cache_samples,
    "peers": peers,
    "scale": scale,
    "packed": packed,
    "flop_claim": flop_claim,
    "speed": speed,
    "triton_kernels": triton_kernels,
    "cuda_kernels": cuda_kernels,
    "findings_law": findings_law,
    "findings_pairs": findings_pairs,
    "findings_longer": findings_longer,
    "findings_sizes": findings_sizes,
    "findings_losses": findings_losses,
}
DOCUMENTS = (
    ROOT / "README.md",
    *sorted((ROOT / "vitok" / "weights").glob("*/README.md")),
    *(ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "findings", "flop-claim", "kernels")),
)


def generated(text: str) -> str:
    """`text` with every generated block written anew."""

    def block(match: re.Match[str]) -> str:
        return f"<!-- generated: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- generated: (\w+) -->.*?<!-- end -->", block, text, flags=re.DOTALL)


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(generated(document.read_text()))
