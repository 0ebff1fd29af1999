"""Pictures in tar files, as webdataset writes them, read where they lie."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from vitok.errors import InputError
from vitok.io.images import decode_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class Member(NamedTuple):
    """`size` bytes from `offset` on in shard number `shard`."""

    shard: int
    offset: int
    size: int


class ShardPictures:
    """Picture members of plain tar files below `root`, as a `vitok.data.sources.Source`.

    The headers are read once, when the source is opened. Nothing is extracted: a member is bytes at an offset, and its
    name only a name. Links, devices, sparse files and members that are no pictures by their suffix are left out; of a
    shard that is cut short, those that are whole are kept. InputError if there is none at all.
    """

    kind = "pictures"

    def __init__(self, root: Path, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.names: list[str] = []
        self.skipped: list[str] = []
        self._members: list[Member] = []
        for number, path in enumerate(paths):
            self._index(number, path, path.relative_to(root).as_posix())
        if not self._members:
            reason = self.skipped[0] if self.skipped else f"no member ends in {', '.join(SUFFIXES)}"
            raise InputError(f"the tar shards of {root} hold no pictures: {reason}")

    def _index(self, number: int, path: Path, shown: str) -> None:
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
                    if plain and member.name.lower().endswith(SUFFIXES):
                        name = "".join(c if c.isprintable() else "?" for c in member.name)
                        self.names.append(f"{shown}/{name}")
                        self._members.append(Member(number, start, member.size))
            with open(path, "rb") as file:  # tarfile takes the end of the file for the end of the archive
                file.seek(end + -end % tarfile.BLOCKSIZE)
                if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("it is cut short")
        except Exception as error:  # tarfile raises almost anything on damaged headers, RecursionError included
            reason = " ".join(str(error).split()) or type(error).__name__
            self.skipped.append(f"tar shard {path} cannot be read to its end: {reason}")

    def pick(self, index: int, place: float) -> range:
        return range(1)

    def read(self, index: int, frames: range) -> Iterator[Tensor]:
        member, name = self._members[index], self.names[index]
        path = self.paths[member.shard]
        try:
            with open(path, "rb") as shard:
                shard.seek(member.offset)
                data = shard.read(member.size)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
        if not data:
            raise InputError(f"{name} is empty (0 bytes)")
        yield decode_image(data, name).pixels
