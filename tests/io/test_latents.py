import dataclasses
import errno
import os
import sys
import weakref
from fractions import Fraction

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vitok.errors import InputError
from vitok.io import Latents, LatentsReader, LatentsWriter, read_latents, write_latents

PICTURE = Latents(
    torch.randn(1, 4, 3, 5),
    size=(37, 79),
    model="S-B/16",
    config_hash="ab" * 8,
    weights_hash="12" * 8,
    source="photo.jpg",
)
CLIP = Latents(
    torch.randn(1, 4, 5, 2, 3).bfloat16(),
    size=(17, 20, 40),
    model="S-B/4x8",
    config_hash="cd" * 8,
    weights_hash="34" * 8,
    fps=Fraction(30000, 1001),
)


@pytest.mark.parametrize("latents", [PICTURE, CLIP], ids=["picture", "clip"])
def test_round_trip(tmp_path, latents):
    path = tmp_path / "a.safetensors"
    write_latents(path, latents)
    read = read_latents(path, config_hash=latents.config_hash, weights_hash=latents.weights_hash)
    assert torch.equal(read.latents, latents.latents) and read.latents.dtype == latents.latents.dtype
    for field in dataclasses.fields(Latents)[1:]:
        assert getattr(read, field.name) == getattr(latents, field.name), field.name


@pytest.mark.parametrize("latents", [PICTURE, CLIP], ids=["picture", "clip"])
def test_any_safetensors_reader_will_do(tmp_path, latents):
    """One tensor [t, c, h, w] and strings, its data on a multiple of 8 bytes as safetensors itself would put it."""
    path = tmp_path / "a.safetensors"
    write_latents(path, latents)
    stored = load_file(path)
    steps = latents.latents if latents is CLIP else latents.latents.unsqueeze(2)
    assert list(stored) == ["latents"] and torch.equal(stored["latents"], steps[0].transpose(0, 1))
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    with safe_open(path, "pt") as file:
        assert file.metadata()["size"] == ("17x20x40" if latents is CLIP else "37x79")


def writer_of_clip(path, **changes):
    about = {"model": "m", "config_hash": "c", "weights_hash": "w", "fps": Fraction(24), "clip": True}
    return LatentsWriter(path, (20, 40), **(about | changes))


def test_in_chunks(tmp_path):
    """Chunks of any length make up the clip; neither end keeps one, and until the end there is no file by any name."""
    path, chunks = tmp_path / "new" / "a.safetensors", [torch.randn(1, 4, t, 2, 3) for t in (2, 1, 4, 3)]
    with writer_of_clip(path) as writer:
        for i, chunk in enumerate(chunks):
            passing = chunk.clone()
            gone = weakref.ref(passing)
            writer.write(passing, 4 * chunk.shape[2] - i // 3)  # the last step is short of a frame
            del passing
            assert gone() is None
        if sys.platform != "win32":  # which has no nameless files
            assert os.listdir(path.parent) == []
    assert os.listdir(path.parent) == ["a.safetensors"]
    whole = torch.cat(chunks, 2)
    with LatentsReader(path) as reader:
        assert (reader.steps, reader.size, reader.fps) == (10, (39, 20, 40), 24)
        assert (reader.model, reader.config_hash, reader.weights_hash, reader.source) == ("m", "c", "w", "")
        for steps in (1, 3, 5, 99):
            pieces = list(reader.chunks(steps))
            assert all(torch.equal(a, b) for a, b in zip(pieces, whole.split(steps, 2), strict=True))
            assert all(piece.untyped_storage().nbytes() == 4 * piece.numel() for piece in pieces)
    assert torch.equal(read_latents(path).latents, whole)


@pytest.mark.parametrize(
    "second, words",
    [
        (torch.zeros(1, 4, 2, 2, 4), r"\[4, 2, 4\] .* after .*\[4, 2, 3\]"),
        (torch.zeros(1, 4, 2, 2, 3).half(), "float16 .* after .*float32"),
        (torch.zeros(1, 4, 2, 3), r"\[1, c, t, h, w\], not \[1, 4, 2, 3\]"),
        (torch.zeros(2, 4, 2, 2, 3), r"not \[2, 4, 2, 2, 3\]"),
        (torch.full((1, 4, 2, 2, 3), float("inf")), "infinite"),
    ],
)
def test_chunks_that_do_not_belong_together(tmp_path, second, words):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"before")
    with pytest.raises(InputError, match=words), writer_of_clip(path) as writer:
        writer.write(torch.zeros(1, 4, 2, 2, 3), 2)
        writer.write(second, 2)
    assert os.listdir(tmp_path) == ["a.safetensors"] and path.read_bytes() == b"before"


def test_nothing_or_too_much_was_written(tmp_path):
    with pytest.raises(InputError, match="no latents came"), writer_of_clip(tmp_path / "a.safetensors"):
        pass
    with (
        pytest.raises(InputError, match=r"original size of latents of 2 time steps cannot be \(20, 40\)"),
        writer_of_clip(tmp_path / "a.safetensors", clip=False, fps=None) as writer,
    ):
        writer.write(torch.zeros(1, 4, 2, 2, 3), 2)
    assert os.listdir(tmp_path) == []


def test_damaged_in_the_middle(tmp_path):
    path = tmp_path / "a.safetensors"
    stored = torch.zeros(5, 4, 3, 5)
    stored[3, 1, 2, 0] = float("nan")
    save_file({"latents": stored}, path, metadata=GOOD | {"size": "5x37x79"})
    with LatentsReader(path) as reader:
        chunks = reader.chunks(3)
        assert next(chunks).shape == (1, 4, 3, 3, 5)
        with pytest.raises(InputError, match=r"a\.safetensors: .*NaN"):
            next(chunks)
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(InputError, match=r"a\.safetensors .* truncated: it became shorter"):
            list(reader.chunks(5))


def test_views_and_undecodable_names_are_written(tmp_path):
    turned = dataclasses.replace(PICTURE, latents=PICTURE.latents.transpose(2, 3), source=os.fsdecode(b"\xff.jpg"))
    write_latents(tmp_path / "a.safetensors", turned)
    read = read_latents(tmp_path / "a.safetensors")
    assert torch.equal(read.latents, turned.latents) and read.source == "?.jpg"


def test_latents_of_one_token_are_written_as_encoders_stride_them(tmp_path):
    one = torch.randn(1, 1, 64).transpose(1, 2).unflatten(-1, (1, 1))  # [1, 64, 1, 1], last stride 64
    write_latents(tmp_path / "a.safetensors", dataclasses.replace(PICTURE, latents=one))
    assert torch.equal(read_latents(tmp_path / "a.safetensors").latents, one)


def test_latents_of_another_model(tmp_path):
    write_latents(tmp_path / "a.safetensors", PICTURE)
    with pytest.raises(
        InputError, match=r"a\.safetensors was encoded by S-B/16 .*cannot be decoded by demo \(config ef"
    ):
        read_latents(tmp_path / "a.safetensors", model="demo", config_hash="ef" * 16)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"latents": torch.zeros(4, 3, 5)}, r"\[4, 3, 5\]"),
        ({"latents": torch.zeros(2, 4, 3, 5)}, r"\[2, 4, 3, 5\]"),
        ({"latents": torch.zeros(1, 4, 1, 3, 5)}, r"\[1, 4, 1, 3, 5\] with \(37, 79\)"),
        ({"latents": torch.zeros(1, 4, 3, 5, dtype=torch.int32)}, "int32"),
        ({"latents": torch.full((1, 4, 3, 5), float("nan"))}, "NaN"),
        ({"latents": torch.zeros(1, 4, 0, 5)}, "0"),
        ({"size": (17, 37, 79)}, r"\(H, W\)"),
        ({"size": (0, 79)}, "size"),
        ({"size": (10**6, 10**6)}, "100 megapixels"),
        ({"fps": Fraction(0)}, "positive"),
    ],
)
def test_latents_that_make_no_sense(change, words):
    with pytest.raises(InputError, match=words):
        dataclasses.replace(PICTURE, **change)


GOOD = {
    "format": "vitok-latents",
    "version": "1",
    "model": "m",
    "config_hash": "h",
    "weights_hash": "w",
    "size": "37x79",
}


@pytest.mark.parametrize(
    "metadata, words",
    [
        (None, "holds no vitok latents"),
        (GOOD | {"format": "pt"}, "holds no vitok latents"),
        (GOOD | {"version": "2"}, "latents format 2"),
        ({k: v for k, v in GOOD.items() if k != "config_hash"}, "metadata.*config_hash"),
        (GOOD | {"size": "37xwide"}, "broken metadata"),
        (GOOD | {"size": "0x79"}, "original size"),
        (GOOD | {"size": "37x79x3x3"}, "original size"),
        (GOOD | {"fps": "1/0"}, "broken metadata"),
        ({k: v for k, v in GOOD.items() if k != "weights_hash"}, "metadata.*weights_hash"),
    ],
)
def test_bad_metadata(tmp_path, metadata, words):
    path = tmp_path / "a.safetensors"
    save_file({"latents": torch.zeros(1, 4, 3, 5)}, path, metadata=metadata)
    with pytest.raises(InputError, match=words) as error:
        read_latents(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_wrong_tensors(tmp_path):
    path = tmp_path / "a.safetensors"
    for tensors in ({"other": torch.zeros(1)}, {"latents": torch.zeros(1, 4, 3, 5), "more": torch.zeros(1)}):
        save_file(tensors, path, metadata=GOOD)
        with pytest.raises(InputError, match="no vitok latents"):
            read_latents(path)
    for latents, words in (
        (torch.zeros(4, 3, 5), "latents must be"),
        (torch.zeros(1, 4, 3, 5, dtype=torch.int32), "not I32"),
        (torch.zeros(2, 4, 3, 5), "original size of latents of 2 time steps"),
    ):
        save_file({"latents": latents}, path, metadata=GOOD)
        with pytest.raises(InputError, match=rf"a\.safetensors: .*{words}"):
            read_latents(path)


def test_damaged_files(tmp_path):
    write_latents(tmp_path / "whole.safetensors", PICTURE)
    whole = (tmp_path / "whole.safetensors").read_bytes()
    for name, content in (
        ("half.safetensors", whole[: len(whole) // 2]),
        ("header.safetensors", whole[:20]),
        ("text.safetensors", b"hello, this is text"),
        ("lie.safetensors", b"\xff" * 8 + whole[8:]),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="truncated") as error:
            read_latents(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="does not exist"):
        read_latents(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="folder"):
        read_latents(tmp_path)


def test_unwritable(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        write_latents(tmp_path / "file" / "a.safetensors", PICTURE)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk(tmp_path, monkeypatch):
    """While the chunks come, and when the file is put together: a sentence, and nothing left."""
    device = os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb")
    monkeypatch.setattr("vitok.io.latents.tempfile.TemporaryFile", lambda dir: device)
    with pytest.raises(InputError, match=r"cannot write .*a\.safetensors: No space left"):
        write_latents(tmp_path / "a.safetensors", PICTURE)
    assert device.closed
    monkeypatch.undo()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("vitok.io.latents.shutil.copyfileobj", full)
    with pytest.raises(InputError, match=r"cannot write .*a\.safetensors: No space left"):
        write_latents(tmp_path / "a.safetensors", PICTURE)
    assert os.listdir(tmp_path) == []
