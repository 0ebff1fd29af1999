"""The folder of a cache: files appear there whole, with their checksums known, and one process at a time writes."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from vitok.cache.manifest import (
    MANIFEST,
    RECORDS,
    SUMMARY,
    CacheSummary,
    File,
    Manifest,
    Record,
    Statistics,
    record_path,
)
from vitok.errors import InputError
from vitok.io.files import flush_folder

STAGING = ".partial"
"""The folder in which files are written before they get their names; gone when a run has ended."""
AT_ONCE = 8  # files flushed together
OWN = (MANIFEST, SUMMARY, RECORDS, STAGING)


class Store:
    """A cache at `root`."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    # --- reading

    def manifest(self) -> Manifest | None:
        """None where there is none."""
        path = self.root / MANIFEST
        try:
            return Manifest.from_bytes(path.read_bytes(), path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None

    def opened(self) -> Manifest:
        """The manifest; InputError where there is none."""
        manifest = self.manifest()
        if manifest is None:
            raise InputError(f"{self.root} is no latent cache: it has no {MANIFEST}")
        return manifest

    def record(self, shard: int) -> Record | None:
        """None of a shard that is not finished, or whose record is damaged."""
        try:
            return Record.from_bytes((self.root / record_path(shard)).read_bytes())
        except (OSError, ValueError):
            return None

    def records(self, manifest: Manifest) -> Iterator[Record]:
        """Of the shards that are finished."""
        return (record for record in map(self.record, range(manifest.shards)) if record)

    def summary(self) -> CacheSummary | None:
        """None of a cache that is not finished."""
        try:
            return CacheSummary.from_bytes((self.root / SUMMARY).read_bytes())
        except (OSError, ValueError):
            return None

    def stands(self, file: File) -> bool:
        """Whether a file is there, with the length it was written with."""
        try:
            return (self.root / file.path).stat().st_size == file.bytes
        except OSError:
            return False

    # --- writing

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the one process that writes; InputError where there is another. The folder is made if missing."""
        import fcntl

        with self._failures(""):
            self.root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another process is writing the cache {self.root}") from None
            except OSError as error:
                raise InputError(f"the cache {self.root} cannot be locked: {error.strerror}") from None
            _held.add(descriptor)
            yield
        finally:
            with suppress(OSError):
                (self.root / STAGING).rmdir()
            _held.discard(descriptor)
            os.close(descriptor)

    def begin(self, manifest: Manifest) -> list[int]:
        """Take up a cache, or a new one: the shards that are still to be made.

        InputError if the folder holds anything else, which stays as it is.
        """
        there = self.manifest()
        if there is None:
            if other := min((name for name in os.listdir(self.root) if not name.startswith(".")), default=""):
                raise InputError(
                    f"{self.root} holds other files, such as {other}, and no cache; choose an empty folder"
                )
            self.clean()
            self.write([(MANIFEST, manifest.to_bytes())])
            return list(range(manifest.shards))
        if difference := there.difference(manifest):
            raise InputError(f"{self.root} holds a cache made {difference}; choose another folder or remove it")
        self.clean()
        missing = [shard for shard in range(manifest.shards) if not self._finished(shard)]
        with self._failures(""):  # what stands of them would say that they are finished
            for path in [*map(record_path, missing), *([SUMMARY] if missing else [])]:
                (self.root / path).unlink(missing_ok=True)
        return missing

    def _finished(self, shard: int) -> bool:
        record = self.record(shard)
        return record is not None and all(map(self.stands, record.files))

    def write(self, files: Iterable[tuple[str, bytes]]) -> list[File]:
        """Put files onto the disk, all of them before any gets its name. InputError for a path that is not inside."""
        staging = self.root / STAGING / secrets.token_hex(8)
        try:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                staged = list(pool.map(lambda file: self._stage(staging, *file), files))
            if len({file.path for _, file in staged}) < len(staged):
                raise InputError(f"two samples give one file of the cache {self.root}")
            folders: set[Path] = set()
            for temporary, file in staged:
                target = self.root / file.path
                with self._failures(file.path):
                    if target.parent not in folders:
                        self._check_inside(target.parent, file.path)
                        target.parent.mkdir(parents=True, exist_ok=True)
                        folders.add(target.parent)
                    os.replace(temporary, target)
            for folder in {above for each in folders for above in self._up_to_root(each)}:
                flush_folder(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return [file for _, file in staged]

    def write_shard(self, record: Record) -> None:
        self.write([(record_path(record.shard), record.to_bytes())])

    def seal(self, manifest: Manifest, statistics: Statistics, files: Iterable[tuple[str, bytes]]) -> None:
        """Write the files that stand once in a cache, and after them what says that it is whole."""
        written = self.write(files)
        own = [self._file(path) for path in (MANIFEST, *map(record_path, range(manifest.shards)))]
        self.write([(SUMMARY, CacheSummary(statistics, [*own, *written]).to_bytes())])

    def _file(self, path: str) -> File:
        content = (self.root / path).read_bytes()
        return File(path, len(content), hashlib.sha256(content).hexdigest())

    def clean(self) -> None:
        """Remove what a kill has left."""
        with self._failures(STAGING), suppress(FileNotFoundError):
            shutil.rmtree(self.root / STAGING)

    @contextmanager
    def working(self, rank: int) -> Iterator[Callable[[], None]]:
        """What a rank calls to show the others that it is at work, until the context ends."""
        path = self.root / STAGING / f"rank-{rank}"

        def show() -> None:
            with suppress(OSError):  # a full disk is for those to tell who write what matters
                path.parent.mkdir(exist_ok=True)
                path.touch()

        try:
            yield show
        finally:
            with suppress(OSError):
                path.unlink()

    def at_work(self) -> dict[str, int]:
        """Names of the ranks that are at work, and a number of each that changes as it goes on."""
        found = {}
        for path in (self.root / STAGING).glob("rank-*"):
            with suppress(OSError):
                found[path.name] = path.stat().st_mtime_ns
        return found

    def _stage(self, staging: Path, path: str, content: bytes) -> tuple[Path, File]:
        check_path(path)
        temporary = staging / secrets.token_hex(8)
        with self._failures(path):
            staging.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        return temporary, File(path, len(content), hashlib.sha256(content).hexdigest())

    def _check_inside(self, folder: Path, path: str) -> None:
        """A link in the cache may lead out of it."""
        root = os.path.realpath(self.root)
        if os.path.commonpath([root, os.path.realpath(folder)]) != root:
            raise InputError(f"cannot write {path!r}: a link leads out of the cache {self.root}")

    def _up_to_root(self, folder: Path) -> Iterator[Path]:
        while folder != self.root:
            yield folder
            folder = folder.parent
        yield self.root

    @contextmanager
    def _failures(self, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = f"{self.root / path}" if path else f"the cache {self.root}"
            raise InputError(
                f"cannot write {what}: {error.strerror or error}; what is finished stays, and the same command goes on"
            ) from error


def check_path(path: str, own: Sequence[str] = ()) -> None:
    """InputError unless `path` names a file below the folder it is taken from, and none of the `own` ones there."""
    parts = path.split("/")
    if (
        "" in parts or "." in parts or ".." in parts or "\\" in path or "\0" in path or parts[0] in own
        or PurePosixPath(path).is_absolute() or not path
    ):  # fmt: skip
        raise InputError(f"{path!r} cannot be the name of a file in a cache: it leads out of it or is taken")


_held: set[int] = set()


def _let_go() -> None:
    """In a child the copy of a lock would outlive the process that holds it."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
