import os

import pytest
import torch

from vitok.errors import InputError
from vitok.io import ContactSheet, grid, side_by_side
from vitok.io.sheet import GAP


def picture(height, width, value=0):
    return torch.full((height, width, 3), value, dtype=torch.uint8)


def test_side_by_side():
    both = side_by_side(picture(4, 6, 10), picture(4, 6, 20))
    assert both.shape == (4, 6 + 8 + 6, 3)
    assert (both[:, :6] == 10).all() and (both[:, 6:14] == 255).all() and (both[:, 14:] == 20).all()
    clip = torch.zeros(2, 4, 6, 3, dtype=torch.uint8)
    assert side_by_side(clip, clip).shape == (2, 4, 20, 3)
    for a, b in ((picture(4, 6), picture(4, 7)), (picture(4, 6).float(), picture(4, 6).float())):
        with pytest.raises(InputError, match="side_by_side"):
            side_by_side(a, b)


def test_sheet_shows_both_pictures_within_its_width():
    sheet = ContactSheet(cell=(60, 40), max_width=400)
    for _ in range(7):
        sheet.add(picture(80, 120, 50), picture(80, 120, 200), "a.png\n30 dB")
    pixels = sheet.render()
    assert pixels.dtype == torch.uint8 and pixels.shape[1] <= 400
    assert (pixels == 50).all(-1).sum() >= 7 * 60 * 40 and (pixels == 200).all(-1).sum() >= 7 * 60 * 40


def test_captions_are_drawn_under_the_pair():
    def ink(caption):
        sheet = ContactSheet()
        sheet.add(picture(256, 256, 255), picture(256, 256, 255), caption)
        return int((sheet.render() < 200).sum())

    assert ink("") < ink("cat.png") < ink("cat.png\n28.1 dB")


@pytest.mark.parametrize(
    "caption", ["写真.png", "שלום e\u0301", os.fsdecode(b"\xff\xfe.jpg"), "bell\x07tab\t", "n" * 300, "", "\n\n"]
)
@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1)])
def test_any_name_and_any_shape(caption, size):
    sheet = ContactSheet()
    sheet.add(picture(*size), picture(*size), caption)
    height, width, _ = sheet.render().shape
    assert height < 500 and width < 900


def test_names_without_freetype(monkeypatch):
    from PIL import ImageFont

    monkeypatch.setattr(ImageFont, "load_default", lambda size=None: ImageFont.load_default_imagefont())
    test_any_name_and_any_shape("写真.png", (1, 1))


def test_many_pairs_are_counted_not_shown():
    sheet = ContactSheet(cell=(20, 20), max_pairs=2)
    for _ in range(2):
        sheet.add(picture(9, 9), picture(9, 9), "a")
    height = sheet.render().shape[0]
    for _ in range(5):
        sheet.add(picture(9, 9), picture(9, 9), "a")
    assert sheet.render().shape[0] == height


def test_empty_sheet():
    with pytest.raises(InputError, match="at least one"):
        ContactSheet().render()


def test_grid():
    pictures = torch.stack([picture(4, 6, value) for value in (10, 20, 30, 40, 50)])
    sheet = grid(pictures)
    assert sheet.shape == (2 * 4 + GAP, 3 * 6 + 2 * GAP, 3)
    assert sheet[:4, :6].equal(pictures[0]) and sheet[:4, 6 + GAP : 12 + GAP].equal(pictures[1])
    assert sheet[4 + GAP :, :6].equal(pictures[3])
    assert (sheet[4 : 4 + GAP] == 255).all() and (sheet[4 + GAP :, 12 + 2 * GAP :] == 255).all()
    assert grid(pictures[:1]).equal(pictures[0])
    for wrong in (pictures.float(), pictures[0], pictures[:0]):
        with pytest.raises(InputError, match="grid wants"):
            grid(wrong)
