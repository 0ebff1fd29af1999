import dataclasses
import os
from fractions import Fraction

import pytest
import torch
from safetensors.torch import save_file

from vitok.errors import InputError
from vitok.io import Latents, read_latents, write_latents

PICTURE = Latents(torch.randn(1, 4, 3, 5), size=(37, 79), model="S-B/16", config_hash="ab" * 8, weights_hash="12" * 8, source="photo.jpg")
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


def test_views_and_undecodable_names_are_written(tmp_path):
    turned = dataclasses.replace(PICTURE, latents=PICTURE.latents.transpose(2, 3), source=os.fsdecode(b"\xff.jpg"))
    write_latents(tmp_path / "a.safetensors", turned)
    read = read_latents(tmp_path / "a.safetensors")
    assert torch.equal(read.latents, turned.latents) and read.source == "?.jpg"


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


GOOD = {"format": "vitok-latents", "version": "1", "model": "m", "config_hash": "h", "weights_hash": "w", "size": "37x79"}


@pytest.mark.parametrize(
    "metadata, words",
    [
        (None, "holds no vitok latents"),
        (GOOD | {"format": "pt"}, "holds no vitok latents"),
        (GOOD | {"version": "2"}, "latents format 2"),
        ({k: v for k, v in GOOD.items() if k != "config_hash"}, "metadata.*config_hash"),
        (GOOD | {"size": "37xwide"}, "broken metadata"),
        (GOOD | {"size": "17x37x79"}, "original size"),
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
    save_file({"latents": torch.zeros(4, 3, 5)}, path, metadata=GOOD)
    with pytest.raises(InputError, match=r"a\.safetensors: latents must be"):
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
