"""What the number of samples costs a latent cache: the time of listing them and going on, and resident memory.

Pictures of one pixel and a model of one narrow block, on the CPU, so that little else counts. Each run is a process of
its own: python -m vitok.bench.cache_samples PICTURES CACHE WORKERS.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from vitok.bench.rows import Rows
from vitok.cache.build import build
from vitok.cache.listing import open_listing
from vitok.cache.manifest import Options
from vitok.cache.store import Store
from vitok.checkpoint import create_model

SAMPLES = 100_000
PART = 8
FOLDERS = 100
MODEL, SIZE, BATCH = "Tiw64d1h1-Tiw64d1h1/16", 16, 64
KEY = {"case": MODEL, "size": SIZE, "batch": BATCH, "dtype": "float32"}
FILL_PART, FILL, RESUME = "fill, one eighth", "fill", "list and resume"
PROVIDERS = (FILL_PART, FILL, RESUME)


def measure(rows: Rows, workers: int) -> None:
    """Fill a cache with an eighth of the samples and one with all of them, and start on the second again, which is
    finished."""
    added: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, count in (("part", SAMPLES // PART), ("all", SAMPLES)):
            write_pixels(folder / part, count)
        for provider, part in zip(PROVIDERS, ("part", "all", "all"), strict=True):
            arguments = [str(folder / part), str(folder / f"cache of {part}"), str(workers)]
            done = subprocess.run([sys.executable, "-m", __name__, *arguments], capture_output=True, text=True)
            found = {"refused": done.stderr.strip().splitlines()[-1]} if done.returncode else json.loads(done.stdout)
            added.append({**KEY, "provider": provider, "workers": workers, **found})
    rows.replace(KEY, added)


def write_pixels(folder: Path, count: int) -> None:
    """PNG files of one pixel in a hundred folders."""
    for number in range(FOLDERS):
        (folder / f"{number:02d}").mkdir(parents=True)
    pixel = folder / "00" / "000000.png"
    Image.new("RGB", (1, 1)).save(pixel)
    content = pixel.read_bytes()
    for number in range(1, count):
        (folder / f"{number % FOLDERS:02d}" / f"{number:06d}.png").write_bytes(content)


def run(pictures: str, cache: str, workers: int) -> dict[str, float]:
    """Seconds from listing to a finished cache, and the most that this process and its largest worker have held."""
    torch.manual_seed(0)
    model, options = create_model(MODEL).eval(), Options("safetensors", size=SIZE, batch=BATCH)
    begun = time.perf_counter()
    found = build(model, open_listing(pictures, 1), Store(cache), options, name=MODEL, workers=workers)
    seconds = time.perf_counter() - begun
    peaks = (_peak_kb(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    return {"pictures": found.samples, "seconds": seconds, "peak_mb": sum(peaks) / 1e3}


def _peak_kb() -> int:
    """Of this program alone: what getrusage says counts the process that started it too."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
