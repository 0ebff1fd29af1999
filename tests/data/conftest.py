"""Films of plain noise with cuts, and tar shards."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture
def film() -> Callable[..., Path]:
    """`film(path, *lengths)`: shots of so many frames, each a still of its own that gets brighter by 2 every frame."""
    video = pytest.importorskip("vitok.io.video")
    pytest.importorskip("av")

    def make(path: Path, *lengths: int, seed: int = 0) -> Path:
        rng = np.random.default_rng(seed)
        with video.ClipWriter(path, 25) as writer:
            for shot, length in enumerate(lengths):
                coarse = rng.integers(0, 60, (3, 4, 3)) + 90 * (shot % 2)
                still = coarse.repeat(8, 0).repeat(8, 1)
                writer.write(torch.from_numpy(np.stack([still + 2 * i for i in range(length)]).astype(np.uint8)))
        return path

    return make


@pytest.fixture
def shard() -> Callable[..., Path]:
    """`shard(path, {name: content})`: a tar file; content is bytes, a colour for a picture of it, or a TarInfo."""

    def make(path: Path, members: dict[str, bytes | tuple[int, int, int] | tarfile.TarInfo]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for name, content in members.items():
                if isinstance(content, tarfile.TarInfo):
                    tar.addfile(content)
                    continue
                if isinstance(content, tuple):
                    buffer = io.BytesIO()
                    Image.new("RGB", (20, 24), content).save(buffer, "PNG")
                    content = buffer.getvalue()
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return path

    return make
