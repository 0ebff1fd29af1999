"""Filling a latent cache beside encoding alone: pictures in files against the same pictures in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vitok.bench.machine import FACTS
from vitok.bench.measure import reason
from vitok.bench.models import Workload
from vitok.bench.rows import Rows
from vitok.bench.timing import compare
from vitok.cache.build import Encoder, Shards
from vitok.cache.listing import open_listing
from vitok.cache.manifest import Options
from vitok.cache.store import Store

KEY = ("case", "size", "batch", "dtype")
COLUMNS = (
    *KEY, "provider", "workers", "pictures", "ms_p20", "ms_p50", "ms_p95", "samples", "images_per_s",
    "percent_of_encode", "seconds", "peak_mb", "refused", *FACTS,
)  # fmt: skip
ENCODE, CACHE, ONE = PROVIDERS = ("encode alone", "cache", "cache, one process")
SHARDS = 4  # that the pictures make
QUALITY = 90  # of the JPEG files


class Caching:
    """The rows of a model: `pictures` JPEG files of `size` pixels a side into a safetensors cache, decoded by `workers`
    processes and by none besides this one, beside the loop that encodes the same pixels batch by batch from memory.

    A run of the cache begins with starting the workers and ends when all is on the disk. Making the model fast, which
    is done once however many pictures there are, is in neither. Milliseconds are those of a picture.
    """

    def __init__(
        self, name: str, size: int, batch: int, pictures: int, workers: int, device: torch.device, dtype: torch.dtype,
        seconds: float, photos: Path | None,
    ) -> None:  # fmt: skip
        self.name, self.size, self.batch, self.pictures, self.workers = name, size, batch, pictures, workers
        self.device, self.dtype, self.seconds, self.photos = device, str(dtype).removeprefix("torch."), seconds, photos

    @property
    def key(self) -> dict[str, object]:
        return {"case": self.name, "size": self.size, "batch": self.batch, "dtype": self.dtype}

    def measure(self, rows: Rows) -> None:
        options = Options("safetensors", self.size, self.batch, -(-self.pictures // SHARDS), arithmetic=self.dtype)
        encoder = Encoder(Workload(self.name, self.size, 1, self.device).models[torch.float32], options)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_pictures(folder / "pictures", self.size, self.pictures, self.photos)
            processes = {CACHE: self.workers, ONE: 0}
            fills = {provider: [self._fill(encoder, folder, options, n)] for provider, n in processes.items()}
            calls = {ENCODE: [self._encode_alone(encoder, folder / "pictures")], **fills}
            timings, failed = compare(calls, self.device, 2 * self.seconds, graph=False)
        added: list[dict[str, object]] = []
        for provider, timing in timings.items():
            times = {f"ms_{part}": getattr(timing, part) / self.pictures for part in ("p20", "p50", "p95")}
            row = {**self.key, "provider": provider, "pictures": self.pictures, **times, "samples": timing.samples}
            row["images_per_s"] = 1e3 * self.pictures / timing.p50
            if provider in processes:
                row["workers"] = processes[provider]
            if ENCODE in timings:
                row["percent_of_encode"] = 100 * timings[ENCODE].p50 / timing.p50
            added.append(row)
        added += [{**self.key, "provider": provider, "refused": reason(error)} for provider, error in failed.items()]
        rows.replace(self.key, added)

    def _encode_alone(self, encoder: Encoder, pictures: Path) -> Callable[[], object]:
        listing = open_listing(pictures, 1)
        pixels = torch.stack([listing.read(i, self.size)[0] for i in range(len(listing))])
        batches = pixels.to(self.device).split(self.batch)

        @torch.inference_mode()
        def run() -> None:
            for each in batches:
                encoder.model.encode(each, layout="channels_last").mode()

        return run

    def _fill(self, encoder: Encoder, folder: Path, options: Options, workers: int) -> Callable[[], object]:
        listing = open_listing(folder / "pictures", 1)

        def run() -> None:
            with tempfile.TemporaryDirectory(dir=folder) as out:
                shards = Shards(listing, options, Store(out))
                shards.encode(encoder, range(-(-len(listing) // options.shard)), workers)

        return run


def write_pictures(folder: Path, size: int, count: int, photos: Path | None) -> None:
    """JPEG files of `size` x `size`: crops of the photographs in `photos`, of noise in their place."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (2 * size, 2 * size, 3), dtype=np.uint8))]
    originals = [Image.open(path).convert("RGB") for path in sorted(photos.glob("*.jpg"))] if photos else noise
    for number, picture in enumerate(islice(cycle(originals), count)):
        side = min(size, *picture.size)
        left, top = (int(rng.integers(0, length - side + 1)) for length in picture.size)
        crop = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
        crop.save(folder / f"{number:05d}.jpg", quality=QUALITY)
