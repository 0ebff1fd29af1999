"""vitok info and vitok models: what is installed here, and what the models cost."""

from __future__ import annotations

import dataclasses
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import torch

import vitok
from vitok import _native, ops
from vitok.checkpoint import CONFIG, bundled, model_directory, read_config
from vitok.cli.common import show_table
from vitok.config import COMMON_NAMES, PRESETS, ViTokConfig
from vitok.count import count
from vitok.errors import InputError

OPTIONAL = ("triton", "av", "pyyaml", "flash-attn", "xformers", "diffusers")


def collect() -> dict[str, Any]:
    """Everything `vitok info` prints, ready for JSON."""
    library = _native.library()
    return {
        "versions": {
            "vitok": vitok.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _version(name) for name in OPTIONAL},
        },
        "native": {
            "available": library is not None,
            "reason": _native.reason(),
            "cpu_isa": library.cpu_isa() if library else None,
            "cpu_isas": library.cpu_isas() if library else [],
            "cuda_archs": library.cuda_archs() if library else [],
            "build": _native.build_facts(),
        },
        "cpu": {
            "machine": platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "gpus": [
            {
                "name": gpu.name,
                "capability": f"{gpu.major}.{gpu.minor}",
                "memory_gib": round(gpu.total_memory / 2**30, 1),
            }
            for gpu in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ],
        "ops": [dataclasses.asdict(choice) for choice in ops.choices()],
        "auto": [dataclasses.asdict(line) for line in ops.preferences()],
    }


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def info(as_json: bool) -> None:
    """Versions, how the library was built, the hardware, and which implementation of each op can be used."""
    facts = collect()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    native, cpu = facts["native"], facts["cpu"]
    click.echo("  ".join(f"{name} {version or '-'}" for name, version in facts["versions"].items()))
    click.echo(f"cpu: {cpu['machine']}, {cpu['capability']}, {cpu['threads']} threads")
    for gpu in facts["gpus"]:
        click.echo(f"gpu: {gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB")
    if not facts["gpus"]:
        click.echo("gpu: none that torch can use")
    if native["available"]:
        archs = (
            ", ".join(native["cuda_archs"]) or f"none ({native['build'].get('cuda_reason') or 'built without CUDA'})"
        )
        click.echo(
            f"native library: {native['cpu_isa']} of {', '.join(native['cpu_isas'])}; CUDA architectures {archs}"
        )
    else:
        click.echo(f"native library: not used: {native['reason']}")
    for name, value in native["build"].items():
        if value not in ("", []):
            click.echo(f"  {name}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
    rows = [(c["op"], c["implementation"], "yes" if c["usable"] else "no", c["reason"]) for c in facts["ops"]]
    show_table(
        "implementations",
        ("op", "implementation", "usable", "why not"),
        rows,
        text=range(4),
    )
    chosen = [a for a in facts["auto"] if a["device"] != "cuda" or facts["gpus"]]
    show_table(
        "auto takes the first that accepts the arguments",
        ("op", "device", "dtype", "order", "why"),
        [(a["op"], a["device"], a["dtype"], ", ".join(a["order"]), a["why"]) for a in chosen],
        text=range(5),
    )


@click.command()
@click.option(
    "--size", type=click.IntRange(1), default=256, show_default=True, help="Side of the square input, pixels."
)
@click.option("--frames", type=click.IntRange(1), default=1, show_default=True, help="Frames of the input.")
@click.option("--channels", type=click.IntRange(1), help="Latent channels of the random-weight models.  [default: 16]")
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    default="paper",
    show_default=True,
    help="Of the random-weight models.",
)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
@click.argument("names", nargs=-1)
def models(names: tuple[str, ...], size: int, frames: int, channels: int | None, preset: str, as_json: bool) -> None:
    """Parameters and operations of models at an input size.

    NAMES are bundled models, model directories and architectures such as S-B/4x8; by default all known ones.
    """
    rows = []
    for name in names or (*bundled(), *(n for n in COMMON_NAMES if _has_sizes(n, preset))):
        stored = "/" not in name or Path(name).is_dir()  # the names of architectures have a slash
        if stored:
            config = read_config(model_directory(name) / CONFIG)
        else:
            config = ViTokConfig.from_name(name, preset=preset, channels=channels)
        about = {"name": name, "weights": stored, "preset": config.preset, "channels": config.channels}
        rows.append({**about, **dataclasses.asdict(count(config, size=size, frames=frames))})
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    columns = (
        "model",
        "weights",
        "preset",
        "c",
        "encoder M",
        "decoder M",
        "total M",
        "tokens",
        "floats",
        "GMAC",
        "GFLOP",
    )
    cells = [
        (
            r["name"], "yes" if r["weights"] else "random", r["preset"], str(r["channels"]),
            f"{r['encoder_params'] / 1e6:.2f}", f"{r['decoder_params'] / 1e6:.2f}", f"{r['params'] / 1e6:.2f}",
            f"{r['tokens']:,}", f"{r['floats']:,}", f"{r['macs'] / 1e9:.2f}", f"{r['flops'] / 1e9:.2f}",
        )
        for r in rows
    ]  # fmt: skip
    show_table(f"models at {frames} x {size} x {size} (the paper's GFLOPs are GMAC)", columns, cells, text=(0, 1, 2))


def _has_sizes(name: str, preset: str) -> bool:
    try:
        ViTokConfig.from_name(name, preset=preset)
    except InputError:
        return False
    return True


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
