"""Pictures that are merely unusual go through, with a note in the table."""

import json

import numpy as np
import pytest
from PIL import Image

GAP = 8


def rgb(height=40, width=56):
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 20, (height, width))
    return Image.fromarray(np.stack((30 + y % 150, x % 200, 50 + noise), -1).astype(np.uint8))


def grey(path):
    rgb().convert("L").save(path.with_suffix(".png"))


def cmyk(path):
    rgb().convert("CMYK").save(path.with_suffix(".jpg"))


def sixteen_bit(path):
    Image.fromarray(np.linspace(0, 65535, 40 * 56).astype(np.uint16).reshape(40, 56)).save(path.with_suffix(".png"))


def palette(path):
    rgb().convert("P", palette=Image.Palette.ADAPTIVE).save(path.with_suffix(".png"))


def alpha(path):
    picture = rgb()
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    picture.save(path.with_suffix(".png"))


def rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb(56, 40).save(path.with_suffix(".jpg"), exif=exif)


def animated(path):
    first, second = rgb(), rgb().transpose(Image.Transpose.ROTATE_180)
    first.save(path.with_suffix(".gif"), save_all=True, append_images=[second, first])


def one_by_one(path):
    rgb(1, 1).save(path.with_suffix(".png"))


def one_by_4000(path):
    rgb(4000, 1).save(path.with_suffix(".png"))


def wide_4000_by_one(path):
    rgb(1, 4000).save(path.with_suffix(".png"))


CASES = {
    grey: ("grey", 56, 40),
    cmyk: ("CMYK", 56, 40),
    sixteen_bit: ("16-bit grey", 56, 40),
    palette: ("palette", 56, 40),
    alpha: ("transparency laid onto white", 56, 40),
    rotated: ("turned upright by its EXIF orientation", 56, 40),
    animated: ("first of 3 frames", 56, 40),
    one_by_one: ("", 1, 1),
    one_by_4000: ("", 1, 4000),
    wide_4000_by_one: ("", 4000, 1),
}


@pytest.fixture
def folder(tmp_path):
    for make in CASES:
        (tmp_path / "in").mkdir(exist_ok=True)
        make(tmp_path / "in" / make.__name__)
    return tmp_path / "in"


@pytest.mark.parametrize("size", [None, 48])
def test_reconstruct(vitok, files, models, tmp_path, folder, size):
    out = tmp_path / "out"
    result = vitok("reconstruct", folder, "--out", out, "--model", models.pictures, *(("--size", size) if size else ()))
    assert result.code == 0 and result.err == "", result
    assert result.out.splitlines()[-1] == f"{len(CASES)} reconstructed"
    rows = {row["input"].split(".")[0]: row for row in json.loads((out / "metrics.json").read_text())["results"]}
    for make, (note, width, height) in CASES.items():
        row = rows[make.__name__]
        width, height = (size, size) if size else (width, height)
        assert note in row["note"] and bool(note) == bool(row["note"]), make.__name__
        assert (row["width"], row["height"]) == (width, height), make.__name__
        assert files.size(out / row["output"]) == (2 * width + GAP, height), make.__name__
        line = next(line for line in result.out.splitlines() if line.startswith(row["input"]))
        assert row["note"] in line and f"{width}x{height}" in line


@pytest.mark.parametrize("size", [None, 48])
def test_encode_then_decode(vitok, files, models, tmp_path, folder, size):
    options = ("--model", models.pictures)
    result = vitok("encode", folder, "--out", tmp_path / "l", *options, *(("--size", size) if size else ()))
    assert result.code == 0 and result.err == "" and result.out == f"{len(CASES)} encoded\n"
    assert vitok("decode", tmp_path / "l", "--out", tmp_path / "o", *options).code == 0
    for make, (_, width, height) in CASES.items():
        assert files.size(tmp_path / "o" / f"{make.__name__}.png") == ((size, size) if size else (width, height))
