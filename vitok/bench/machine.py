"""Where and with what a run measures. More of a GPU machine: python -m vitok.bench.machine FILE.json"""

from __future__ import annotations

import datetime
import json
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

import vitok
from vitok import _native
from vitok.io.files import atomic_path

FACTS = ("device", "cpu_isa", "threads", "torch", "triton", "diffusers", "python", "vitok", "commit", "date")


def facts(device: torch.device) -> dict[str, object]:
    """The columns that every row has. The name of the machine is nobody's business."""
    library = _native.library()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cpu_isa": library.cpu_isa() if library else "reference path",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "diffusers": version("diffusers"),
        "python": platform.python_version(),
        "vitok": vitok.__version__,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def file_name(kind: str, device: torch.device) -> str:
    """Of the rows of one kind on a device: "ops-cuda.csv", "model-cpu-avx512.csv"."""
    library = _native.library()
    return f"{kind}-{device.type}{f'-{library.cpu_isa()}' if library and device.type == 'cpu' else ''}.csv"


def version(package: str) -> str:
    """Of an installed package, or ""."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """Of the checkout this package is in, else of what its library was built from."""
    root = Path(vitok.__file__).resolve().parents[1]
    if (root / ".git").exists() and shutil.which("git"):
        done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
    return str(_native.build_facts().get("commit", "unknown"))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpu_facts() -> dict[str, object]:
    """What a GPU machine is and how the package was built there."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv"]
    return {
        **facts(torch.device("cuda")),
        "capability": torch.cuda.get_device_capability(),
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        "nvidia_smi": subprocess.run(query, capture_output=True, text=True).stdout.splitlines(),
        "cuda": torch.version.cuda,
        "native": _native.reason() or "there",
        "build": _native.build_facts(),
    }


if __name__ == "__main__":
    text = json.dumps(_gpu_facts(), indent=1)
    with atomic_path(sys.argv[1]) as target:
        target.write_text(text)
    print(text)
