"""Latents files: one tensor in a safetensors file, with what decoding needs in its metadata.

A file holds one picture or clip. Its tensor "latents" is [t, c, h, w], t = 1 for a picture, so that a clip can be
written and read a few time steps at once.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from vitok.errors import InputError
from vitok.io.files import MAX_PIXELS, atomic_path, check_readable

FORMAT = "vitok-latents"
VERSION = "1"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # by their names in the file


@dataclass(frozen=True, eq=False)
class Latents:
    """Latents of one picture or clip, and where they came from.

    latents       float32, float16 or bfloat16, [1, c, h, w] of a picture or [1, c, t, h, w] of a clip
    size          of the original in pixels: (H, W), or (T, H, W) for a clip
    model         the model's name, for messages
    config_hash   of the model's config, and
    weights_hash  of its weights; only the same model can decode them
    fps           frames a second of a clip, None for a picture or if unknown
    source        name of the original file, "" if there is none
    """

    latents: torch.Tensor
    size: tuple[int, ...]
    model: str
    config_hash: str
    weights_hash: str
    fps: Fraction | None = None
    source: str = ""

    def __post_init__(self) -> None:
        shape = list(self.latents.shape)
        if len(shape) not in (4, 5) or shape[0] != 1 or len(shape) != len(self.size) + 2:
            raise InputError(
                "latents must be [1, c, h, w] with a size of (H, W), or [1, c, t, h, w] with (T, H, W), "
                f"not {shape} with {self.size}"
            )
        _check_layout(shape if len(shape) == 4 else [shape[2], shape[1], *shape[3:]], self.size, self.fps)
        _check_values(self.latents)


class LatentsWriter(AbstractContextManager["LatentsWriter"]):
    """Writes the latents of one picture or clip (``clip``) chunk by chunk; ``size`` is (H, W) of the original.

    The other arguments are as in :class:`Latents`. The file appears whole when the ``with`` block ends well, and not at
    all otherwise. Until then the latents are in a nameless temporary file beside it, because the header, which comes
    first, needs their number.

    Raises InputError for an unwritable destination, latents that do not belong together, and when none were written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        size: tuple[int, int],
        *,
        clip: bool,
        model: str,
        config_hash: str,
        weights_hash: str,
        fps: Fraction | None = None,
        source: str = "",
    ) -> None:
        self.path = Path(path)
        self._size, self._clip, self._fps = size, clip, fps
        self._about = {"model": model, "config_hash": config_hash, "weights_hash": weights_hash, "source": source}
        self._steps = self._frames = 0
        self._kind: tuple[torch.dtype, list[int]] | None = None

    def __enter__(self) -> "LatentsWriter":
        folder = Path(os.path.realpath(self.path)).parent
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            self._body: IO[bytes] = tempfile.TemporaryFile(dir=folder)
        return self

    def write(self, latents: torch.Tensor, frames: int) -> None:
        """Append latents [1, c, t, h, w] of that many ``frames`` of the original, 1 for a picture."""
        shape = list(latents.shape)
        if len(shape) != 5 or shape[0] != 1:
            raise InputError(f"cannot write {self.path}: latents must be [1, c, t, h, w], not {shape}")
        _check_values(latents)
        kind = latents.dtype, [shape[1], *shape[3:]]
        self._kind = self._kind or kind
        if kind != self._kind:
            (dtype, sides), (wanted_dtype, wanted) = kind, self._kind
            raise InputError(
                f"cannot write {self.path}: latents of {dtype} {sides} (c, h, w) after {wanted_dtype} {wanted}"
            )
        self._steps, self._frames = self._steps + shape[2], self._frames + frames
        stored = latents.detach()[0].transpose(0, 1).cpu().contiguous()
        with self._writing():
            self._body.write(stored.flatten().view(torch.uint8).numpy().data)
            self._body.flush()  # so that a full disk is noticed here

    def _finish(self) -> None:
        if self._kind is None:
            raise InputError(f"cannot write {self.path}: no latents came")
        dtype, sides = self._kind
        shape, size = [self._steps, *sides], (self._frames, *self._size) if self._clip else self._size
        _check_layout(shape, size, self._fps)
        metadata = {"format": FORMAT, "version": VERSION, **self._about, "size": "x".join(map(str, size))}
        if self._fps is not None:
            metadata["fps"] = str(self._fps)
        name = next(name for name, ours in _DTYPES.items() if ours == dtype)
        tensor = {"dtype": name, "shape": shape, "data_offsets": [0, self._body.tell()]}
        # Names that are not valid text, which some file systems allow, must not make the file unreadable.
        header = json.dumps({"__metadata__": metadata, "latents": tensor}, ensure_ascii=False).encode(
            "utf-8", "replace"
        )
        header += b" " * (-len(header) % 8)
        with atomic_path(self.path) as temporary, open(temporary, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            self._body.seek(0)
            shutil.copyfileobj(self._body, file, 1 << 20)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror or error}") from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            with suppress(OSError):  # after a failed write, of what could not be written
                self._body.close()


class LatentsReader(AbstractContextManager["LatentsReader"]):
    """Streams the latents of a picture or clip, on the CPU and in the dtype they were written in.

    steps    time steps t of the latents, 1 for a picture
    size, model, config_hash, weights_hash, fps, source    as in :class:`Latents`

    With the hashes of the model about to decode (``model`` is its name, for the message), latents made by another
    config or other weights are refused. Opening raises InputError for a file that is missing, damaged, not latents, or
    of another model.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, model: str = "", config_hash: str = "", weights_hash: str = ""
    ) -> None:
        self.path = check_readable(path, "a latents file")
        with ExitStack() as stack:
            with self._reading():
                with safe_open(self.path, framework="pt") as file:
                    metadata = file.metadata() or {}
                    if metadata.get("format") != FORMAT or list(file.keys()) != ["latents"]:
                        raise InputError(f"{self.path} is a safetensors file but holds no vitok latents")
                    tensor = file.get_slice("latents")
                    self._shape, dtype = list(tensor.get_shape()), tensor.get_dtype()
                # The latents are read and not mapped: a mapping's pages would stay in memory as they are touched.
                self._file = stack.enter_context(open(self.path, "rb"))
                self._begin = 8 + int.from_bytes(self._file.read(8), "little")
            if metadata.get("version") != VERSION:
                raise InputError(
                    f"{self.path} has latents format {metadata.get('version')}; this vitok reads {VERSION}"
                )
            made_by = metadata.get("config_hash"), metadata.get("weights_hash")
            if config_hash and made_by != (config_hash, weights_hash):
                raise InputError(
                    f"{self.path} was encoded by {_who(metadata.get('model'), *made_by)} "
                    f"and cannot be decoded by {_who(model, config_hash, weights_hash)}"
                )
            try:
                self._describe(metadata, dtype)
            except InputError as error:
                raise InputError(f"{self.path}: {error}") from error
            except (KeyError, ValueError, ZeroDivisionError) as error:
                what = f"{type(error).__name__} {error}"
                raise InputError(f"{self.path} has missing or broken metadata: {what}") from error
            self._stack = stack.pop_all()

    def _describe(self, metadata: Mapping[str, str], dtype: str) -> None:
        self.size = tuple(int(side) for side in metadata["size"].split("x"))
        self.model = metadata["model"]
        self.config_hash, self.weights_hash = metadata["config_hash"], metadata["weights_hash"]
        self.fps = Fraction(metadata["fps"]) if "fps" in metadata else None
        self.source = metadata.get("source", "")
        _check_layout(self._shape, self.size, self.fps)
        if dtype not in _DTYPES:
            raise InputError(f"latents must be float32, float16 or bfloat16, not {dtype}")
        self._dtype = _DTYPES[dtype]
        self.steps: int = self._shape[0]

    def chunks(self, steps: int) -> Iterator[torch.Tensor]:
        """All latents as [1, c, t, h, w] with t = ``steps`` and a last chunk that may be shorter.

        Each chunk is memory of its own. Raises InputError at NaN or infinite values and where reading fails.
        """
        step_bytes = prod(self._shape[1:]) * self._dtype.itemsize
        for start in range(0, self.steps, steps):
            data = bytearray(min(steps, self.steps - start) * step_bytes)
            with self._reading():
                self._file.seek(self._begin + start * step_bytes)
                if self._file.readinto(data) != len(data):
                    raise OSError("it became shorter while it was read")
            stored = torch.frombuffer(data, dtype=self._dtype).view(-1, *self._shape[1:])
            try:
                _check_values(stored)
            except InputError as error:
                raise InputError(f"{self.path}: {error}") from error
            yield stored.transpose(0, 1).contiguous()[None]

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.path} is not a safetensors file or is truncated: {error}") from error

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def write_latents(path: str | os.PathLike[str], latents: Latents) -> None:
    """Write latents as safetensors; the file appears whole or not at all. InputError if it cannot be written."""
    clip = len(latents.size) == 3
    about: dict[str, Any] = {name: getattr(latents, name) for name in _ABOUT}
    height, width = latents.size[-2:]
    with LatentsWriter(path, (height, width), clip=clip, **about) as writer:
        writer.write(*((latents.latents, latents.size[0]) if clip else (latents.latents.unsqueeze(2), 1)))


def read_latents(
    path: str | os.PathLike[str], *, model: str = "", config_hash: str = "", weights_hash: str = ""
) -> Latents:
    """Read a whole latents file at once; arguments, dtype and errors are those of :class:`LatentsReader`."""
    with LatentsReader(path, model=model, config_hash=config_hash, weights_hash=weights_hash) as reader:
        (latents,) = reader.chunks(reader.steps)
        about: dict[str, Any] = {name: getattr(reader, name) for name in _ABOUT}
        return Latents(latents if len(reader.size) == 3 else latents.squeeze(2), reader.size, **about)


_ABOUT = ("model", "config_hash", "weights_hash", "fps", "source")


def _check_layout(shape: Sequence[int], size: tuple[int, ...], fps: Fraction | None) -> None:
    """``shape`` [t, c, h, w] as in the file, against the size (H, W) or (T, H, W) of the original."""
    if len(shape) != 4 or 0 in shape:
        raise InputError(f"latents must be [t, c, h, w] without a zero, not {list(shape)}")
    if len(size) not in (2, 3) or min(size) < 1 or (len(size) == 2 and shape[0] != 1):
        raise InputError(f"the original size of latents of {shape[0]} time steps cannot be {size}")
    if size[-2] * size[-1] > MAX_PIXELS:
        limit = f"{MAX_PIXELS / 1e6:g} megapixels"
        raise InputError(f"an original of {size[-2]} x {size[-1]} is beyond the limit of {limit}")
    if fps is not None and fps <= 0:
        raise InputError(f"fps must be positive, not {fps}")


def _check_values(latents: torch.Tensor) -> None:
    if latents.dtype not in _DTYPES.values():
        raise InputError(f"latents must be float32, float16 or bfloat16, not {str(latents.dtype)[6:]}")
    if not torch.isfinite(latents).all():
        raise InputError("latents hold NaN or infinite values")


def _who(model: str | None, config_hash: str | None, weights_hash: str | None) -> str:
    return f"{model or 'a model'} (config {config_hash or 'unknown'}, weights {weights_hash or 'unknown'})"
