"""Clips in and out, a few frames at a time. Needs PyAV, the extra ``video``."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from fractions import Fraction
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch

from vitok.errors import InputError
from vitok.io.files import MAX_PIXELS, atomic_path, check_readable
from vitok.io.images import as_array

WRITE_SUFFIXES = (".mp4", ".mov", ".mkv")
DEFAULT_FPS = Fraction(25)
_BT709 = 1  # the same number for matrix, primaries and transfer in ITU-T H.273, and for the limited range in FFmpeg
_BT601 = 5
_YUV_MATRICES = (1, 4, 5, 6, 7, 9)  # BT.709, FCC, BT.601 twice, SMPTE 240M, BT.2020: the ones that FFmpeg converts


def require_pyav() -> ModuleType:
    """PyAV's module `av`, or InputError that says how to install it."""
    try:
        import av
    except ImportError:
        raise InputError("clips need PyAV, which is not installed: pip install vitok[video]") from None
    return av


class ClipReader(AbstractContextManager["ClipReader"]):
    """Streams the frames of a video file as uint8 RGB.

    fps      frames a second (average; 25 if the file does not say)
    height, width   of the frames as they are given out, a rotation by quarter turns in the file already applied
    frames   the count that the file declares, or None; an edit list can make it differ from the frames that come
    timestamp   of the last frame read, in the file's own unit, or None where the file has none

    Pixels are given as stored: the sample aspect ratio and mirroring flags are ignored. Memory holds one chunk and the
    decoder's few frames, whatever the length.

    Opening raises InputError for a file that is missing, empty, not a video, without a video stream or a single frame,
    truncated as far as its structure tells (MP4, MOV, MKV, WebM, AVI), or with frames of more than ``max_pixels``
    pixels.
    """

    def __init__(self, path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> None:
        self.path = check_readable(path, "a clip")
        self._max_pixels = max_pixels
        self._av = require_pyav()
        if _declared_length(self.path) > self.path.stat().st_size:
            raise InputError(f"{self.path} is truncated: it is shorter than it says itself")
        with ExitStack() as stack:
            try:
                self._open(stack)
            except self._av.error.FFmpegError as error:
                raise InputError(f"{self.path} is not a video or is damaged: {_reason(error)}") from error
            self._stack = stack.pop_all()

    def _open(self, stack: ExitStack) -> None:
        container = stack.enter_context(
            self._av.open(
                f"file:{self.path.absolute()}",  # with the scheme, so that no file name is taken for an address
                container_options={"protocol_whitelist": "file"},  # nor does a playlist reach the network
                metadata_errors="replace",
            )
        )
        covers = self._av.stream.Disposition.attached_pic
        stream = next((s for s in container.streams.video if not s.disposition & covers), None)
        if stream is None:
            raise InputError(f"{self.path} has no video stream that can be read")
        if stream.codec_context is None:
            raise InputError(f"{self.path} is compressed in a way that the installed FFmpeg cannot decode")
        self._check_size(stream.codec_context.width, stream.codec_context.height)
        stream.codec_context.options = {"max_pixels": str(self._max_pixels)}
        stream.thread_type = "AUTO"
        self.fps = Fraction(stream.average_rate or stream.guessed_rate or DEFAULT_FPS)
        self.frames: int | None = stream.frames or None
        self.timestamp: int | None = None
        self._container, self._stream = container, stream
        self._decoded = self._decode()
        first = next(self._decoded, None)
        if first is None:
            raise InputError(f"{self.path} has no video frame that can be decoded")
        self._pending: Any = first
        self._frame_size = (first.width, first.height)
        self._check_size(*self._frame_size)
        self._quarter_turns = round(first.rotation / 90) % 4
        turned = self._quarter_turns % 2 == 1
        self.height, self.width = (first.width, first.height) if turned else (first.height, first.width)

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self._max_pixels:
            limit = f"{self._max_pixels / 1e6:g} megapixels"
            raise InputError(f"{self.path} has frames of {width} x {height} pixels, more than the limit of {limit}")

    def _decode(self) -> Iterator[Any]:
        begun = False
        for packet in self._container.demux(self._stream):
            try:
                decoded = packet.decode()
            except self._av.error.InvalidDataError:
                if begun:
                    raise
                continue  # a recording that begins between key frames: nothing can be decoded until the next one
            begun = begun or bool(decoded)
            yield from decoded

    def chunks(self, frames: int) -> Iterator[torch.Tensor]:
        """The frames not read so far, as uint8 [t, H, W, 3] with t = ``frames`` and a last chunk that may be shorter.

        Each chunk is memory of its own. Of a damaged file, what can be decoded comes first, then InputError; InputError
        also where the frame size changes.
        """
        if frames < 1:
            raise InputError(f"frames per chunk must be at least 1, not {frames}")
        buffer, filled = None, 0
        try:
            while (frame := self._next()) is not None:
                pixels = self._pixels(frame)
                if buffer is None:
                    buffer, filled = torch.empty(frames, *pixels.shape, dtype=torch.uint8), 0
                buffer[filled] = pixels
                filled += 1
                if filled == frames:
                    yield buffer
                    buffer = None
        except (self._av.error.FFmpegError, InputError) as error:
            if buffer is not None:
                yield buffer[:filled]
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self.path} is damaged or truncated: {_reason(error)}") from error
        if buffer is not None:
            yield buffer[:filled]

    def skip(self, frames: int) -> None:
        """Leave out the next frames, which are decoded (others follow from them) but not converted."""
        try:
            for _ in range(frames):
                self._next()
        except self._av.error.FFmpegError as error:
            raise InputError(f"{self.path} is damaged or truncated: {_reason(error)}") from error

    def seek(self, timestamp: int) -> bool:
        """Go to the frame of this timestamp by way of the key frame before it.

        False if that does not lead there (not every format can); the reader then stands anywhere.
        """
        try:
            self._container.seek(timestamp, stream=self._stream)
            self._decoded = self._decode()
            for frame in self._decoded:
                if frame.pts is None or frame.pts >= timestamp:
                    self._pending = frame
                    return bool(frame.pts == timestamp)
        except self._av.error.FFmpegError:
            pass
        return False

    def _next(self) -> Any:
        frame, self._pending = self._pending, None
        if frame is None:
            frame = next(self._decoded, None)
        if frame is not None:
            self.timestamp = frame.pts
        return frame

    def _pixels(self, frame: Any) -> torch.Tensor:
        if (frame.width, frame.height) != self._frame_size:
            first, other = "{} x {}".format(*self._frame_size), f"{frame.width} x {frame.height}"
            raise InputError(f"{self.path} changes its frame size from {first} to {other}; it must stay the same")
        # PyAV before 17 took every clip for BT.601 unless told both ends; the second means nothing for RGB.
        matrix = frame.colorspace if frame.colorspace in _YUV_MATRICES else _BT601
        pixels = frame.to_ndarray(format="rgb24", src_colorspace=matrix, dst_colorspace=_BT601)
        # FFmpeg and numpy both count quarter turns counter-clockwise.
        return torch.from_numpy(np.ascontiguousarray(np.rot90(pixels, self._quarter_turns)))

    def close(self) -> None:
        """Close the file; done by the ``with`` statement."""
        self._pending = None
        self._stack.close()

    def __exit__(self, *_: object) -> None:
        self.close()


class ClipWriter(AbstractContextManager["ClipWriter"]):
    """Writes uint8 RGB frames as H.264 video (MPEG-4 part 2 where FFmpeg lacks x264) in MP4, MOV or MKV.

    The size is that of the first frames written; an odd side is made even by repeating the last row or column, because
    4:2:0 video has no odd ones. Colours are BT.709 and say so. Under the final name the file appears whole when the
    ``with`` block ends well, and not at all otherwise.

    Raises InputError for another suffix, an fps that is not positive, an unwritable destination, frames of another size
    or dtype, and when no frame was written.
    """

    def __init__(self, path: str | os.PathLike[str], fps: Fraction | float) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() not in WRITE_SUFFIXES:
            raise InputError(f"cannot write {path}: the suffix must be one of {', '.join(WRITE_SUFFIXES)}")
        if not 0 < fps < float("inf"):
            raise InputError(f"fps must be a positive number, not {fps}")
        # Small denominators (1001 for the broadcast rates), because MPEG-4 has 16 bits for them.
        self._fps = max(Fraction(fps).limit_denominator(1001), Fraction(1, 1001))
        self._av = require_pyav()
        self._size: tuple[int, int] | None = None
        self._stream: Any = None

    def __enter__(self) -> "ClipWriter":
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(self.path))
            options = {} if self.path.suffix.lower() == ".mkv" else {"movflags": "+faststart"}
            self._container = self._av.open(str(temporary), "w", options=options)
            stack.callback(self._abandon)
            self._stack = stack.pop_all()
        return self

    def write(self, frames: torch.Tensor) -> None:
        """Append uint8 [t, H, W, 3] frames."""
        array = as_array(frames, rank=4)
        size = array.shape[1:3]
        if len(array) == 0:
            return
        if self._size is None:
            self._size = size
            self._stream = self._add_stream(size[0] + size[0] % 2, size[1] + size[1] % 2)
        elif size != self._size:
            (height, width), came = self._size, f"{size[0]} x {size[1]}"
            raise InputError(f"cannot write {self.path}: frames of {came} after frames of {height} x {width}")
        for frame in array:
            even = np.pad(frame, ((0, size[0] % 2), (0, size[1] % 2), (0, 0)), mode="edge")
            picture = self._av.VideoFrame.from_ndarray(even, format="rgb24")
            self._encode(picture.reformat(format="yuv420p", dst_colorspace="ITU709"))

    def _add_stream(self, height: int, width: int) -> Any:
        try:
            self._av.codec.Codec("libx264", "w")
            codec, options = "libx264", {"crf": "18", "preset": "medium"}
        except self._av.codec.codec.UnknownCodecError:
            codec, options = "mpeg4", {"flags": "+qscale", "global_quality": str(3 * 118)}  # quantiser 3 of 31
        stream = self._container.add_stream(codec, rate=self._fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = _BT709
        return stream

    def _encode(self, frame: Any) -> None:
        try:
            for packet in self._stream.encode(frame):
                self._container.mux(packet)
        except self._av.error.FFmpegError as error:
            raise InputError(f"cannot write {self.path}: {_reason(error)}") from error

    def _finish(self) -> None:
        if self._stream is None:
            raise InputError(f"cannot write {self.path}: no frames came")
        self._encode(None)
        try:
            self._container.close()
        except self._av.error.FFmpegError as error:
            raise InputError(f"cannot write {self.path}: {_reason(error)}") from error

    def _abandon(self) -> None:
        # After _finish this does nothing; after an error the file is thrown away and its end may fail to be written.
        with suppress(self._av.error.FFmpegError):
            self._container.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            try:
                self._finish()
            except BaseException as failure:
                self._stack.__exit__(type(failure), failure, failure.__traceback__)
                raise
        self._stack.__exit__(kind, error, trace)


def _declared_length(path: Path) -> int:
    """The length in bytes that an MP4, MOV, AVI, MKV or WebM file promises, 0 for other formats or if unsaid."""
    with open(path, "rb") as file:
        head = file.read(4096)
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            return _last_box_end(file)
    if head[:4] == b"RIFF":
        return 8 + int.from_bytes(head[4:8], "little")
    if head[:4] == b"\x1aE\xdf\xa3":  # EBML header, then one segment, each with an identifier and a size
        segment, known = _ebml_end(head, 4)
        if known and head[segment : segment + 4] == b"\x18S\x80g":
            end, known = _ebml_end(head, segment + 4)
            return end if known else 0
    return 0


def _last_box_end(file: BinaryIO) -> int:
    """Where the last of the top-level boxes of an MP4 or MOV file that matter ends; trailing rubbish does not."""
    at = end = 0
    while True:
        file.seek(at)
        header = file.read(16)
        size = int.from_bytes(header[:4], "big")
        if size == 1:
            size = int.from_bytes(header[8:16], "big")
        if len(header) < 8 or size < 8:  # size 0: up to the end of the file, whatever that is
            return end
        at += size
        if header[4:8] in (b"moov", b"mdat", b"moof"):
            end = at


def _ebml_end(head: bytes, at: int) -> tuple[int, bool]:
    """Where the EBML element ends whose size field is at ``at``, and whether that size is given at all."""
    length = 9 - head[at].bit_length() if at < len(head) else 9  # leading zero bits of the first byte tell
    mask = (1 << 7 * length) - 1
    size = int.from_bytes(head[at : at + length], "big") & mask
    return at + length + size, length <= 8 and size != mask


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split())
