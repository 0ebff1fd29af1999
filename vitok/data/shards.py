"""Pictures in tar files, as webdataset writes them, read where they lie."""

from __future__ import annotations

import json
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from vitok.data.names import Names
from vitok.errors import InputError
from vitok.io.files import fetch_ahead
from vitok.io.images import decode_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LABELS = (".cls", ".json")
"""Of the members beside a picture that say its class: a text, or `label` or `cls` of an object."""
LONGEST_LABEL = 1 << 20  # bytes of such a member


class Member(NamedTuple):
    """`size` bytes from `offset` on in shard number `shard`."""

    shard: int
    offset: int
    size: int


NOWHERE = Member(-1, 0, 0)


class Places:
    """Where very many members lie, in little memory."""

    def __init__(self) -> None:
        self._numbers = array("q")

    def append(self, member: Member) -> None:
        self._numbers.extend(member)

    def __getitem__(self, index: int) -> Member:
        return Member(*self._numbers[3 * index : 3 * index + 3])


class ShardPictures:
    """Picture members of plain tar files below `root`, as a `vitok.data.sources.Source`.

    The headers are read once, when the source is opened. Nothing is extracted: a member is bytes at an offset, and its
    name only a name. Links, devices, sparse files and members that are no pictures by their suffix are left out; of a
    shard that is cut short, those that are whole are kept. InputError if there is none at all.
    """

    kind = "pictures"

    def __init__(self, root: Path, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.names = Names()
        self.skipped: list[str] = []
        self._pictures, self._labels = Places(), {suffix: Places() for suffix in LABELS}
        for number, path in enumerate(paths):
            self._index(number, path, path.relative_to(root).as_posix())
        if not self.names:
            reason = self.skipped[0] if self.skipped else f"no member ends in {', '.join(SUFFIXES)}"
            raise InputError(f"the tar shards of {root} hold no pictures: {reason}")

    def _index(self, number: int, path: Path, shown: str) -> None:
        keys, beside = list[str](), dict[tuple[str, str], Member]()
        try:
            length, end = path.stat().st_size, 0
            with tarfile.open(path, "r:") as shard:
                for member in shard:
                    start = member.offset_data
                    if start <= end or member.size < 0:
                        raise tarfile.ReadError("its headers do not follow each other")
                    end = start + member.size
                    if end > length:
                        raise tarfile.ReadError("it is cut short")
                    plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
                    key, suffix = _key_and_suffix(member.name)
                    if plain and suffix in LABELS:
                        beside[key, suffix] = Member(number, start, member.size)
                    if plain and member.name.lower().endswith(SUFFIXES):
                        keys.append(key)
                        name = "".join(c if c.isprintable() else "?" for c in member.name)
                        self.names.append(f"{shown}/{name}")
                        self._pictures.append(Member(number, start, member.size))
            with open(path, "rb") as file:  # tarfile takes the end of the file for the end of the archive
                file.seek(end + -end % tarfile.BLOCKSIZE)
                if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("it is cut short")
        except Exception as error:  # tarfile raises almost anything on damaged headers, RecursionError included
            reason = " ".join(str(error).split()) or type(error).__name__
            self.skipped.append(f"tar shard {path} cannot be read to its end: {reason}")
        for suffix, labels in self._labels.items():
            for key in keys:
                labels.append(beside.get((key, suffix), NOWHERE))

    def pick(self, index: int, place: float) -> range:
        return range(1)

    def read(self, index: int, frames: range) -> Iterator[Tensor]:
        name = self.names[index]
        data = self._bytes(self._pictures[index])
        if not data:
            raise InputError(f"{name} is empty (0 bytes)")
        yield decode_image(data, name).pixels

    def ahead(self, index: int) -> None:
        """Have the system fetch a picture's bytes, without waiting for them."""
        member = self._pictures[index]
        fetch_ahead(self.paths[member.shard], member.offset, member.size)

    def label(self, index: int) -> str | int | None:
        """The class of a picture, by the member .cls or .json beside it; None where there is none.

        InputError where it is not a number or a line of text.
        """
        for suffix, labels in self._labels.items():
            member = labels[index]
            if member == NOWHERE:
                continue
            data = self._bytes(member) if member.size <= LONGEST_LABEL else b""
            try:
                found = _said(data, suffix)
            except (ValueError, RecursionError):
                raise InputError(f"the {suffix} member beside {self.names[index]} names no class") from None
            if found is not None:
                return found
        return None

    def _bytes(self, member: Member) -> bytes:
        path = self.paths[member.shard]
        try:
            with open(path, "rb") as shard:
                shard.seek(member.offset)
                return shard.read(member.size)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def _key_and_suffix(name: str) -> tuple[str, str]:
    """What the members of a sample share, the path up to the first dot of the file name, and the rest."""
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return folder + slash + stem, (dot + suffix).lower()


def _said(data: bytes, suffix: str) -> str | int | None:
    """The class in a member; ValueError where it cannot be one."""
    if suffix == ".json":
        about = json.loads(data)
        found = about.get("label", about.get("cls")) if isinstance(about, dict) else None
    else:
        found = data.decode().strip()
    if isinstance(found, str):
        if not found or len(found) > 200 or not found.isprintable():
            raise ValueError(found)
        return int(found) if found.isascii() and found.isdecimal() else found
    if found is not None and (isinstance(found, bool) or not isinstance(found, int)):
        raise ValueError(found)
    return found
