import os
import weakref
from fractions import Fraction

import pytest
import torch

import vitok as package
from vitok.checkpoint import weights_hash
from vitok.cli.chunks import decode_frames, encode_frames, frames_at_once, latent_chunks
from vitok.io import ClipReader, LatentsReader, read_image, read_latents

pytest.importorskip("av")
GAP = 8


def frames_of(path):
    with ClipReader(path) as reader:
        return reader.fps, torch.cat(list(reader.chunks(50)))


@pytest.mark.parametrize("model", ["pictures", "clips"])
@pytest.mark.parametrize("options", [(), ("--size", "32"), ("--dtype", "bfloat16")], ids=["plain", "size", "bfloat16"])
def test_encode_then_decode_is_reconstruct(vitok, files, models, tmp_path, model, options):
    """The same pixels, bit for bit: of a picture in its PNG, of a clip before the video codec, hence after it, too."""
    picture, clip = files.picture(tmp_path / "a.png", 37, 50), files.clip(tmp_path / "b.mp4", 17, 32, 48, fps=12)
    model = ("--model", getattr(models, model))
    both = [option for option in options if option == "--dtype" or option == "bfloat16"]
    for command in ("reconstruct", "encode"):
        assert vitok(command, picture, clip, "--out", tmp_path / command, *model, *options).code == 0
    assert sorted(os.listdir(tmp_path / "encode")) == ["a.safetensors", "b.safetensors"]
    result = vitok("decode", tmp_path / "encode", "--out", tmp_path / "decode", *model, *both)
    assert result.code == 0 and result.out == "2 decoded\n" and result.err == ""
    alone, pair = (read_image(tmp_path / folder / "a.png").pixels for folder in ("decode", "reconstruct"))
    assert torch.equal(alone, pair[:, alone.shape[1] + GAP :])
    fps, frames = frames_of(tmp_path / "decode" / "b.mp4")
    assert fps == 12 and frames.shape == ((17, 32, 32, 3) if "--size" in options else (17, 32, 48, 3))


def test_latents_file(vitok, files, models, tmp_path):
    picture, clip = files.picture(tmp_path / "a.b.png", 37, 50), files.clip(tmp_path / "c.mp4", 9, 32, 48)
    assert vitok("encode", picture, clip, "--out", tmp_path / "o", "--model", models.pictures).code == 0
    model = package.load(models.pictures)
    stored = read_latents(tmp_path / "o" / "a.b.safetensors")
    with torch.no_grad():
        assert torch.equal(stored.latents, model.encode(read_image(picture).pixels[None]).mode())
    assert stored.latents.shape == (1, 32, 3, 4) and stored.size == (37, 50) and stored.fps is None
    assert (stored.model, stored.source) == (str(models.pictures), "a.b.png")
    assert (stored.config_hash, stored.weights_hash) == (model.config.hash(), weights_hash(model))
    of_clip = read_latents(tmp_path / "o" / "c.safetensors")
    assert of_clip.latents.shape == (1, 32, 9, 2, 3) and of_clip.size == (9, 32, 48) and of_clip.fps == Fraction(24)


def test_latents_keep_their_dtype(vitok, files, models, tmp_path):
    picture = files.picture(tmp_path / "a.png")
    vitok("encode", picture, "--out", tmp_path / "o", "--model", models.pictures, "--dtype", "bfloat16")
    assert read_latents(tmp_path / "o" / "a.safetensors").latents.dtype == torch.bfloat16


def test_odd_clip_is_padded_to_even(vitok, files, models, tmp_path):
    """--size gives an odd side; MP4 has even ones only, by repeating the last row and column."""
    clip = files.clip(tmp_path / "a.mp4", 5)
    vitok("encode", clip, "--out", tmp_path / "l", "--size", 31, "--model", models.pictures)
    assert read_latents(tmp_path / "l" / "a.safetensors").size == (5, 31, 31)
    assert vitok("decode", tmp_path / "l", "--out", tmp_path / "o", "--model", models.pictures).code == 0
    assert frames_of(tmp_path / "o" / "a.mp4")[1].shape == (5, 32, 32, 3)


@pytest.mark.parametrize("name, frames", [("pictures", 7), ("pictures", 1), ("clips", 17), ("clips", 16), ("clips", 2)])
def test_a_clip_in_chunks(vitok, files, models, tmp_path, monkeypatch, name, frames):
    """The file holds what encode_frames gives chunk by chunk, and the chunks cut from it decode to what they were."""
    monkeypatch.setattr("vitok.cli.chunks.BATCH_TOKENS", 20)  # three frames of 2 x 3 tokens
    clip = files.clip(tmp_path / "a.mp4", frames, 32, 48)
    model = package.load(getattr(models, name))
    step = frames_at_once(model, 32, 48)
    assert step == (16 if name == "clips" else 3)
    assert vitok("encode", clip, "--out", tmp_path / "o", "--model", getattr(models, name)).code == 0
    stored = read_latents(tmp_path / "o" / "a.safetensors")
    pixels = frames_of(clip)[1]
    with torch.inference_mode():
        chunks = [encode_frames(model, chunk) for chunk in pixels.split(step)]
        assert torch.equal(stored.latents, torch.cat(chunks, 2)) and stored.size == (frames, 32, 48)
        with LatentsReader(tmp_path / "o" / "a.safetensors") as reader:
            pieces = list(latent_chunks(model, reader))
        assert [size[0] for _, size in pieces] == [len(chunk) for chunk in pixels.split(step)]
        for (piece, size), chunk in zip(pieces, chunks, strict=True):
            assert torch.equal(piece, chunk)
            assert decode_frames(model, piece, size).shape == (*size, 3)


@pytest.mark.parametrize("name", ["pictures", "clips"])
def test_a_clip_is_never_held_whole(vitok, files, models, tmp_path, monkeypatch, name):
    """Of the latents of earlier chunks at most the last is still there, and none keeps the memory of others."""
    monkeypatch.setattr("vitok.cli.chunks.BATCH_TOKENS", 60)  # ten frames of 2 x 3 tokens
    made = []

    def watch(latents):
        assert sum(earlier() is not None for earlier in made) <= 1
        assert latents.untyped_storage().nbytes() <= 2 * 4 * latents.numel()  # the mean, beside the log variance
        made.append(weakref.ref(latents))
        return latents

    monkeypatch.setattr("vitok.cli.codec.encode_frames", lambda *a: watch(encode_frames(*a)))
    monkeypatch.setattr("vitok.cli.codec.decode_frames", lambda m, latents, s: decode_frames(m, watch(latents), s))
    files.clip(tmp_path / "a.mp4", 70, 32, 48)
    for command, source, out in (("encode", "a.mp4", "l"), ("decode", "l", "o")):
        result = vitok(command, tmp_path / source, "--out", tmp_path / out, "--model", getattr(models, name))
        assert result.code == 0, result.err
        assert len(made) == {"pictures": 7, "clips": 5}[name]
        made.clear()
    assert len(frames_of(tmp_path / "o" / "a.mp4")[1]) == 70


def test_equal_names_do_not_overwrite_each_other(vitok, files, models, tmp_path):
    for name in ("x/cat.png", "x/cat.jpg", "y/cat.png"):
        files.picture(tmp_path / name)
    assert (
        vitok("encode", tmp_path / "x", tmp_path / "y", "--out", tmp_path / "o", "--model", models.pictures).code == 0
    )
    assert len(os.listdir(tmp_path / "o")) == 3


def test_latents_may_lie_beside_their_pictures(vitok, files, models, tmp_path):
    picture = files.picture(tmp_path / "a.jpg")
    for command, done in (("encode", "encoded"), ("decode", "decoded")):
        assert vitok(command, tmp_path, "--out", tmp_path, "--model", models.pictures).out == f"1 {done}\n"
    assert sorted(os.listdir(tmp_path)) == ["a.jpg", "a.png", "a.safetensors"] and files.size(picture) == (56, 40)
