"""Finding input files, naming output files, and writing them whole or not at all."""

import errno
import os
import secrets
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vitok.errors import InputError

MAX_PIXELS = 100_000_000
"""Largest picture or video frame that is decoded unless the caller says otherwise: 100 megapixels, 300 MB as RGB."""

# fmt: off
KIND_BY_EXTENSION = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".png", ".apng", ".webp", ".avif", ".gif", ".tif", ".tiff", ".bmp",
                     ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".qoi"), "image"),
    **dict.fromkeys((".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".wmv",
                     ".flv", ".ogv", ".3gp", ".y4m"), "clip"),
    ".safetensors": "latents",
}
# fmt: on


@dataclass(frozen=True)
class Entry:
    """One input: a file of a known ``kind`` ("image", "clip" or "latents"), or the ``error`` that stands for it."""

    path: Path
    kind: str | None = None
    error: InputError | None = None


def check_readable(path: str | os.PathLike[str], wanted: str) -> Path:
    """The path of a file that exists, is a regular file, may be read and is not empty, or InputError.

    ``wanted`` ("a picture", "a clip") goes into the message for a folder.
    """
    path = Path(path)
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise InputError(f"{path} is a folder, not {wanted}")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for its other end
            raise InputError(f"{path} is not a regular file")
        with open(path, "rb") as file:
            if not file.read(1):
                raise InputError(f"{path} is empty (0 bytes)")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    return path


def fetch_ahead(path: str | os.PathLike[str], offset: int = 0, length: int = 0) -> None:
    """Ask the system to have `length` bytes of a file (0: all from `offset` on) in memory soon.

    It waits for nothing, and says nothing of a file that cannot be read.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait for its other end
        try:
            os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file so that its final name only ever stands for a complete file.

    Yields a hidden, empty temporary file in the destination's folder (made if missing) with the same suffix, so that
    encoders which go by the name choose the right format. When the block ends well the file is flushed to disk and
    renamed over ``path``; when it raises anything, KeyboardInterrupt included, the temporary file is removed and an
    existing ``path`` stays as it was. A symbolic link is written through.

    Raises InputError if the destination cannot be written, is a folder or a device, or the disk is full.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".vitok-{secrets.token_hex(8)}{target.suffix}")
    try:
        if target.exists() and not target.is_file():
            raise InputError(f"cannot write {path}: it is not a regular file")
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not tempfile.mkstemp: its mode 0600 would survive the rename, and the umask should decide.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = temporary.stat().st_mode & 0o777
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    try:
        yield temporary
        try:
            temporary.chmod(mode)  # some writers (safetensors) put a private file of their own in its place
            _flush(temporary)
            os.replace(temporary, target)
            flush_folder(target.parent)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # raised by whatever wrote in the block
            raise InputError(f"cannot write {path}: {error.strerror}") from error
        raise
    finally:
        with suppress(OSError):
            temporary.unlink()


def _flush(path: Path) -> None:
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Put the renames in a folder on the disk, where the file system can."""
    # Makes the rename itself durable; some systems and network file systems cannot open or sync a folder.
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def find_inputs(paths: Iterable[str | os.PathLike[str]], kinds: Sequence[str] = ("image", "clip")) -> list[Entry]:
    """Expand files and folders to a list of inputs, in the order given and each file once.

    A folder gives the files below it, sorted, whose extension belongs to ``kinds``; hidden files and folders are left
    out and links to folders are not followed. A file named explicitly is kept whatever its extension; if that says
    nothing, its first bytes decide. What cannot be used (missing, unreadable folder, folder without such files, file of
    another kind) becomes an entry with an error, so that the others are still done.
    """
    entries: dict[str, Entry] = {}
    for path in map(Path, paths):
        for entry in _expand(path, kinds) if os.path.isdir(path) else [_classify(path, kinds)]:
            entries.setdefault(os.path.abspath(entry.path), entry)
    return list(entries.values())


def _expand(folder: Path, kinds: Sequence[str]) -> list[Entry]:
    found: list[Entry] = []

    def failed(error: OSError) -> None:
        where = Path(error.filename or folder)
        found.append(Entry(where, error=InputError(f"folder {where} cannot be read: {error.strerror}")))

    for root, folders, files in os.walk(folder, onerror=failed):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(root, name)
            kind = _kind_by_extension(path)
            if kind in kinds and not name.startswith("."):
                found.append(Entry(path, kind))
    if not found:
        wanted = " or ".join({"image": "pictures", "clip": "clips", "latents": "latents files"}[kind] for kind in kinds)
        found.append(Entry(folder, error=InputError(f"folder {folder} holds no {wanted}")))
    return found


def _classify(path: Path, kinds: Sequence[str]) -> Entry:
    try:
        check_readable(path, "a file")
        kind = _kind_by_extension(path) or _kind_by_content(path)
    except InputError as error:
        return Entry(path, error=error)
    if kind in kinds:
        return Entry(path, kind)
    wanted = " or ".join({"image": "a picture", "clip": "a clip", "latents": "a latents file"}[kind] for kind in kinds)
    return Entry(path, error=InputError(f"{path} is not {wanted}"))


def _kind_by_extension(path: Path) -> str | None:
    return KIND_BY_EXTENSION.get(path.suffix.lower())


def _kind_by_content(path: Path) -> str | None:
    with open(path, "rb") as file:
        head = file.read(16)
    if head[4:8] == b"ftyp":  # ISO media: the brand tells AVIF and HEIF pictures from MP4 and MOV
        return "image" if head[8:12] in (b"avif", b"avis", b"heic", b"heix", b"mif1", b"jp2 ") else "clip"
    if head[:4] == b"RIFF":
        return {b"WEBP": "image", b"AVI ": "clip"}.get(head[8:12])
    pictures = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"qoif", b"\0\0\0\x0cjP  ")
    if head.startswith(pictures) or (head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace()):
        return "image"
    if head.startswith((b"\x1aE\xdf\xa3", b"\0\0\x01\xba", b"\0\0\x01\xb3", b"FLV\1", b"OggS", b"YUV4MPEG2")):
        return "clip"
    return "latents" if head[8:10] == b'{"' else None


def output_stems(paths: Sequence[Path]) -> list[str]:
    """A distinct file stem for each path, so that outputs in one folder do not overwrite each other.

    The path's own stem where that is enough; then with the extension ("cat_png"), then with as many parent folders as
    it takes ("a_cat_png"), at last with a number. Compared without case, for file systems that do the same. A stem may
    hold dots: append the suffix, rather than replace one.
    """
    choices = [_stem_choices(path) for path in paths]
    level = [0] * len(paths)
    while True:
        stems = [choice[step] for choice, step in zip(choices, level, strict=True)]
        count = Counter(stem.casefold() for stem in stems)
        longer = [i for i, stem in enumerate(stems) if count[stem.casefold()] > 1 and level[i] + 1 < len(choices[i])]
        if not longer:
            return _numbered(stems)
        for i in longer:
            level[i] += 1


def _stem_choices(path: Path) -> list[str]:
    named = path.stem + path.suffix.replace(".", "_")
    parents = Path(os.path.abspath(path)).parts[1:-1]
    return [path.stem, named, *("_".join([*parents[i:], named]) for i in reversed(range(len(parents))))]


def _numbered(stems: list[str]) -> list[str]:
    taken = {stem.casefold() for stem in stems}
    seen: set[str] = set()
    result = []
    for stem in stems:
        name, number = stem, 2
        while name.casefold() in seen or (name != stem and name.casefold() in taken):
            name, number = f"{stem}_{number}", number + 1
        seen.add(name.casefold())
        result.append(name)
    return result
