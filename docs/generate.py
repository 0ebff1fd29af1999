"""Rewrite the generated tables of README.md and docs: python docs/generate.py

A table stands between `<!-- generated: NAME -->` and `<!-- end -->` and comes from the code or from a result file.
"""

import csv
import json
import re
import runpy
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

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


def heldout() -> str:
    """Quality of `demo` beside PCA, from `vitok eval --json`."""
    result = json.loads((RESULTS / "demo-heldout.json").read_text())
    lines = [f"| {result['pictures']} held-out photographs, 256 x 256 | PSNR dB | SSIM |", "|---|---|---|"]
    for name, mean in result["means"].items():
        label = "PCA, 16 x 16 patches, 64 channels" if name == "PCA" else f"`{name}`"
        lines.append(f"| {label} | {mean['psnr']:.2f} | {mean['ssim']:.4f} |")
    return "\n".join(lines)


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


def benchmarks() -> str:
    """Timings, from `make bench`."""
    table: Callable[[Path], str] = runpy.run_path(str(ROOT / "benchmarks" / "report.py"))["table"]
    return table(RESULTS / "cpu-avx512.json")


def ops() -> str:
    """Every row of `make bench-ops`, the losing ones too."""
    lines = []
    for path in sorted(RESULTS.glob("ops-*.csv")):
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
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
        first = rows[0]
        lines += [
            "",
            f"{first['date']}, {first['device']}, {first['threads']} threads, {first['cpu_isa']}, "
            f"torch {first['torch']}, commit {first['commit'][:12]}",
            "",
        ]
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


TABLES = {
    "ops": ops,
    "models": models,
    "heldout": heldout,
    "examples": examples,
    "benchmarks": benchmarks,
    "triton_kernels": triton_kernels,
    "cuda_kernels": cuda_kernels,
}
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "kernels.md")


def generated(text: str) -> str:
    """`text` with every generated block written anew."""

    def block(match: re.Match[str]) -> str:
        return f"<!-- generated: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- generated: (\w+) -->.*?<!-- end -->", block, text, flags=re.DOTALL)


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(generated(document.read_text()))
