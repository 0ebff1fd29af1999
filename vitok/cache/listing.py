"""What a cache is made of: the names and classes of a data set's samples in order, and how one is read.

Listing opens no sample: a folder is walked, of tar shards the headers are read.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vitok.data.names import Names
from vitok.data.shards import ShardPictures
from vitok.errors import InputError
from vitok.io.files import KIND_BY_EXTENSION, fetch_ahead
from vitok.io.images import decode_image, read_image, resize_and_crop
from vitok.io.video import ClipReader, require_pyav

HUB = "hf:"
MOST_CLASSES = 2**31
CHUNK = 8  # frames of a video held at their own size
FIRST_BYTES = 1 << 24  # of a video, in which its first frames mostly lie


class Reader(Protocol):
    """Samples by number; may be pickled, and read by several processes at once."""

    def __call__(self, index: int, size: int) -> tuple[Tensor, tuple[int, ...]]:
        """Pixels uint8 [size, size, 3] or [T, size, size, 3], short side to `size` and centre crop, and the original's
        (H, W) or (T, H, W). InputError where it cannot be read."""
        ...

    def ahead(self, index: int) -> None:
        """Have the system fetch what will be read, where it can, without waiting for it."""
        ...


@dataclass(frozen=True)
class Listing:
    """The samples of a data set, in an order that follows from the data alone.

    names    paths in the data set, / between folders
    labels   class numbers, -1 where there is none
    classes  names of the classes, none where the data set has only numbers
    clips    whether samples are clips
    read     see `Reader`
    skipped  a sentence for each thing that was left out
    """

    names: Sequence[str]
    labels: Sequence[int]
    classes: list[str]
    clips: bool
    read: Reader
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def hash(self) -> str:
        """16 hex digits that change with any name or label."""
        return listing_hash(self.names, self.labels)


def listing_hash(names: Sequence[str], labels: Sequence[int]) -> str:
    digest = hashlib.sha256()
    for name, label in zip(names, labels, strict=True):
        digest.update(f"{label} {name}\0".encode("utf-8", "backslashreplace"))
    return digest.hexdigest()[:16]


def open_listing(data: str | os.PathLike[str], frames: int) -> Listing:
    """The samples of a folder of pictures, of tar shards, of a folder of videos or of a Hugging Face data set.

    Args:
        data: a folder, a file, a pattern such as "shards/train-*.tar", "hf:NAME" or "hf:NAME:SPLIT", or a folder that
            `Dataset.save_to_disk` wrote. Where every picture or video lies in a subfolder, the first folders are the
            classes. Hidden files are left out.
        frames: of a video its first so many frames are its sample.

    Raises InputError where there are no samples, or samples of several kinds.
    """
    if str(data).startswith(HUB):
        return _hub(str(data))
    root = Path(data)
    if any((root / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _saved(root)
    problems: list[str] = []
    if os.path.isdir(root):
        found, problems = _walk(root)
    else:
        matches = [str(data)] if os.path.isfile(root) else sorted(filter(os.path.isfile, glob(str(data))))
        if not matches:
            raise InputError(f"data set {data} does not exist")
        root, found = Path(os.path.commonpath([os.path.dirname(match) for match in matches])), {}
        for match in matches:
            found.setdefault(_kind(match), Names()).append(os.path.relpath(match, root).replace(os.sep, "/"))
    kinds = {"image": "pictures", "clip": "videos", "tar": "tar shards"}
    there = [kind for kind in kinds if found.get(kind)]
    if len(there) != 1:
        holds = " and ".join(kinds[kind] for kind in there) or "no pictures, videos or tar shards"
        raise InputError(f"data set {data} holds {holds}; it must hold files of one of these kinds")
    if there == ["tar"]:
        return _shards(root, found["tar"])
    names = found[there[0]]
    labels, classes = _folders(names)
    if there == ["image"]:
        return Listing(names, labels, classes, False, Files(root, names), problems)
    require_pyav()
    return Listing(names, labels, classes, True, Videos(root, names, frames), problems)


def _walk(root: Path) -> tuple[dict[str, Names], list[str]]:
    """Names below `root` by kind, sorted, and what could not be looked into."""
    found: dict[str, Names] = {}
    problems: list[str] = []

    def failed(error: OSError) -> None:
        problems.append(f"folder {error.filename} cannot be read: {error.strerror}")

    skip = len(os.path.join(root, ""))
    for folder, folders, files in os.walk(root, onerror=failed):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.join(folder, "")[skip:].replace(os.sep, "/")
        for name in sorted(files):
            kind = None if name.startswith(".") else _kind(name)
            if kind is not None:
                found.setdefault(kind, Names()).append(inside + name)
    return found, problems


def _kind(name: str) -> str:
    suffix = os.path.splitext(name)[1].lower()
    return "tar" if suffix == ".tar" else KIND_BY_EXTENSION.get(suffix, "")


def _unlabelled(count: int) -> Sequence[int]:
    return array("q", [-1]) * count


def _folders(names: Sequence[str]) -> tuple[Sequence[int], list[str]]:
    """Labels and classes by first folder, where all names have one."""
    if not all("/" in name for name in names):
        return _unlabelled(len(names)), []
    known = sorted({name.split("/", 1)[0] for name in names})
    return _numbered((name.split("/", 1)[0] for name in names), known), known


def _numbered(classes: Iterable[str | None], known: Sequence[str]) -> Sequence[int]:
    """The numbers of classes among those `known`, -1 of None."""
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(known)}
    return array("q", (numbers.get(name, -1) for name in classes))


def _labelled(found: Sequence[str | int | None]) -> tuple[Sequence[int], list[str]]:
    """Labels and classes of what a data set says of its samples: numbers as they are, else names sorted."""
    if any(isinstance(each, str) for each in found):
        texts = [None if each is None else str(each) for each in found]
        known = sorted({each for each in texts if each is not None})
        return _numbered(texts, known), known
    for label in found:
        if label is not None and not -1 <= int(label) < MOST_CLASSES:
            raise InputError(f"a class must be a number from 0 to {MOST_CLASSES - 1}, got {label}")
    return array("q", (-1 if each is None else int(each) for each in found)), []


@dataclass(frozen=True)
class Files:
    """Picture files."""

    root: Path
    names: Sequence[str]

    def __call__(self, index: int, size: int) -> tuple[Tensor, tuple[int, ...]]:
        path = self.root / self.names[index]
        try:
            return _cropped(read_image(path).pixels, size)
        except InputError as error:
            raise InputError(_by_name(error, path, self.names[index])) from None

    def ahead(self, index: int) -> None:
        fetch_ahead(self.root / self.names[index])


@dataclass(frozen=True)
class Videos:
    """The first frames of video files."""

    root: Path
    names: Sequence[str]
    frames: int

    def __call__(self, index: int, size: int) -> tuple[Tensor, tuple[int, ...]]:
        path, parts, count = self.root / self.names[index], list[Tensor](), 0
        try:
            with ClipReader(path) as reader:
                for chunk in reader.chunks(min(self.frames, CHUNK)):
                    parts.append(resize_and_crop(chunk, size))
                    count += len(chunk)
                    if count >= self.frames:
                        return torch.cat(parts)[: self.frames], (self.frames, reader.height, reader.width)
        except InputError as error:
            raise InputError(_by_name(error, path, self.names[index])) from None
        raise InputError(f"{self.names[index]} has {count} frames, fewer than {self.frames}")

    def ahead(self, index: int) -> None:
        fetch_ahead(self.root / self.names[index], length=FIRST_BYTES)


@dataclass(frozen=True)
class Members:
    """Pictures in tar shards."""

    source: ShardPictures

    def __call__(self, index: int, size: int) -> tuple[Tensor, tuple[int, ...]]:
        return _cropped(next(self.source.read(index, range(1))), size)

    def ahead(self, index: int) -> None:
        self.source.ahead(index)


@dataclass(frozen=True)
class Rows:
    """Rows of a Hugging Face data set."""

    rows: Any
    column: str
    names: Sequence[str]

    def __call__(self, index: int, size: int) -> tuple[Tensor, tuple[int, ...]]:
        name, found = self.names[index], self.rows[index][self.column] or {}
        if data := found.get("bytes"):
            return _cropped(decode_image(data, name).pixels, size)
        if path := found.get("path"):
            try:
                return _cropped(read_image(path).pixels, size)
            except InputError as error:
                raise InputError(_by_name(error, path, name)) from None
        raise InputError(f"{name} holds no picture")

    def ahead(self, index: int) -> None:
        """Nothing: the rows are mapped, and the library says nothing of where."""


def _shards(root: Path, names: Sequence[str]) -> Listing:
    source = ShardPictures(root, [root / name for name in names])
    labels, classes = _labelled([source.label(index) for index in range(len(source.names))])
    return Listing(source.names, labels, classes, False, Members(source), source.skipped)


def _by_name(error: InputError, path: object, name: str) -> str:
    """The same sentence wherever the data set lies: records of it are to be the same."""
    return str(error).replace(str(path), name)


def _cropped(pixels: Tensor, size: int) -> tuple[Tensor, tuple[int, ...]]:
    return resize_and_crop(pixels, size), tuple(pixels.shape[:2])


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise InputError(
            "Hugging Face data sets need the package datasets, which is not installed: pip install vitok[datasets]"
        ) from None
    return datasets


def _saved(root: Path) -> Listing:
    datasets = _datasets()
    try:
        rows = datasets.load_from_disk(str(root))
    except Exception as error:
        raise InputError(f"data set {root} cannot be opened: {_line(error)}") from error
    if isinstance(rows, dict):
        if len(rows) != 1:
            raise InputError(f"data set {root} has the splits {', '.join(rows)}; give the folder of one of them")
        rows = next(iter(rows.values()))
    return _rows(str(root), rows)


def _hub(data: str) -> Listing:
    datasets = _datasets()
    name, _, split = data.removeprefix(HUB).partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        raise InputError(
            f"data set {data} cannot be opened: {_line(error)}; without a network give a folder written by "
            "its save_to_disk"
        ) from error
    return _rows(data, rows)


def _rows(data: str, rows: Any) -> Listing:
    datasets = _datasets()
    columns = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise InputError(f"data set {data} has no column of pictures; it has {', '.join(rows.features)}")
    if len(rows) == 0:
        raise InputError(f"data set {data} has no rows")
    names = Names(f"{number:08d}" for number in range(len(rows)))
    labels, classes = _unlabelled(len(rows)), list[str]()
    if "label" in rows.features:
        found = [None if label in (None, -1) else label for label in rows["label"]]
        if not all(label is None or (isinstance(label, (int, str)) and label is not True) for label in found):
            raise InputError(f"data set {data}: column label must hold numbers or texts")
        labels, classes = _labelled(found)
        classes = list(getattr(rows.features["label"], "names", None) or classes)
    read = Rows(
        rows.cast_column(columns[0], datasets.Image(decode=False)).select_columns(columns[:1]), columns[0], names
    )
    return Listing(names, labels, classes, False, read)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
