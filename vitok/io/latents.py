"""Latents files: one tensor in a safetensors file, with what decoding needs in its metadata."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vitok.errors import InputError
from vitok.io.files import MAX_PIXELS, atomic_path, check_readable

FORMAT = "vitok-latents"
VERSION = "1"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Latents:
    """Latents of one picture, clip or equally sized batch, and where they came from.

    latents       floating point, [B, c, h, w] for pictures or [B, c, t, h, w] for clips
    size          of the original in pixels: (H, W), or (T, H, W) for a clip
    model         the model's name, for messages
    config_hash   of the model's config, and
    weights_hash  of its weights; only the same model can decode them
    fps           frames a second of a clip, None for pictures or if unknown
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
        shape, dtype = list(self.latents.shape), self.latents.dtype
        if len(shape) not in (4, 5) or 0 in shape:
            raise InputError(f"latents must be [B, c, h, w] or [B, c, t, h, w], not {shape}")
        if dtype not in _DTYPES:
            raise InputError(f"latents must be float32, float16 or bfloat16, not {str(dtype)[6:]}")
        if not torch.isfinite(self.latents).all():
            raise InputError("latents hold NaN or infinite values")
        if len(self.size) != len(shape) - 2 or min(self.size) < 1:
            wanted = "(H, W)" if len(shape) == 4 else "(T, H, W)"
            raise InputError(f"the original size of latents {shape} must be {wanted}, not {self.size}")
        if self.size[-2] * self.size[-1] > MAX_PIXELS:
            limit = f"{MAX_PIXELS / 1e6:g} megapixels"
            raise InputError(f"an original of {self.size[-2]} x {self.size[-1]} is beyond the limit of {limit}")
        if self.fps is not None and self.fps <= 0:
            raise InputError(f"fps must be positive, not {self.fps}")


def write_latents(path: str | os.PathLike[str], latents: Latents) -> None:
    """Write latents as safetensors; the file appears whole or not at all. InputError if it cannot be written."""
    metadata: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "model": latents.model,
        "config_hash": latents.config_hash,
        "weights_hash": latents.weights_hash,
        "size": "x".join(map(str, latents.size)),
        "fps": latents.fps,
        # Names that are not valid text, which some file systems allow, must not make the file unwritable.
        "source": latents.source.encode("utf-8", "replace").decode(),
    }
    texts = {key: str(value) for key, value in metadata.items() if value is not None}
    with atomic_path(path) as temporary:
        try:
            save_file({"latents": latents.latents.detach().cpu().contiguous()}, temporary, metadata=texts)
        except SafetensorError as error:
            raise InputError(f"cannot write {path}: {error}") from error


def read_latents(path: str | os.PathLike[str], *, model: str = "", config_hash: str = "", weights_hash: str = "") -> Latents:
    """Read latents written by :func:`write_latents`, on the CPU and in the dtype they were written in.

    With the hashes of the model about to decode (``model`` is its name, for the message), latents made by another config
    or other weights are refused. Raises InputError for a file that is missing, damaged, not latents, or of another model.
    """
    path = check_readable(path, "a latents file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            if metadata.get("format") != FORMAT or names != ["latents"]:
                raise InputError(f"{path} is a safetensors file but holds no vitok latents")
            if metadata.get("version") != VERSION:
                raise InputError(f"{path} has latents format {metadata.get('version')}; this vitok reads {VERSION}")
            made_by = metadata.get("config_hash"), metadata.get("weights_hash")
            if config_hash and made_by != (config_hash, weights_hash):
                raise InputError(
                    f"{path} was encoded by {_who(metadata.get('model'), *made_by)} "
                    f"and cannot be decoded by {_who(model, config_hash, weights_hash)}"
                )
            tensor = file.get_tensor("latents").clone()  # lets go of the mapped file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a safetensors file or is truncated: {error}") from error
    try:
        return _from_metadata(tensor, metadata)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{path} has missing or broken metadata: {type(error).__name__} {error}") from error


def _from_metadata(tensor: torch.Tensor, metadata: Mapping[str, str]) -> Latents:
    return Latents(
        latents=tensor,
        size=tuple(int(side) for side in metadata["size"].split("x")),
        model=metadata["model"],
        config_hash=metadata["config_hash"],
        weights_hash=metadata["weights_hash"],
        fps=Fraction(metadata["fps"]) if "fps" in metadata else None,
        source=metadata.get("source", ""),
    )


def _who(model: str | None, config_hash: str | None, weights_hash: str | None) -> str:
    return f"{model or 'a model'} (config {config_hash or 'unknown'}, weights {weights_hash or 'unknown'})"
