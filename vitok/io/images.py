"""Reading any everyday picture as RGB bytes, writing pictures, and the resize-and-crop of the evaluation protocol."""

import math
import os
import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from vitok.errors import InputError
from vitok.io.files import MAX_PIXELS, atomic_path, check_readable

# Named, because the rest of what Pillow tries is rarely a photograph and includes PostScript, which runs a program.
READ_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "QOI")

WRITE_OPTIONS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".webp": {"format": "WEBP", "quality": 95},
}

LONGEST_EXACT = 16
"""Up to this ratio of long to short side, resize_and_crop equals a plain resize followed by a crop bit for bit."""

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, eq=False)
class ReadImage:
    """``pixels`` uint8 [H, W, 3] RGB, and a ``note`` on what was changed to get there ("" for a plain RGB picture)."""

    pixels: torch.Tensor
    note: str = ""


def read_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> ReadImage:
    """Read a picture as uint8 RGB, the right way up.

    Grey, palette, CMYK and bilevel pictures become RGB; 16-bit ones keep their high byte (65535 becomes 255, and an
    8-bit picture stored as 16 bits comes back exactly); transparency is laid onto white; the EXIF orientation is
    applied; of an animation or a multi-page file the first frame is taken. Colour profiles are not applied.

    Raises InputError for a file that is missing, empty, a folder, not a picture in a known format, damaged or
    truncated, of a pixel type without an agreed range (float, 32-bit), or of more than ``max_pixels`` pixels. That last
    check reads the header only, before anything is decoded.
    """
    path = check_readable(path, "a picture")
    return _read(path, path, max_pixels)


def decode_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> ReadImage:
    """As `read_image`, of a file's content; `name` stands for it in messages."""
    return _read(BytesIO(data), name, max_pixels)


def _read(file: Path | BytesIO, path: Path | str, max_pixels: int) -> ReadImage:
    try:
        with _open(file, path, max_pixels) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise InputError(
                    f"{path} has {width} x {height} pixels, more than the limit of {_megapixels(max_pixels)}"
                )
            image.load()
            return _to_rgb(image, path)
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{path} is not a picture in a format that is read here ({_format_names()})") from None
    except Exception as error:
        # Pillow's decoders raise almost anything on damaged data (OSError, SyntaxError, struct.error, IndexError, ...).
        raise InputError(f"{path} is damaged or truncated: {_reason(error)}") from error


def _open(file: Path | BytesIO, path: Path | str, max_pixels: int) -> Image.Image:
    Image.init()
    formats = [name for name in READ_FORMATS if name in Image.OPEN]
    with warnings.catch_warnings():
        # Pillow warns from 89 megapixels on; the limit here is max_pixels, and it is an error.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            return Image.open(file, formats=formats)
        except Image.DecompressionBombError:
            limit = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))
            raise InputError(f"{path} has more pixels than the limit of {_megapixels(limit)}") from None


def _to_rgb(image: Image.Image, path: Path | str) -> ReadImage:
    notes = []
    if image.mode == "F":
        raise InputError(f"{path} holds floating-point pixels, which have no agreed range; save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        notes.append("16-bit grey")
        upright = _from_16_bit(image, path)
    elif image.has_transparency_data:
        layer = image.convert("RGBA")
        if np.asarray(layer)[..., 3].min() < 255:
            notes.append("transparency laid onto white")
        upright = Image.alpha_composite(Image.new("RGBA", image.size, "white"), layer).convert("RGB")
    else:
        names = {"1": "bilevel", "L": "grey", "P": "palette", "CMYK": "CMYK"}
        if image.mode != "RGB":
            notes.append(names.get(image.mode, image.mode))
        upright = image if image.mode == "RGB" else image.convert("RGB")
    turn = _UPRIGHT.get(_orientation(image) or 1)
    if turn is not None:
        notes.append("turned upright by its EXIF orientation")
        upright = upright.transpose(turn)
    pixels = np.array(upright)  # before frames are counted, which may leave another one in `image`
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        notes.append(f"first of {frames} frames")
    return ReadImage(torch.from_numpy(pixels), ", ".join(notes))


def _from_16_bit(image: Image.Image, path: Path | str) -> Image.Image:
    # Pillow's own conversion of these modes clips at 255 instead of scaling.
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise InputError(f"{path} holds 32-bit pixels, which have no agreed range; save it with 8 or 16 bits")
    grey = (values >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # a broken EXIF block must not cost the picture
        return None


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__


def _format_names() -> str:
    return ", ".join(name for name in READ_FORMATS if name != "MPO")


def _megapixels(pixels: int) -> str:
    return f"{pixels / 1e6:g} megapixels"


def write_image(path: str | os.PathLike[str], pixels: torch.Tensor) -> None:
    """Write uint8 [H, W, 3] pixels as PNG, JPEG (quality 95, 4:4:4) or WebP (quality 95), chosen by the suffix.

    The file appears whole or not at all. Raises InputError for another suffix and for an unwritable destination.
    """
    options = WRITE_OPTIONS.get(Path(path).suffix.lower())
    if options is None:
        raise InputError(f"cannot write {path}: the suffix must be one of {', '.join(WRITE_OPTIONS)}")
    image = Image.fromarray(as_array(pixels, rank=3))
    with atomic_path(path) as temporary:
        try:
            image.save(temporary, **options)
        except (OSError, ValueError) as error:  # such as a side beyond the format's limit
            raise InputError(f"cannot write {path}: {_reason(error)}") from error


def as_array(pixels: torch.Tensor, rank: int) -> np.ndarray:
    """uint8 [..., H, W, 3] of the given rank as a contiguous numpy array, or InputError."""
    wanted = {3: "[H, W, 3]", 4: "[T, H, W, 3]"}[rank]
    if pixels.dtype != torch.uint8 or pixels.ndim != rank or pixels.shape[-1] != 3 or 0 in pixels.shape[-3:]:
        raise InputError(f"pixels must be uint8 {wanted}, not {str(pixels.dtype)[6:]} {list(pixels.shape)}")
    return np.ascontiguousarray(pixels.detach().cpu().numpy())


def resize_and_crop(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Short side to ``size`` (Pillow's bicubic, antialiased), then the centre crop: the protocol of every number here.

    ``pixels`` is uint8 [H, W, 3] or [T, H, W, 3]; the result has H = W = ``size``. The long side becomes
    ``round(long * size / short)`` and the crop starts at ``(long - size) // 2``.

    Pictures up to 16:1 are resized whole, then cropped. Of longer ones, and where the whole would exceed MAX_PIXELS,
    only the part that the crop shows is resized, so that a 1 x 4000 picture costs no more than a square one; there a
    value may differ by rounding from the two steps.
    """
    if not isinstance(size, int) or not 1 <= size <= math.isqrt(MAX_PIXELS):
        raise InputError(f"size must be a whole number from 1 to {math.isqrt(MAX_PIXELS)}, not {size!r}")
    frames = as_array(pixels, rank=4 if pixels.ndim == 4 else 3)
    if frames.ndim == 3:
        return torch.from_numpy(_resize_and_crop(frames, size))
    result = torch.empty(len(frames), size, size, 3, dtype=torch.uint8)
    for frame, out in zip(frames, result, strict=True):
        out.copy_(torch.from_numpy(_resize_and_crop(frame, size)))
    return result


def _resize_and_crop(frame: np.ndarray, size: int) -> np.ndarray:
    height, width, _ = frame.shape
    short = min(height, width)
    scaled_height, scaled_width = round(height * size / short), round(width * size / short)
    top, left = (scaled_height - size) // 2, (scaled_width - size) // 2
    if (scaled_height, scaled_width) == (height, width):
        return frame[top : top + size, left : left + size].copy()
    if scaled_height * scaled_width <= min(LONGEST_EXACT * size * size, MAX_PIXELS):
        image = Image.fromarray(frame).resize((scaled_width, scaled_height), Image.Resampling.BICUBIC)
        return np.array(image.crop((left, top, left + size, top + size)))
    y0, y1, top, bottom = _source_window(height, scaled_height, top, size)
    x0, x1, left, right = _source_window(width, scaled_width, left, size)
    image = Image.fromarray(np.ascontiguousarray(frame[y0:y1, x0:x1]))
    return np.array(image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, right, bottom)))


def _source_window(length: int, scaled: int, start: int, size: int) -> tuple[int, int, float, float]:
    """Along one side: the source rows [first, last) that the crop's filter reads, and the crop within them."""
    step = length / scaled
    begin, end = start * step, (start + size) * step
    reach = math.ceil(2 * max(step, 1)) + 1  # bicubic reads two (scaled) pixels either way
    first, last = max(0, math.floor(begin) - reach), min(length, math.ceil(end) + reach)
    return first, last, begin - first, min(end, last) - first
