"""What training data is: a list of pictures or of clips with random access, recognised by what stands at a path."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Protocol

from torch import Tensor

from vitok.data.clips import Clips
from vitok.data.pictures import Pictures
from vitok.data.shards import ShardPictures
from vitok.errors import InputError
from vitok.io.files import find_inputs


class Source(Protocol):
    """Samples by number. Nothing is decoded before it is read; reading is a function of its arguments alone."""

    kind: str
    """"pictures" or "clips"."""
    skipped: list[str]
    """A sentence for each thing left out when the source was opened."""

    @property
    def names(self) -> Sequence[str]:
        """Of the samples: path below the source, with / between folders."""
        ...

    def pick(self, index: int, place: float) -> range:
        """The frames of sample `index` at `place` in [0, 1); range(1) of a picture. InputError where there are none."""
        ...

    def read(self, index: int, frames: range) -> Iterator[Tensor]:
        """Those frames, each uint8 [H, W, 3]. InputError where they cannot be read."""
        ...


def open_source(path: str | os.PathLike[str], frames: int) -> Source:
    """The pictures, the clips (of `frames` frames) or the pictures in tar shards at `path`.

    A folder is searched recursively, without hidden files; a file stands for itself; a pattern such as
    "shards/train-*.tar" for all the files that match. InputError if nothing is found, or things of several kinds.
    """
    paths = [Path(path)]
    if not os.path.exists(path) and any(c in str(path) for c in "*?["):
        paths = sorted(map(Path, glob(str(path))))
        if not paths:
            raise InputError(f"data {path}: no file matches")
    shards = [shard for each in paths for shard in _shards(each)]
    others = [each for each in paths if os.path.isdir(each) or not _shards(each)]
    entries = find_inputs(others, kinds=("image", "clip"))
    root = paths[0] if len(paths) == 1 and os.path.isdir(path) else paths[0].parent
    of_kind = {kind: [entry.path for entry in entries if entry.kind == kind] for kind in ("image", "clip")}
    found = [
        text
        for text, files in (("pictures", of_kind["image"]), ("videos", of_kind["clip"]), ("tar shards", shards))
        if files
    ]
    problems = [str(entry.error) for entry in entries if entry.error]
    if not found:
        raise InputError(f"data {path} holds no readable picture, clip or tar shard: {problems[0]}")
    if len(found) > 1:
        raise InputError(
            f"data {path} holds {' and '.join(found)}: list each kind as a part of its own, a folder or a pattern, as "
            "in data: [{path: photos}, {path: films/*.mp4}]"
        )
    if shards:
        return ShardPictures(root, shards)  # that the folder holds no pictures besides is no problem
    if of_kind["image"]:
        return Pictures(root, of_kind["image"], problems)
    return Clips(root, of_kind["clip"], frames, problems)


def _shards(path: Path) -> list[Path]:
    if os.path.isfile(path):  # unlike Path.is_file it answers for any name
        return [path] if path.suffix == ".tar" else []
    found = []
    for root, folders, files in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(root, name) for name in sorted(files) if name.endswith(".tar") and not name.startswith(".")]
    return found
