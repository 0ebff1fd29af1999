"""Pictures and clips alike: a picture is a clip of one frame that has no frame rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from torch import Tensor

from vitok.io import ClipReader, ClipWriter, read_image, resize_and_crop, write_image
from vitok.io.files import Entry


@dataclass(frozen=True)
class Source:
    """An input opened for reading.

    height, width   of its frames as `chunks` gives them, pixels
    frames          how many the file declares, None if it does not say
    fps             frames a second, None for a picture
    note            what reading changed, "" if nothing
    chunks          chunks(n) gives uint8 [t, H, W, 3] with t = n and a last one that may be shorter
    """

    height: int
    width: int
    frames: int | None
    fps: Fraction | None
    note: str
    chunks: Callable[[int], Iterable[Tensor]]


@contextmanager
def open_source(entry: Entry, size: int | None) -> Iterator[Source]:
    """Open a picture or clip, resized and cropped to `size` x `size` unless that is None."""
    if entry.kind == "clip":
        with ClipReader(entry.path) as reader:
            yield _resized(Source(reader.height, reader.width, reader.frames, reader.fps, "", reader.chunks), size)
    else:
        read = read_image(entry.path)
        height, width = read.pixels.shape[:2]
        yield _resized(Source(height, width, 1, None, read.note, lambda _: [read.pixels[None]]), size)


def _resized(source: Source, size: int | None) -> Source:
    if size is None:
        return source
    chunks = lambda frames: (resize_and_crop(chunk, size) for chunk in source.chunks(frames))  # noqa: E731
    return Source(size, size, source.frames, source.fps, source.note, chunks)


def target_path(out: Path, stem: str, clip: bool) -> Path:
    return out / f"{stem}{'.mp4' if clip else '.png'}"


@contextmanager
def open_target(path: Path, fps: Fraction | None) -> Iterator[Callable[[Tensor], None]]:
    """Yields write(frames), uint8 [t, H, W, 3], to a PNG where `fps` is None and an MP4 otherwise."""
    if fps is None:
        yield lambda frames: write_image(path, frames[0])
    else:
        with ClipWriter(path, fps) as writer:
            yield writer.write
