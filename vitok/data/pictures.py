"""A list of picture files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from vitok.io.images import read_image


class Pictures:
    """Picture files below `root`, as a `vitok.data.sources.Source`."""

    kind = "pictures"

    def __init__(self, root: Path, paths: Sequence[Path], skipped: list[str]) -> None:
        self.paths, self.skipped = paths, skipped
        self.names = [path.relative_to(root).as_posix() for path in paths]

    def pick(self, index: int, place: float) -> range:
        return range(1)

    def read(self, index: int, frames: range) -> Iterator[Tensor]:
        yield read_image(self.paths[index]).pixels
