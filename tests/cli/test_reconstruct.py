import json
import os
import sys

import pytest
import torch
from PIL import Image

import vitok as package
from vitok.evaluate.metrics import psnr, ssim
from vitok.io import ClipReader, read_image

av = pytest.importorskip("av")
GAP = 8
COLUMNS = ["input", "frames", "size", "PSNR dB", "SSIM", "tokens", "floats", "compression", "encode ms", "decode ms"]


def frames_of(path):
    with ClipReader(path) as reader:
        return torch.cat(list(reader.chunks(50)))


def test_pictures_clips_and_folders(vitok, files, models, tmp_path):
    picture = files.picture(tmp_path / "a.png", 37, 211)
    clip = files.clip(tmp_path / "b.mp4", frames=17, height=32, width=48)
    files.picture(tmp_path / "folder" / "deep" / "c.jpg")
    files.picture(tmp_path / "folder" / ".hidden.png")
    out = tmp_path / "new" / "out"
    result = vitok("reconstruct", picture, clip, tmp_path / "folder", "--out", out, "--model", models.pictures)
    assert result.code == 0 and result.err == ""
    assert sorted(os.listdir(out)) == ["a.png", "b.mp4", "c.png", "contact_sheet.png", "metrics.json"]
    assert files.size(out / "a.png") == (2 * 211 + GAP, 37)
    assert frames_of(out / "b.mp4").shape == (17, 32, 2 * 48 + GAP, 3)
    title, header, *rows, place, summary = result.out.splitlines()
    assert header.split() == " ".join(COLUMNS).split() and [row.split()[0] for row in rows] == [
        "a.png",
        "b.mp4",
        "c.jpg",
    ]
    assert "pixel values for each latent float" in title and str(out) in place and summary == "3 reconstructed"


def test_metrics_can_be_recomputed_from_the_files(vitok, files, models, tmp_path):
    picture = files.picture(tmp_path / "a.png", 40, 56)
    result = vitok("reconstruct", picture, "--out", tmp_path / "o", "--model", models.pictures)
    written = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert (written["model"], written["dtype"], written["device"]) == (str(models.pictures), "float32", "cpu")
    (row,) = written["results"]
    pair = read_image(tmp_path / "o" / "a.png").pixels
    original, reconstruction = pair[:, :56], pair[:, 56 + GAP :]
    assert torch.equal(original, read_image(picture).pixels) and (pair[:, 56 : 56 + GAP] == 255).all()
    assert row["psnr"] == pytest.approx(psnr(original, reconstruction), abs=1e-9)
    assert row["ssim"] == pytest.approx(ssim(original, reconstruction), abs=1e-9)
    assert (row["frames"], row["height"], row["width"], row["tokens"], row["floats"]) == (1, 40, 56, 12, 12 * 32)
    assert row["compression"] == 40 * 56 * 3 / (12 * 32) and row["encode_ms"] > 0 and row["decode_ms"] > 0
    for text in ("56x40", f"{row['psnr']:.2f}", f"{row['ssim']:.4f}", " 12 ", " 384 ", "17.5x"):
        assert text in result.out


def test_the_reconstruction_is_the_model_s(vitok, files, models, tmp_path):
    picture = files.picture(tmp_path / "a.png", 37, 50)
    vitok("reconstruct", picture, "--out", tmp_path / "o", "--model", models.pictures)
    model = package.load(models.pictures)
    pixels = read_image(picture).pixels[None]
    with torch.no_grad():
        want = model.decode(model.encode(pixels).mode(), size=(37, 50))[0].movedim(0, -1)
    want = want.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    assert torch.equal(read_image(tmp_path / "o" / "a.png").pixels[:, 50 + GAP :], want)


def test_size(vitok, files, models, tmp_path):
    picture, clip = files.picture(tmp_path / "a.png", 100, 60), files.clip(tmp_path / "b.mp4", 5, 48, 80)
    out = tmp_path / "o"
    assert vitok("reconstruct", picture, clip, "--out", out, "--size", 32, "--model", models.pictures).code == 0
    assert files.size(out / "a.png") == (64 + GAP, 32)
    assert frames_of(out / "b.mp4").shape == (5, 32, 64 + GAP, 3)
    rows = json.loads((out / "metrics.json").read_text())["results"]
    assert [(row["frames"], row["height"], row["width"], row["tokens"]) for row in rows] == [
        (1, 32, 32, 4),
        (5, 32, 32, 20),
    ]


def test_clip_of_odd_sizes(vitok, files, models, tmp_path):
    """H.264 has even sides only: the last row is repeated in the file, and counted nowhere."""
    pictures = [files.pixels(33, 47, seed=seed) for seed in range(3)]
    with av.open(str(tmp_path / "odd.avi"), "w") as container:  # lossless RGB takes odd sizes
        stream = container.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = 47, 33, "rgb24"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")))
        container.mux(stream.encode(None))
    assert vitok("reconstruct", tmp_path / "odd.avi", "--out", tmp_path / "o", "--model", models.pictures).code == 0
    assert frames_of(tmp_path / "o" / "odd.mp4").shape == (3, 34, 2 * 47 + GAP, 3)
    (row,) = json.loads((tmp_path / "o" / "metrics.json").read_text())["results"]
    assert (row["frames"], row["height"], row["width"]) == (3, 33, 47)


@pytest.mark.parametrize("model, tokens", [("pictures", 17 * 6), ("clips", 5 * 6)])
def test_clip_tokens(vitok, files, models, tmp_path, model, tokens):
    clip = files.clip(tmp_path / "a.mp4", frames=17, height=32, width=48)
    assert vitok("reconstruct", clip, "--out", tmp_path / "o", "--model", getattr(models, model)).code == 0
    (row,) = json.loads((tmp_path / "o" / "metrics.json").read_text())["results"]
    assert (row["frames"], row["tokens"], row["floats"]) == (17, tokens, tokens * 32)


def test_equal_names_do_not_overwrite_each_other(vitok, files, models, tmp_path):
    for name in ("x/cat.png", "x/cat.jpg", "y/cat.png", "x/contact_sheet.png", "x/CAT.webp"):
        files.picture(tmp_path / name)
    result = vitok("reconstruct", tmp_path / "x", tmp_path / "y", "--out", tmp_path / "o", "--model", models.pictures)
    assert result.code == 0
    rows = json.loads((tmp_path / "o" / "metrics.json").read_text())["results"]
    outputs = [row["output"] for row in rows]
    assert len({name.casefold() for name in outputs}) == 5 and "contact_sheet.png" not in outputs
    assert set(os.listdir(tmp_path / "o")) == {*outputs, "contact_sheet.png", "metrics.json"}
    inputs = [row["input"] for row in rows]  # two of the same name are told apart by where they are
    assert len(set(inputs)) == 5 and str(tmp_path / "y" / "cat.png") in inputs and "cat.jpg" in inputs


def test_the_contact_sheet_shows_every_input(vitok, files, models, tmp_path):
    for seed in range(3):
        files.picture(tmp_path / "in" / f"{seed}.png", seed=seed)
    vitok("reconstruct", tmp_path / "in", "--out", tmp_path / "o", "--model", models.pictures)
    three = files.size(tmp_path / "o" / "contact_sheet.png")
    vitok("reconstruct", tmp_path / "in" / "0.png", "--out", tmp_path / "o", "--model", models.pictures)
    one = files.size(tmp_path / "o" / "contact_sheet.png")
    assert three[0] * three[1] > 2 * one[0] * one[1]


def test_a_second_run_does_not_take_results_for_inputs(vitok, files, models, tmp_path):
    files.picture(tmp_path / "a.png")
    for _ in range(2):
        result = vitok("reconstruct", tmp_path, "--out", tmp_path / "out", "--model", models.pictures)
        assert result.out.splitlines()[-1] == "1 reconstructed"
    result = vitok(
        "reconstruct",
        tmp_path,
        tmp_path / "out" / "a.png",
        "--out",
        tmp_path / "out" / "again",
        "--model",
        models.pictures,
    )
    assert result.out.splitlines()[-1] == "3 reconstructed"  # named or elsewhere, they are inputs like any other
    files.picture(tmp_path / "out" / "below" / "b.png")
    result = vitok("reconstruct", tmp_path / "out" / "below", "--out", tmp_path / "out", "--model", models.pictures)
    assert result.out.splitlines()[-1] == "1 reconstructed"
    (tmp_path / "a.png").unlink()
    result = vitok("reconstruct", tmp_path, "--out", tmp_path / "out", "--model", models.pictures)
    assert result.code == 2 and "no picture or clip but the results" in result.err


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(vitok, files, models, tmp_path, dtype):
    picture = files.picture(tmp_path / "a.png")
    psnrs = []
    for chosen in ("float32", dtype):
        options = ("--out", tmp_path / chosen, "--model", models.pictures, "--dtype", chosen, "--device", "cpu")
        assert vitok("reconstruct", picture, *options).code == 0
        written = json.loads((tmp_path / chosen / "metrics.json").read_text())
        assert written["dtype"] == chosen
        psnrs.append(written["results"][0]["psnr"])
    assert psnrs[0] != psnrs[1] and psnrs[0] == pytest.approx(psnrs[1], abs=0.3)


def test_perfect_reconstruction_is_valid_json(vitok, files, models, tmp_path, monkeypatch):
    module = sys.modules["vitok.cli.reconstruct"]  # by its name, which the command of the same name hides
    monkeypatch.setattr(module, "decode_frames", lambda *_: torch.full((1, 20, 20, 3), 255, dtype=torch.uint8))
    Image.new("RGB", (20, 20), "white").save(tmp_path / "white.png")
    result = vitok("reconstruct", tmp_path / "white.png", "--out", tmp_path / "o", "--model", models.pictures)
    assert result.code == 0 and " inf " in result.out

    def no_constant(name):
        raise ValueError(name)

    written = json.loads((tmp_path / "o" / "metrics.json").read_text(), parse_constant=no_constant)
    assert written["results"][0]["psnr"] is None
