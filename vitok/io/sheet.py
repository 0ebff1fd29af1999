"""Pictures on one sheet: originals beside their reconstructions, with captions, or a plain grid of samples."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from vitok.errors import InputError
from vitok.io.images import as_array

GAP = 8
_MARGIN = 24
_LINE = 20
_PAPER, _INK, _FAINT = (255, 255, 255), (32, 32, 32), (120, 120, 120)


def side_by_side(original: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """Two equally sized uint8 pictures [H, W, 3] or clips [T, H, W, 3], left and right of a white gap of 8 pixels."""
    if original.shape != reconstruction.shape or original.dtype != torch.uint8 or original.ndim not in (3, 4):
        came = f"{list(original.shape)} and {list(reconstruction.shape)}"
        raise InputError(f"side_by_side wants two uint8 [H, W, 3] or [T, H, W, 3] of one shape, not {came}")
    gap = original.new_full((*original.shape[:-2], GAP, 3), 255)
    return torch.cat((original, gap, reconstruction), dim=-2)


def grid(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 [N, H, W, 3] as one uint8 picture [H', W', 3], row by row in about a square, between white gaps."""
    if pictures.ndim != 4 or pictures.dtype != torch.uint8 or pictures.shape[-1] != 3 or not len(pictures):
        raise InputError(f"grid wants uint8 [N, H, W, 3], N >= 1, not {pictures.dtype} {list(pictures.shape)}")
    count, height, width, _ = pictures.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = pictures.new_full((rows, height + GAP, columns, width + GAP, 3), 255)
    for number, picture in enumerate(pictures):
        sheet[number // columns, :height, number % columns, :width] = picture
    return sheet.view(rows * (height + GAP), columns * (width + GAP), 3)[:-GAP, :-GAP].contiguous()


@dataclass
class ContactSheet:
    """Pairs of pictures laid out in rows, each with a caption, at a bounded size.

    A picture is fitted into ``cell`` (width, height). Pairs are shrunk as they are added, so that a sheet of many large
    photographs stays small in memory; beyond ``max_pairs`` they are only counted.
    """

    cell: tuple[int, int] = (384, 256)
    max_width: int = 2048
    max_pairs: int = 60
    _pairs: list[tuple[Image.Image, str]] = field(default_factory=list, init=False, repr=False)
    _left_out: int = field(default=0, init=False, repr=False)

    def add(self, original: torch.Tensor, reconstruction: torch.Tensor, caption: str) -> None:
        """Append a pair of uint8 [H, W, 3]; of the caption's lines the first is drawn dark, the others faint."""
        if len(self._pairs) == self.max_pairs:
            self._left_out += 1
            return
        left, right = self._fit(original), self._fit(reconstruction)
        pair = Image.new("RGB", (left.width + GAP + right.width, max(left.height, right.height)), _PAPER)
        pair.paste(left, (0, 0))
        pair.paste(right, (left.width + GAP, 0))
        self._pairs.append((pair, caption))

    def _fit(self, pixels: torch.Tensor) -> Image.Image:
        image = Image.fromarray(as_array(pixels, rank=3))
        scale = min(self.cell[0] / image.width, self.cell[1] / image.height)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        return image.resize(size, Image.Resampling.BICUBIC)

    def render(self) -> torch.Tensor:
        """The sheet as uint8 [H, W, 3], at most ``max_width`` wide unless one pair is wider. InputError if empty."""
        if not self._pairs:
            raise InputError("a contact sheet needs at least one pair of pictures")
        rows = self._rows()
        lines = max(caption.count("\n") + 1 for _, caption in self._pairs)
        width = max(sum(self._column(pair) + _MARGIN for pair, _ in row) for row in rows) + _MARGIN
        heights = [max(pair.height for pair, _ in row) + GAP + lines * _LINE + _MARGIN for row in rows]
        sheet = Image.new("RGB", (width, _MARGIN + _LINE + GAP + sum(heights)), _PAPER)
        draw = ImageDraw.Draw(sheet)
        title = "left: original, right: reconstruction"
        if self._left_out:
            title += f" ({self._left_out} more not shown)"
        _write(draw, (_MARGIN, _MARGIN // 2), title, width - 2 * _MARGIN, _FAINT)
        top = _MARGIN + _LINE + GAP
        for row, height in zip(rows, heights, strict=True):
            left, text_top = _MARGIN, top + max(pair.height for pair, _ in row) + GAP
            for pair, caption in row:
                sheet.paste(pair, (left, text_top - GAP - pair.height))
                for number, line in enumerate(caption.split("\n")):
                    place = (left, text_top + number * _LINE)
                    _write(draw, place, line, self._column(pair), _INK if number == 0 else _FAINT)
                left += self._column(pair) + _MARGIN
            top += height
        return torch.from_numpy(np.array(sheet))

    def _column(self, pair: Image.Image) -> int:
        return max(pair.width, self.cell[0] // 2)  # a narrow picture still leaves room for its caption

    def _rows(self) -> list[list[tuple[Image.Image, str]]]:
        rows: list[list[tuple[Image.Image, str]]] = []
        used = self.max_width
        for pair, caption in self._pairs:
            needed = self._column(pair) + _MARGIN
            if not rows or used + needed > self.max_width:
                rows.append([])
                used = _MARGIN
            rows[-1].append((pair, caption))
            used += needed
        return rows


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: int, ink: tuple[int, int, int]) -> None:
    """One line of text, shortened in the middle to fit; letters that the font lacks become boxes or question marks."""
    font = ImageFont.load_default(14)
    # File names may hold undecodable bytes and control characters; a Pillow without FreeType draws Latin-1 only.
    coding = "utf-8" if isinstance(font, ImageFont.FreeTypeFont) else "latin-1"
    text = "".join(c if c.isprintable() else "?" for c in text).encode(coding, "replace").decode(coding)
    keep = len(text)
    shown = text
    while keep > 1 and draw.textlength(shown, font=font) > width:
        keep = min(keep - 1, int(keep * 0.98))
        shown = f"{text[: (keep + 1) // 2]}...{text[len(text) - keep // 2 :]}"
    draw.text(place, shown, fill=ink, font=font)
