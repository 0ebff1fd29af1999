import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitok.errors import InputError
from vitok.io import read_image, resize_and_crop, write_image
from vitok.io.images import decode_image


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def png(width, height, depth, colour, rows, *chunks):
    """A PNG made by hand, for what Pillow reads but does not write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*c) for c in chunks) + data + chunk(b"IEND", b"")


def refused(path, words, **options):
    with pytest.raises(InputError, match=words) as error:
        read_image(path, **options)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_plain_rgb_is_exact(tmp_path):
    pixels = noise(37, 211)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png")
    assert read.note == "" and read.pixels.dtype == torch.uint8
    assert np.array_equal(read.pixels.numpy(), pixels)


@pytest.mark.parametrize("mode, note", [("L", "grey"), ("1", "bilevel"), ("P", "palette")])
def test_modes_that_become_rgb(tmp_path, mode, note):
    image = Image.fromarray(noise(9, 7)).convert(mode)
    image.save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png")
    assert read.note == note
    assert np.array_equal(read.pixels.numpy(), np.asarray(image.convert("RGB")))


def test_cmyk_jpeg(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    read = read_image(tmp_path / "a.jpg")
    assert read.note == "CMYK"
    assert (read.pixels.int() - torch.tensor([255, 0, 0])).abs().max() <= 3


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(levels * 257).save(tmp_path / f"a.{suffix}")
    read = read_image(tmp_path / f"a.{suffix}")
    assert read.note == "16-bit grey"
    assert np.array_equal(read.pixels.numpy(), np.repeat(levels.astype(np.uint8)[:, :, None], 3, axis=2))


def test_16_bit_rgb_and_alpha(tmp_path):
    levels = noise(4, 5).astype(np.uint16)
    rows = [row.tobytes() for row in (levels * 257).astype(">u2")]
    (tmp_path / "rgb.png").write_bytes(png(5, 4, 16, 2, rows))
    assert np.array_equal(read_image(tmp_path / "rgb.png").pixels.numpy(), levels)
    clear = np.dstack((levels * 257, np.zeros((4, 5), np.uint16))).astype(">u2")
    (tmp_path / "rgba.png").write_bytes(png(5, 4, 16, 6, [row.tobytes() for row in clear]))
    assert (read_image(tmp_path / "rgba.png").pixels == 255).all()
    grey = np.array([[0, 30000, 65535]], dtype=">u2")
    (tmp_path / "key.png").write_bytes(png(3, 1, 16, 0, [grey.tobytes()], (b"tRNS", struct.pack(">H", 30000))))
    assert read_image(tmp_path / "key.png").pixels[0, :, 0].tolist() == [0, 255, 255]


def test_pixels_without_a_range_are_refused(tmp_path):
    Image.fromarray(np.array([[0.0, np.nan]], dtype=np.float32)).save(tmp_path / "f.tif")
    refused(tmp_path / "f.tif", "floating-point")
    Image.fromarray(np.array([[0, 70000]], dtype=np.int32)).save(tmp_path / "i.tif")
    refused(tmp_path / "i.tif", "32-bit")


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_goes_onto_white(tmp_path, mode):
    image = Image.new(mode, (3, 1), 0)
    bands = len(image.getbands())
    for x, alpha in enumerate((0, 128, 255)):
        image.putpixel((x, 0), (0,) * (bands - 1) + (alpha,))
    image.save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png")
    assert read.note == "transparency laid onto white"
    assert read.pixels[0].tolist() == [[255] * 3, [127] * 3, [0] * 3]


def test_opaque_alpha_changes_nothing(tmp_path):
    pixels = noise(4, 4)
    Image.fromarray(np.dstack((pixels, np.full((4, 4), 255, np.uint8)))).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png")
    assert read.note == "" and np.array_equal(read.pixels.numpy(), pixels)


def test_palette_with_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=0)
    assert read_image(tmp_path / "a.png").pixels[0].tolist() == [[255, 255, 255], [40, 50, 60]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_exif_orientation(tmp_path, orientation, suffix):
    upright = noise(5, 8)
    # How the stored picture must lie so that a viewer obeying the orientation shows `upright` (EXIF 2.3, tag 274:
    # which side of the scene the stored first row and first column are).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright[:, ::-1].transpose(1, 0, 2),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: upright[::-1].transpose(1, 0, 2),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"a.{suffix}", exif=exif)
    read = read_image(tmp_path / f"a.{suffix}")
    assert np.array_equal(read.pixels.numpy(), upright)
    if suffix == "png":
        assert ("EXIF" in read.note) == (orientation > 1)


def test_broken_exif_does_not_cost_the_picture(tmp_path):
    Image.fromarray(noise(4, 4)).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read_image(tmp_path / "a.jpg").pixels.shape == (4, 4, 3)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_animation_gives_its_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    read = read_image(tmp_path / f"a.{suffix}")
    assert "first of 3 frames" in read.note
    assert read.pixels[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("height, width", [(1, 1), (1, 4000), (4000, 1)])
def test_tiny_and_thin(tmp_path, height, width):
    pixels = noise(height, width)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png").pixels.numpy(), pixels)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated(tmp_path, name):
    whole = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(whole, name)
    path = tmp_path / "a.img"
    path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    refused(path, "damaged or truncated")


def test_files_that_are_no_pictures(tmp_path):
    (tmp_path / "text.jpg").write_text("dear diary")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "ghost.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    refused(tmp_path / "text.jpg", "not a picture")
    refused(tmp_path / "ghost.jpg", "not a picture")  # never handed to Ghostscript
    refused(tmp_path / "empty.jpg", "empty")
    refused(tmp_path / "none.jpg", "does not exist")
    refused(tmp_path, "is a folder")


@pytest.mark.parametrize("side", [10_500, 12_000, 60_000])  # Pillow keeps silent about, warns of and refuses these
def test_decompression_bomb(tmp_path, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(side, side, 8, 2, [b"\0" * 10]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(path, "limit of 100 megapixels")


def test_content_decodes_as_its_file(tmp_path):
    Image.fromarray(noise(20, 30)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert torch.equal(decode_image(data, "shard/a.png").pixels, read_image(tmp_path / "a.png").pixels)
    for content, limit, words in (
        (data[:200], 10**6, "damaged or truncated"), (b"words", 10**6, "not a picture"), (data, 599, "30 x 20 pixels"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"shard/a.png .*{words}") as error:
            decode_image(content, "shard/a.png", limit)
        assert "BytesIO" not in str(error.value)


def test_limit_can_be_set(tmp_path):
    Image.fromarray(noise(10, 10)).save(tmp_path / "a.png")
    refused(tmp_path / "a.png", "10 x 10 pixels, more than the limit of 9.9e-05 megapixels", max_pixels=99)
    assert read_image(tmp_path / "a.png", max_pixels=100).pixels.shape == (10, 10, 3)


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 60), width=st.integers(1, 60))
def test_png_round_trip_of_any_size(tmp_path_factory, height, width):
    path = tmp_path_factory.mktemp("round") / "a.png"
    pixels = torch.from_numpy(noise(height, width))
    write_image(path, pixels)
    assert torch.equal(read_image(path).pixels, pixels)


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_lossy_formats_are_close(tmp_path, suffix):
    y, x = torch.meshgrid(torch.arange(64), torch.arange(80), indexing="ij")
    pixels = torch.stack((y * 3, x * 3, y + x), dim=-1).to(torch.uint8)
    write_image(tmp_path / f"a.{suffix}", pixels)
    with Image.open(tmp_path / f"a.{suffix}") as image:
        assert image.format == {"jpg": "JPEG", "webp": "WEBP"}[suffix]
    difference = (read_image(tmp_path / f"a.{suffix}").pixels.int() - pixels.int()).abs()
    assert difference.float().mean() < 2


def test_write_image_refuses(tmp_path):
    good = torch.zeros(2, 2, 3, dtype=torch.uint8)
    for name, pixels, words in (
        ("a.xyz", good, "suffix"),
        ("a.png", good.float(), "uint8"),
        ("a.png", good[..., :1], r"\[2, 2, 1\]"),
        ("a.png", good[:0], r"\[0, 2, 3\]"),
        ("a.webp", torch.zeros(1, 20_000, 3, dtype=torch.uint8), "cannot write"),
    ):
        with pytest.raises(InputError, match=words):
            write_image(tmp_path / name, pixels)
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=40, deadline=None)
@given(height=st.integers(16, 120), width=st.integers(16, 120), size=st.integers(1, 96))
def test_resize_and_crop_is_the_protocol(height, width, size):
    pixels = noise(height, width, seed=height * 1000 + width)
    short = min(height, width)
    scaled = round(width * size / short), round(height * size / short)
    left, top = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    expected = Image.fromarray(pixels).resize(scaled, Image.Resampling.BICUBIC)
    expected = expected.crop((left, top, left + size, top + size))
    assert np.array_equal(resize_and_crop(torch.from_numpy(pixels), size).numpy(), np.asarray(expected))


@pytest.mark.parametrize("height, width, size", [(3, 400, 17), (400, 3, 64), (20, 2001, 7), (1, 101, 8)])
def test_long_pictures_agree_with_the_two_steps(height, width, size):
    pixels = noise(height, width)
    short = min(height, width)
    scaled = round(width * size / short), round(height * size / short)
    left, top = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    expected = Image.fromarray(pixels).resize(scaled, Image.Resampling.BICUBIC)
    expected = np.asarray(expected.crop((left, top, left + size, top + size))).astype(int)
    assert np.abs(resize_and_crop(torch.from_numpy(pixels), size).numpy() - expected).max() <= 1


def test_resize_and_crop_of_extremes_and_clips():
    for shape in ((1, 4000), (4000, 1), (1, 5_000_000), (1, 1)):
        assert resize_and_crop(torch.zeros(*shape, 3, dtype=torch.uint8), 256).shape == (256, 256, 3)
    clip = torch.from_numpy(np.stack([noise(30, 40, seed=s) for s in range(3)]))
    done = resize_and_crop(clip, 20)
    assert done.shape == (3, 20, 20, 3)
    assert torch.equal(done[2], resize_and_crop(clip[2], 20))


def test_resize_and_crop_refuses():
    pixels = torch.zeros(4, 4, 3, dtype=torch.uint8)
    for size in (0, -1, 10**6, 2.5):
        with pytest.raises(InputError, match="size must be"):
            resize_and_crop(pixels, size)
    with pytest.raises(InputError, match="uint8"):
        resize_and_crop(pixels.float(), 4)
