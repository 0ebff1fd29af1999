"""Every line of bad input through the command: one sentence, exit code 2, the other inputs done, failures counted."""

import json
import os
import re
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import vitok as package

av = pytest.importorskip("av")


def only_error(result, words):
    """The command failed with one sentence on standard error that matches `words`."""
    assert result.code == 2, result
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    assert re.search(words, lines[0]), lines[0]


def missing(folder, _):
    return folder / "nowhere.jpg", "does not exist"


def truncated_picture(folder, _):
    path = folder / "cut.jpg"
    Image.effect_noise((200, 200), 60).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:2000])
    return path, "damaged or truncated"


def truncated_clip(folder, files):
    path = files.clip(folder / "cut.mp4")
    path.write_bytes(path.read_bytes()[:-200])
    return path, "truncated"


def text_named_jpg(folder, _):
    (folder / "notes.jpg").write_text("just words")
    return folder / "notes.jpg", "not a picture"


def text_named_mp4(folder, _):
    (folder / "notes.mp4").write_text("just words")
    return folder / "notes.mp4", "not a video"


def text(folder, _):
    (folder / "notes.txt").write_text("just words")
    return folder / "notes.txt", "is not a picture or a clip"


def empty_file(folder, _):
    (folder / "empty.png").touch()
    return folder / "empty.png", "empty"


def empty_folder(folder, _):
    (folder / "empty").mkdir()
    return folder / "empty", "holds no pictures or clips"


def zero_frame_video(folder, _):
    with av.open(str(folder / "none.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    return folder / "none.avi", "no video"


def clip_that_fails_half_way(folder, _):
    """Two MPEG-1 streams of different sizes in one file: frames come, are written, and then no more can."""
    parts = []
    for width in (48, 64):
        with av.open(str(folder / "part.mpg"), "w", format="mpeg1video") as container:
            stream = container.add_stream("mpeg1video", rate=24)
            stream.width, stream.height, stream.pix_fmt = width, 32, "yuv420p"
            for _frame in range(12):
                container.mux(stream.encode(av.VideoFrame(width, 32, "yuv420p")))
            container.mux(stream.encode(None))
        parts.append((folder / "part.mpg").read_bytes())
    (folder / "part.mpg").unlink()
    (folder / "changing.mpg").write_bytes(b"".join(parts))
    return folder / "changing.mpg", "changes its frame size"


def decompression_bomb(folder, _):
    """A PNG of a few bytes whose header promises 20000 x 20000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    (folder / "bomb.png").write_bytes(data)
    return folder / "bomb.png", "limit of 100 megapixels"


def float_picture(folder, _):
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(folder / "float.tif")
    return folder / "float.tif", "floating-point"


def latents_file(folder, _):
    save_file({"x": torch.zeros(1)}, folder / "x.safetensors")
    return folder / "x.safetensors", "is not a picture or a clip"


def named_pipe(folder, _):
    os.mkfifo(folder / "pipe.jpg")
    return folder / "pipe.jpg", "not a regular file"


BAD = [
    missing, truncated_picture, truncated_clip, text_named_jpg, text_named_mp4, text, empty_file, empty_folder,
    zero_frame_video, clip_that_fails_half_way, decompression_bomb, float_picture, latents_file, named_pipe,
]  # fmt: skip


@pytest.mark.parametrize("command, done", [("reconstruct", "reconstructed"), ("encode", "encoded")])
@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_bad_file_among_good_ones(vitok, files, models, tmp_path, make, command, done):
    first, last = files.picture(tmp_path / "first.png"), files.picture(tmp_path / "last.png")
    bad, words = make(tmp_path, files)
    out = tmp_path / "out"
    result = vitok(command, first, bad, last, "--out", out, "--model", models.pictures)
    only_error(result, words)
    assert str(bad) in result.err
    assert result.out.splitlines()[-1] == f"2 of 3 {done}, 1 failed"
    suffix = ".png" if command == "reconstruct" else ".safetensors"
    assert {f"first{suffix}", f"last{suffix}"} <= set(os.listdir(out))
    assert not [name for name in os.listdir(out) if name.startswith((".", bad.stem))]


def test_nothing_good_at_all(vitok, files, models, tmp_path):
    result = vitok(
        "reconstruct", tmp_path / "a.jpg", tmp_path / "b.jpg", "--out", tmp_path / "o", "--model", models.pictures
    )
    assert result.code == 2 and result.out == "0 of 2 reconstructed, 2 failed\n"
    assert len(result.err.splitlines()) == 2 and os.listdir(tmp_path / "o") == []


def test_strange_file_names(vitok, files, models, tmp_path):
    """Line breaks and terminal commands in a name stay out of the one-line message; brackets are no markup."""
    names = ["two\nlines.jpg", "esc\x1b[2J.jpg", "[bold]x[/y].jpg"]
    if sys.platform == "linux":
        names.append(os.fsdecode(b"latin\xe9.jpg"))
    good = [files.picture(tmp_path / "in" / name).name for name in names]
    bad = [tmp_path / f"absent-{name}" for name in names]
    result = vitok("reconstruct", tmp_path / "in", *bad, "--out", tmp_path / "o", "--model", models.pictures)
    assert result.code == 2 and len(result.err.splitlines()) == len(bad)
    assert result.out.splitlines()[-1] == f"{len(good)} of {2 * len(good)} reconstructed, {len(bad)} failed"
    assert "\x1b" not in result.out + result.err and "[bold]x[/y].jpg" in result.out


def test_unexpected_error_costs_one_input(vitok, files, models, tmp_path, monkeypatch):
    def broken(path):
        raise (KeyError("pixels\nlost") if path.stem == "a" else MemoryError) if path.stem != "c" else StopIteration

    monkeypatch.setattr("vitok.cli.media.read_image", broken)
    paths = [files.picture(tmp_path / f"{name}.png") for name in "abc"]
    result = vitok("encode", *paths, "--out", tmp_path / "o", "--model", models.pictures)
    assert result.code == 2 and result.out == "0 of 3 encoded, 3 failed\n"
    a, b, c = result.err.splitlines()
    assert a.startswith(f"error: {paths[0]}: KeyError: ") and "VITOK_TRACEBACK=1" in a
    assert str(paths[1]) in b and "not enough memory" in b
    assert str(paths[2]) in c
    monkeypatch.setenv("VITOK_TRACEBACK", "1")
    with pytest.raises(KeyError):
        vitok("encode", paths[0], "--out", tmp_path / "o", "--model", models.pictures)


# --- outputs


@pytest.mark.parametrize("command", ["reconstruct", "encode", "decode"])
@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_where_the_output_folder_should_be(vitok, files, models, tmp_path, command, below):
    (tmp_path / "file").touch()
    result = vitok(
        command, files.picture(tmp_path / "a.png"), "--out", tmp_path / "file" / below, "--model", models.pictures
    )
    only_error(result, "cannot write to --out .*file where a folder should be")
    assert result.out == ""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_output_folder_without_permission(vitok, files, models, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    picture = files.picture(tmp_path / "a.png")
    for out in (tmp_path / "locked", tmp_path / "locked" / "deeper"):
        only_error(vitok("reconstruct", picture, "--out", out, "--model", models.pictures), "cannot write to --out")


def test_a_folder_where_one_output_should_be(vitok, files, models, tmp_path):
    first, last = files.picture(tmp_path / "first.png"), files.picture(tmp_path / "last.png")
    (tmp_path / "o" / "first.png").mkdir(parents=True)
    result = vitok("reconstruct", first, last, "--out", tmp_path / "o", "--model", models.pictures)
    only_error(result, "cannot write .*first.png")
    assert (tmp_path / "o" / "last.png").is_file()


def test_inputs_are_never_overwritten(vitok, files, models, tmp_path):
    picture = files.picture(tmp_path / "cat.png")
    other = files.picture(tmp_path / "elsewhere" / "dog.png")
    before = picture.read_bytes()
    result = vitok("reconstruct", picture, other, "--out", tmp_path, "--model", models.pictures)
    only_error(result, "cat.png would be overwritten")
    assert picture.read_bytes() == before and (tmp_path / "dog.png").is_file()
    only_error(vitok("reconstruct", tmp_path, "--out", tmp_path, "--model", models.pictures), "is also an input")
    sheet = tmp_path / "contact_sheet.png"
    before = sheet.read_bytes()
    only_error(vitok("reconstruct", sheet, "--out", tmp_path, "--model", models.pictures), "would be overwritten")
    assert sheet.read_bytes() == before


# --- latents


@pytest.mark.parametrize("other", ["retrained", "wider"])
def test_latents_of_another_model(vitok, files, models, tmp_path, other):
    pictures = [files.picture(tmp_path / "a.png"), files.picture(tmp_path / "b.png")]
    vitok("encode", pictures[0], "--out", tmp_path / "latents", "--model", models.pictures)
    vitok("encode", pictures[1], "--out", tmp_path / "latents", "--model", getattr(models, other))
    result = vitok("decode", tmp_path / "latents", "--out", tmp_path / "o", "--model", getattr(models, other))
    only_error(result, f"a.safetensors was encoded by .*pictures .* cannot be decoded by .*{other}")
    assert result.out == "1 of 2 decoded, 1 failed\n" and os.listdir(tmp_path / "o") == ["b.png"]


def change(path, tensor=lambda t: t, **metadata):
    """Rewrite a latents file with other contents."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about, latents = file.metadata() | metadata, file.get_tensor("latents").clone()
    save_file({"latents": tensor(latents).contiguous()}, path, metadata=about)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), "truncated"),
        (lambda path: path.write_text("just words"), "not a safetensors file"),
        (lambda path: path.unlink(), "does not exist"),
        (lambda path: save_file({"weight": torch.zeros(3)}, path), "no vitok latents"),
        (lambda path: change(path, lambda t: t * float("nan")), "NaN"),
        (lambda path: change(path, size="4x500x500"), "1 time steps do not belong to 4 frames"),
        (lambda path: change(path, size="500x500"), "does not fit"),
        (lambda path: change(path, lambda t: t[:, :5]), "must be floating point"),
        (lambda path: change(path, lambda t: t.expand(2, *t.shape[1:])), "2 time steps cannot be"),
        (lambda path: change(path, size="so big"), "metadata"),
    ],
    ids=["truncated", "text", "missing", "other", "nan", "clip-size", "size", "channels", "steps", "metadata"],
)
def test_bad_latents_among_good_ones(vitok, files, models, tmp_path, damage, words):
    folder = tmp_path / "latents"
    vitok(
        "encode",
        files.picture(tmp_path / "a.png"),
        files.picture(tmp_path / "b.png"),
        "--out",
        folder,
        "--model",
        models.pictures,
    )
    damage(folder / "a.safetensors")
    inputs = sorted(folder / f"{name}.safetensors" for name in "ab")
    result = vitok("decode", *inputs, "--out", tmp_path / "o", "--model", models.pictures)
    only_error(result, words)
    assert "a.safetensors" in result.err
    assert result.out == "1 of 2 decoded, 1 failed\n" and os.listdir(tmp_path / "o") == ["b.png"]


def test_latents_of_fewer_frames_than_they_say(vitok, files, models, tmp_path):
    folder = tmp_path / "latents"
    vitok("encode", files.clip(tmp_path / "a.mp4"), "--out", folder, "--model", models.clips)
    change(folder / "a.safetensors", size="40x32x48")
    result = vitok("decode", folder, "--out", tmp_path / "o", "--model", models.clips)
    only_error(result, "5 time steps do not belong to 40 frames")
    assert os.listdir(tmp_path / "o") == []


def test_pictures_are_no_latents(vitok, files, models, tmp_path):
    result = vitok("decode", files.picture(tmp_path / "a.png"), "--out", tmp_path / "o", "--model", models.pictures)
    only_error(result, "a.png is not a latents file")


# --- models


@pytest.fixture
def some_model(tmp_path):
    package.create_model("Tiw64d1h1-Tiw64d1h1/16", channels=4).save(tmp_path / "m")
    return tmp_path / "m"


def without_key(folder):
    state = load_file(folder / "model.safetensors")
    del state["decoder.from_latents.weight"]
    save_file(state, folder / "model.safetensors")


def with_extra_key(folder):
    save_file(load_file(folder / "model.safetensors") | {"surplus": torch.zeros(1)}, folder / "model.safetensors")


def with_other_shape(folder):
    state = load_file(folder / "model.safetensors")
    save_file(state | {"decoder.from_latents.weight": torch.zeros(2, 2)}, folder / "model.safetensors")


def truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def changed_config(folder, **changes):
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in fields.items() if value != "absent"}))


@pytest.mark.parametrize(
    "damage, words",
    [
        (without_key, "lacks weight.*decoder.from_latents.weight"),
        (with_extra_key, "unknown weight.*surplus"),
        (with_other_shape, "decoder.from_latents.weight must be"),
        (truncated_weights, "safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model directory: it has no model.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "no model directory: it has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: changed_config(folder, surplus=1), "surplus"),
        (lambda folder: changed_config(folder, patch="absent"), "lacks .*patch"),
        (lambda folder: changed_config(folder, patch="big"), "patch"),
    ],
    ids=["missing-key", "extra-key", "shape", "truncated", "no-weights", "no-config", "json", "field", "lacks", "type"],
)
def test_directory_that_is_no_model(vitok, files, some_model, tmp_path, damage, words):
    damage(some_model)
    picture = files.picture(tmp_path / "a.png")
    for command in ("reconstruct", "encode"):
        only_error(vitok(command, picture, "--out", tmp_path / "o", "--model", some_model), words)
    assert os.listdir(tmp_path / "o") == []


def test_unknown_model_names_suggest_the_nearest(vitok, files, tmp_path, monkeypatch):
    monkeypatch.setattr("vitok.checkpoint.bundled", lambda: ["demo"])
    picture = files.picture(tmp_path / "a.png")
    only_error(vitok("reconstruct", picture, "--out", tmp_path / "o", "--model", "dmo"), "'dmo'.*did you mean 'demo'")
    only_error(vitok("models", "dmo"), "'dmo'.*did you mean 'demo'")
    only_error(vitok("models", "SB/16"), "'SB/16'.*did you mean 'S-B/16'")
    only_error(vitok("models", "S-B/4by8"), "did you mean 'S-B/4x8'")
    only_error(vitok("models", "S-X/16"), "unknown size 'X'.*Ti, S, B, L")


# --- options


@pytest.mark.parametrize(
    "options, words",
    [
        (("--device", "nonsense"), "--device 'nonsense' cannot be used"),
        (("--device", "privateuseone"), "--device 'privateuseone' cannot be used"),
        (("--device", "meta"), "--device 'meta'"),
        (("--device", "vulkan"), "--device 'vulkan' cannot be used: this torch has no support"),
    ],
)
def test_device_that_cannot_be_used(vitok, files, models, tmp_path, options, words):
    picture = files.picture(tmp_path / "a.png")
    only_error(vitok("reconstruct", picture, "--out", tmp_path / "o", "--model", models.pictures, *options), words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_without_a_gpu(vitok, files, models, tmp_path, device):
    picture = files.picture(tmp_path / "a.png")
    result = vitok("encode", picture, "--out", tmp_path / "o", "--model", models.pictures, "--device", device)
    only_error(result, f"--device '{device}' cannot be used: ")


@pytest.mark.parametrize("command", ["reconstruct", "encode", "decode"])
def test_more_than_there_is_memory_for(vitok, files, models, tmp_path, monkeypatch, command):
    source = files.picture(tmp_path / "a.png")
    if command == "decode":
        assert vitok("encode", source, "--out", tmp_path / "l", "--model", models.pictures).code == 0
        source = tmp_path / "l" / "a.safetensors"
    monkeypatch.setattr("vitok.memory.SMALL", 0)
    monkeypatch.setattr("vitok.memory.available", lambda device: 10_000)
    result = vitok(command, source, "--out", tmp_path / "o", "--model", models.pictures)
    wanted = f"{source}: there is not enough memory to {'decode' if command == 'decode' else 'encode'} 12 tokens: "
    only_error(result, re.escape(wanted) + "it takes about .* and cpu has .* left; smaller or fewer pictures")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("reconstruct", "a.png"), "--out"),
        (("reconstruct", "--out", "o"), "INPUTS"),
        (("reconstruct", "a.png", "--out", "o", "--size", "0"), "--size"),
        (("reconstruct", "a.png", "--out", "o", "--size", "10001"), "--size"),
        (("reconstruct", "a.png", "--out", "o", "--dtype", "int8"), "--dtype"),
        (("models", "--preset", "nobody"), "--preset"),
        (("recontruct", "a.png"), "recontruct"),
    ],
)
def test_wrong_usage(vitok, arguments, words):
    result = vitok(*arguments)
    assert result.code == 2 and result.out == "" and words in result.err.splitlines()[-1]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda x: x[..., :2], "3 colour channels"),
        (lambda x: torch.where(x > 1.9, x, float("nan")), "finite"),
        (lambda x: x * 255, "lie in .*uint8"),
        (lambda x: x[0], "4 dimensions"),
        (lambda x: x.long(), "uint8 or floating point"),
    ],
    ids=["channels", "nan", "range", "rank", "dtype"],
)
def test_floats_and_shapes_that_only_python_can_pass(models, make, words):
    model = package.load(models.pictures)
    with pytest.raises(package.InputError, match=words) as error:
        model.encode(make(torch.rand(1, 32, 32, 3)))
    assert "\n" not in str(error.value)
