import csv
import json
import os
import re
import signal
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import vitok as package
from vitok.evaluate.features import EXTRACTORS, Extractor

pytest.importorskip("yaml")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def run(files, tmp_path):
    """A YAML file for a run on two small pictures."""
    for seed in range(2):
        files.picture(tmp_path / "photos" / f"{'ab'[seed]}_{seed}.png", 48, 64, seed)
    fields = {
        "data": str(tmp_path / "photos"), "out": str(tmp_path / "run"), "model": "Tiw64d1h1-Tiw64d1h1/16",
        "steps": 3, "batch": 2, "crop": 32, "short_side": [32, 48], "workers": 0, "warmup": 1, "precision": "fp32",
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(fields))  # which is YAML
    return path


def test_train_and_go_on(vitok, run, tmp_path):
    result = vitok("train", run, "--device", "cpu")
    assert result.code == 0, result
    assert "M parameters, 2 pictures, step 0 of 3" in result.err
    out = tmp_path / "run"
    told = [f"step 3 of 3; averaged model in {out / 'model'}", f"log in {out / 'log.csv'}"]
    curves = [f"curves in {out / 'curves.png'}"] if find_spec("matplotlib") else []
    assert result.out.splitlines() == [*told, *curves, f"reconstructions in {out / 'reconstructions'}"]
    assert bool(curves) == (out / "curves.png").exists() and (out / "reconstructions" / "00000003.png").exists()
    first = package.load(tmp_path / "run" / "model").state_dict()
    longer = vitok("train", run, "steps=5")
    assert longer.code == 0 and "step 3 of 5" in longer.err and "step 5 of 5" in longer.out
    second = package.load(tmp_path / "run" / "model").state_dict()
    assert any(not torch.equal(first[key], second[key]) for key in first)
    again = vitok("train", run, "steps=5")
    assert again.code == 0 and "step 5 of 5" in again.out


def test_the_progress_of_training(vitok, run, monkeypatch):
    from vitok.train import trainer

    metrics = {
        "loss": 0.0123456, "psnr": 23.456, "kl": 1.0, "lr": 1e-4, "data_wait": 4.4, "images_per_s": 12.345,
        "operations_per_s": 4e11, "skipped": 0,
    }  # fmt: skip
    rates = []
    monkeypatch.setattr("vitok.bench.timing.matmul_rate", lambda device, dtype: rates.append(dtype) or 1e12)
    monkeypatch.setattr("vitok.cli.progress.QUIET_SECONDS", 0.0)
    monkeypatch.setattr(trainer.Trainer, "run", lambda self, on_step: on_step(1, metrics))
    result = vitok("train", run, "precision=bf16", "out=elsewhere")
    assert "loss 0.01235 psnr 23.46 dB 12.3 images/s 40% of matmul wait 4%" in result.err, result
    assert rates == [torch.bfloat16] and result.out.splitlines() == ["step 0 of 3; averaged model in elsewhere/model"]


@pytest.mark.parametrize(("wait", "told"), [(37.4, True), (19.0, False)])
def test_a_run_that_waited_for_its_input_says_so(vitok, run, monkeypatch, wait, told):
    from vitok.train import trainer

    monkeypatch.setattr(trainer.Trainer, "run", lambda self, on_step: setattr(self, "data_wait", wait))
    lines = vitok("train", run).err.splitlines()
    words = "steps waited 37% of the time for data; raise training field 'workers', which is 0"
    assert [line.startswith(words) for line in lines if "for data" in line] == [True] * told


def test_train_says_which_packages_are_missing(vitok, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr("vitok.train.records.find_spec", lambda name: None)
    result = vitok("train", run)
    assert result.code == 0 and "curves" not in result.out
    assert [line for line in result.err.splitlines() if line.startswith("skipped ")] == [
        "skipped TensorBoard: not installed (pip install tensorboard)",
        "skipped curves.png: matplotlib is not installed (pip install matplotlib)",
    ]


def test_train_says_what_it_leaves_out(vitok, run, tmp_path):
    (tmp_path / "photos" / "text.jpg").write_text("just words")
    result = vitok("train", run, "batch=16")
    assert result.code == 0 and "3 pictures" in result.err
    assert [line.split()[0] for line in result.err.splitlines() if "text.jpg" in line] == ["skipped:"]


def test_a_stopped_run_says_so_and_goes_on(vitok, run, monkeypatch):
    from vitok.train import trainer

    step = trainer.Trainer.train_step

    def stopping(self, batch, number):
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, number)

    monkeypatch.setattr(trainer.Trainer, "train_step", stopping)
    result = vitok("train", run)
    assert result.code == 0 and "step 2 of 3" in result.out and "goes on from here" in result.err
    monkeypatch.undo()
    assert "step 2 of 3" in vitok("train", run).err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("nothing",), "key=value"),
        (("stepps=3",), "did you mean 'steps'"),
        (("stage=2",), "'init' must be its directory"),
        (("stage=2", "init=nowhere"), "nowhere"),
        (("perceptual=vgg_hed",), "needs the path of its weights in 'perceptual_weights'; they are made from"),
        (("perceptual=vgg_hed", "perceptual_weights=nowhere"), "there is no file 'nowhere'; they are made from"),
        (
            ("perceptual=lpips",),
            "the package lpips is not installed; pip install lpips; or choose 'vgg_hed', or 'none'",
        ),
        (("perceptual=os.system",), "'perceptual' must be one of"),
        (("steps=many",), "'steps' must be int"),
        (("steps=-1",), "'steps'"),
        (("pixel_loss=l7",), "l2"),
        (("overrides.encoder_dept=2",), "encoder_dep"),
        (("overrides.patch=[",), "overrides.patch"),
        (("model=SB/16",), "did you mean 'S-B/16'"),
        (("data=nowhere",), "nowhere does not exist"),
        (("init=nowhere",), "nowhere"),
        (("groups=(",), "groups"),
        (("--device", "nonsense"), "--device 'nonsense'"),
    ],
)
def test_train_refuses(vitok, run, monkeypatch, arguments, words):
    monkeypatch.setitem(sys.modules, "lpips", None)  # not installed
    refused(vitok("train", run, *arguments), words)


def refused(result, *words):
    """The command failed with one sentence on standard error that has all `words`."""
    assert result.code == 2 and result.out == "" and len(result.err.splitlines()) == 1, result
    assert result.err.startswith("error: ") and all(word in result.err for word in words), result.err


def empty(folder):
    return "holds no pictures or clips"


def no_data(folder):
    (folder / "notes.txt").write_text("just words")
    return "holds no pictures or clips"


def locked(folder):
    (folder / "a.png").touch()
    folder.chmod(0)
    return "cannot be read: Permission denied"


def loop(folder):
    folder.rmdir()
    folder.symlink_to(folder)
    return "cannot be read: "


@pytest.mark.parametrize("make", [empty, no_data, locked, loop], ids=lambda make: make.__name__)
def test_a_data_folder_that_cannot_be_used(vitok, run, tmp_path, monkeypatch, make):
    folder = tmp_path / "folder"
    folder.mkdir()
    words = make(folder)
    if make is locked and os.access(folder, os.R_OK):  # root may read anything, so the system's answer is stood in for

        def scandir(path, scandir=os.scandir):
            if os.fspath(path) == str(folder):
                raise PermissionError(13, "Permission denied", str(folder))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", scandir)
    try:
        refused(vitok("train", run, f"data={folder}"), f"data {folder} holds no readable picture", words)
    finally:
        if make is locked:
            folder.chmod(0o700)


def test_a_data_path_of_any_length(vitok, run):
    refused(vitok("train", run, f"data={'x' * 300}"), "xxx cannot be read: File name too long")


def test_pictures_and_videos_in_one_folder(vitok, run, tmp_path):
    (tmp_path / "photos" / "a.mp4").touch()
    words = f"data {tmp_path / 'photos'} holds pictures and videos", "data: [{path: photos}, {path: films/*.mp4}]"
    refused(vitok("train", run), *words)
    parts = f"data=[{{path: {tmp_path}/photos/*_0.png}}, {{path: {tmp_path}/photos/*_1.png}}]"  # as it says
    result = vitok("train", run, parts)
    assert result.code == 0 and "2 pictures" in result.err


def test_a_shard_cut_short(vitok, run, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as shard:
        for path in sorted((tmp_path / "photos").iterdir()):
            shard.add(path, path.name)
    with tarfile.open(tmp_path / "x.tar") as shard:
        last = shard.getmembers()[-1]
    whole = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[: last.offset_data + 100])
    result = vitok("train", run, f"data={tmp_path / 'x.tar'}")
    assert result.code == 0 and ", 1 picture, step 0 of 3" in result.err
    (said,) = (line for line in result.err.splitlines() if line.startswith("skipped: "))
    assert said == f"skipped: tar shard {tmp_path / 'x.tar'} cannot be read to its end: it is cut short"
    (tmp_path / "x.tar").write_bytes(whole[:600])
    words = f"the tar shards of {tmp_path} hold no pictures", "x.tar cannot be read to its end"
    refused(vitok("train", run, f"data={tmp_path / 'x.tar'}", f"out={tmp_path / 'other'}"), *words)


def test_init_of_another_model(vitok, run, models):
    words = f"init '{models.wider}' holds a model of another configuration", "channels 48 (here 16)", "another init"
    refused(vitok("train", run, f"init={models.wider}"), *words)


def test_stage_2_of_a_run_and_not_of_its_model(vitok, run, tmp_path):
    vitok("train", run, "steps=1")
    result = vitok("train", run, "stage=2", f"init={tmp_path / 'run'}", f"out={tmp_path / 'second'}")
    refused(result, f"{tmp_path / 'run'} is no model directory", f"did you mean {tmp_path / 'run' / 'model'}?")


def test_a_loss_that_is_not_finite(vitok, run, tmp_path):
    broken = package.create_model("Tiw64d1h1-Tiw64d1h1/16")
    with torch.no_grad():
        broken.decoder.unembed.weight[0, 0] = float("nan")
    broken.save(tmp_path / "broken")
    result = vitok("train", run, f"init={tmp_path / 'broken'}")
    assert result.code == 2 and result.out == "" and "Traceback" not in result.err
    error = result.err.splitlines()[-1]
    assert re.search(r"^error: the loss .*not finite at step 1; lower learning_rate or check the data: ._.\.png", error)
    saved = re.search(r"; (\S+) holds the state and this batch, its file names in checkpoint.json$", error)
    assert saved and os.path.exists(saved[1]), error


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: [", "cannot read"),
        ("- 1", "mapping"),
        ("steps: 3", "lacks data"),
        ("data: a\nout: b\nlearning_rat: 1e-3", "unknown training field 'learning_rat'; did you mean 'learning_rate'?"),
        ("data: [{path: a, weigth: 2}]\nout: b", "got weigth; did you mean 'weight'?"),
        ("", "mapping"),
        (None, "cannot read"),
        ("\0", "cannot read"),
    ],
)
def test_bad_training_files(vitok, tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_text(text)
    result = vitok("train", path)
    assert result.code == 2 and len(result.err.splitlines()) == 1 and words in result.err, result


def test_train_refuses_a_run_of_another_kind(vitok, run):
    assert vitok("train", run, "steps=1").code == 0
    result = vitok("train", run, "steps=2", "learning_rate=0.5")
    assert result.code == 2 and "another configuration" in result.err


@pytest.mark.long
def test_the_laptop_file_learns_from_the_example_pictures(vitok, tmp_path):
    run = ("train", EXAMPLES / "train" / "stage1-laptop.yaml", f"data={EXAMPLES / 'photos'}", f"out={tmp_path}")
    result = vitok(*run, "steps=150", "save_every=25")
    assert result.code == 0 and "4 pictures, step 0 of 150" in result.err, result
    with open(tmp_path / "log.csv", newline="") as file:
        psnr = [float(row["psnr"]) for row in csv.DictReader(file)]
    assert psnr[-1] > psnr[0] + 2
    facts = json.loads(vitok("eval", EXAMPLES / "photos", "--model", tmp_path / "model", "--json").out)
    assert facts["means"][str(tmp_path / "model")]["psnr"] > 18


# --- eval


@pytest.fixture
def photos(files, tmp_path):
    for seed in range(3):
        files.picture(tmp_path / "photos" / f"{'aab'[seed]}_{seed}.png", 48, 64, seed)
    return tmp_path / "photos"


@pytest.fixture
def small_pca(monkeypatch):
    monkeypatch.setattr("vitok.cli.quality.PCA_CROPS", 8)


def test_eval(vitok, models, photos):
    result = vitok("eval", photos, "--size", 32, "--model", models.pictures)
    assert result.code == 0 and result.err == ""
    title, header, *rows, mean, skipped, protocol, summary = result.out.splitlines()
    assert "antialiased" in protocol and "posterior mean" in protocol and package.__version__ in protocol
    assert "32 x 32 centre crops, 16 x 16 patches, 32 channels" in title and header.count("PSNR dB") == 1
    assert [row.split()[0] for row in rows] == ["a_0.png", "a_1.png", "b_2.png"] and mean.startswith("mean of 3")
    assert skipped.startswith("VGG-HED distance: skipped: name its weights by --vgg-hed PATH; docs/evaluation.md shows")
    assert summary == "3 scored"
    facts = json.loads(vitok("eval", photos, "--size", 32, "--model", models.pictures, "--json").out)
    assert facts["metrics"]["vgg-hed"] == skipped.removeprefix("VGG-HED distance: ")


def test_eval_equals_reconstruct(vitok, models, photos, tmp_path):
    vitok("reconstruct", photos, "--out", tmp_path / "o", "--size", 32, "--model", models.pictures)
    rows = json.loads((tmp_path / "o" / "metrics.json").read_text())["results"]
    facts = json.loads(vitok("eval", photos, "--size", 32, "--model", models.pictures, "--json").out)
    (name,) = facts["means"]
    assert name == str(models.pictures) and facts["pictures"] == 3 and facts["failed"] == 0 and facts["size"] == 32
    for row, picture in zip(rows, facts["scores"], strict=True):
        assert picture["input"] == row["input"] and picture[name]["psnr"] == pytest.approx(row["psnr"], abs=1e-6)
    assert facts["means"][name]["psnr"] == pytest.approx(sum(row["psnr"] for row in rows) / 3)
    assert facts["means"][name]["ssim"] == pytest.approx(sum(row["ssim"] for row in rows) / 3)


def test_eval_beside_pca(vitok, models, photos, small_pca):
    arguments = ("eval", photos, "--size", 32, "--model", models.pictures, "--pca", photos, "--groups", "^[^_]+")
    facts = json.loads(vitok(*arguments, "--json").out)
    assert list(facts["means"]) == [str(models.pictures), "PCA"]
    gain = facts["means"][str(models.pictures)]["psnr"] - facts["means"]["PCA"]["psnr"]
    assert gain < -5  # random weights against a fitted baseline
    result = vitok(*arguments)
    assert result.code == 0 and "PCA PSNR dB" in result.out
    assert f"{models.pictures} is {gain:+.2f} dB against PCA" in result.out.splitlines()


def test_eval_goes_on_past_bad_pictures(vitok, models, photos, small_pca):
    (photos / "a_bad.jpg").write_text("just words")
    options = ("--size", 32, "--model", models.pictures, "--pca", photos)
    result = vitok("eval", photos, *options)
    assert result.code == 2 and result.out.splitlines()[-1] == "3 of 4 scored, 1 failed"
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "a_bad.jpg" in errors[0]
    result = vitok("eval", photos, *options, "--json")
    assert result.code == 2
    facts = json.loads(result.out)
    assert facts["pictures"] == 3 and facts["failed"] == 1 and len(facts["scores"]) == 3


@pytest.mark.parametrize(
    "options, words",
    [
        (("--pca", "nowhere"), "--pca: data nowhere .* does not exist"),
        (("--pca", ".", "--groups", "("), "--groups '\\('"),
        (("--size", "0"), "--size"),
    ],
)
def test_eval_refuses(vitok, models, photos, monkeypatch, options, words):
    monkeypatch.setattr("vitok.cli.quality.score_folder", lambda *_, **__: pytest.fail("what is refused is not begun"))
    result = vitok("eval", photos, "--model", models.pictures, *options)
    assert result.code == 2 and result.out == "" and re.search(words, result.err.splitlines()[-1]), result


def test_eval_of_nothing(vitok, models, photos, tmp_path):
    result = vitok("eval", tmp_path / "nowhere", "--model", models.pictures, "--pca", photos)
    assert result.code == 2 and len(result.err.splitlines()) == 1 and "nowhere does not exist" in result.err
    assert result.out == "0 of 1 scored, 1 failed\n"


def test_eval_gives_the_same_digits_whatever_the_batch(vitok, models, photos, files, hed):
    for seed in range(3, 5):
        files.picture(photos / f"c_{seed}.png", 40, 40, seed)
    options = ("eval", photos, "--size", 32, "--model", models.pictures, "--vgg-hed", hed, "--jpeg")
    results = [vitok(*options, "--batch", batch) for batch in (1, 2, 3, 8)]
    assert all(result.code == 0 for result in results)
    assert len({result.out for result in results}) == 1


def test_eval_on_two_ranks_prints_what_one_prints(vitok, torchrun, models, photos, hed):
    (photos / "text.jpg").write_text("no picture")
    options = ("eval", photos, "--size", 32, "--model", models.pictures, "--batch", 1, "--device", "cpu", "--json")
    options = [str(each) for each in (*options, "--vgg-hed", hed, "--jpeg")]
    alone = vitok(*options)
    both = torchrun("--no-python", str(Path(sys.executable).with_name("vitok")), *options)
    assert both.stdout == alone.out and json.loads(alone.out)["failed"] == 1
    assert alone.code == 2 and both.stderr.count("exitcode  : 2 ") == 2, both.stderr
    assert both.stderr.count("error: ") == 1 and alone.err.strip() in both.stderr, "one rank does the talking"


@pytest.fixture
def hed(tmp_path):
    """Weights of the VGG-HED distance that are random."""
    from vitok.evaluate.perceptual import BLOCKS

    state = {}
    for block, (inputs, outputs, count) in enumerate(BLOCKS, 1):
        for i in range(count):
            fan = inputs if i == 0 else outputs
            state[f"conv{block}_{i + 1}.weight"] = torch.randn(outputs, fan, 3, 3) * (2 / (9 * fan)) ** 0.5
            state[f"conv{block}_{i + 1}.bias"] = torch.zeros(outputs)
    save_file(state, tmp_path / "hed.safetensors")
    return tmp_path / "hed.safetensors"


def test_eval_beside_jpeg_at_equal_bytes(vitok, models, photos):
    options = ("eval", photos, "--size", 64, "--model", models.pictures, "--jpeg")
    facts = json.loads(vitok(*options, "--json").out)
    name = str(models.pictures)
    assert list(facts["means"]) == [name, f"{name} 8-bit", "JPEG"]
    assert facts["bytes_8_bit"] == 32 * 16 + 2 * 32  # channels by tokens, and a scale a channel
    near = facts["means"][name]["psnr"] - facts["means"][f"{name} 8-bit"]["psnr"]
    assert abs(near) < 0.2
    for score in facts["scores"]:
        assert set(score["JPEG"]) == {"psnr", "ssim", "bytes"} and score["JPEG"]["psnr"] > 10
    mean = sum(score["JPEG"]["bytes"] for score in facts["scores"]) / 3
    assert facts["means"]["JPEG"]["bytes"] == pytest.approx(mean)
    result = vitok(*options)
    assert result.code == 0 and "JPEG bytes" in result.out and "dB against JPEG" in result.out
    over = [score["JPEG"]["bytes"] > facts["bytes_8_bit"] for score in facts["scores"]].count(True)
    assert (f"for {over} of 3" in result.err) == (over > 0)


def test_eval_of_clips(vitok, models, files, tmp_path, hed, small_pca):
    pytest.importorskip("av")
    for i, frames in enumerate((9, 11)):
        files.clip(tmp_path / "clips" / f"clip_{i}.mp4", frames=frames)
    files.picture(tmp_path / "photos" / "a.png", 48, 64)
    for model, tokens in ((models.pictures, 4 * 7), (models.clips, 4 * 2)):
        options = ("eval", tmp_path / "clips", "--frames", 7, "--size", 32, "--model", model)
        result = vitok(*options, "--jpeg", "--vgg-hed", hed, "--pca", tmp_path / "photos", "--json")
        assert result.code == 0, result
        facts = json.loads(result.out)
        assert facts["clips"] == 2 and facts["frames"] == 7 and "first 7" in facts["protocol"]["frames"]
        assert list(facts["means"]) == [str(model), "PCA", f"{model} 8-bit", "JPEG"]
        assert facts["bytes_8_bit"] % 32 == 0 and facts["bytes_8_bit"] > 32 * tokens
        for means in facts["means"].values():
            assert {"psnr", "ssim", "vgg-hed"} <= set(means)
        tables = [vitok(*options, "--batch", batch).out for batch in (1, 14)]
        assert tables[0] == tables[1] and "mean over" not in tables[0].splitlines()[0] and "over clips" in tables[0]
    result = vitok("eval", tmp_path / "clips", "--frames", 10, "--size", 32, "--model", models.clips)
    assert result.code == 2 and "clip_0.mp4 has 9 frames, fewer than the 10" in result.err
    result = vitok("eval", tmp_path / "photos", "--frames", 4, "--model", models.clips)
    assert result.code == 2 and "holds no clips" in result.err


def test_eval_skips_what_it_cannot_have_and_says_so(vitok, models, photos, monkeypatch):
    for name in ("lpips", "torch_fidelity", "efficientnet_lite_pytorch"):
        monkeypatch.setitem(sys.modules, name, None)
    options = ("eval", photos, "--size", 32, "--model", models.pictures, "--metrics", "all")
    facts = json.loads(vitok(*options, "--json").out)
    asked = ["vgg-hed", "lpips", "fid", "is", "fd-efficientnet-lite0", "fvd"]
    assert list(facts["metrics"]) == ["psnr", "ssim", *asked]
    assert all(facts["metrics"][name].startswith("skipped: ") for name in asked)
    assert facts["distributions"] == {} and set(facts["means"][str(models.pictures)]) == {"psnr", "ssim"}
    result = vitok(*options)
    assert result.code == 0 and "rFID: skipped: the package torch_fidelity is not installed" in result.out
    assert "rFVD: skipped: it is a distance of clips" in result.out


def test_eval_of_all_pictures_together(vitok, models, photos, monkeypatch):
    def opened(path, device):
        x = lambda pictures: (pictures.double().mean((2, 3)), pictures.double().mean((2, 3)))  # noqa: E731
        return Extractor("a mean", x)

    for name in ("fid", "is", "fd-efficientnet-lite0"):
        monkeypatch.setitem(EXTRACTORS, name, opened)
    options = ("eval", photos, "--size", 32, "--model", models.pictures, "--metrics", "fid, is", "--jpeg")
    facts = json.loads(vitok(*options, "--json").out)
    found = facts["distributions"]
    assert 0 < found["JPEG"]["fid"] < found[str(models.pictures)]["fid"] and "is" not in found["JPEG"]
    assert facts["metrics"]["fid"] == "a mean" and "10 splits" in facts["metrics"]["is"]
    result = vitok(*options)
    assert "all 3 pictures together" in result.out and "rFID" in result.out and "rIS: skipped: " in result.out


@pytest.mark.parametrize(
    "options, words",
    [
        (("--metrics", "fidd"), "there is no metric 'fidd'; there are .*fd-efficientnet-lite0"),
        (("--vgg-hed", "nowhere"), "there is no .*nowhere"),
        (("--fvd-weights", "nowhere", "--frames", "4"), "nowhere does not exist"),
        (("--batch", "0"), "--batch"),
        (("--frames", "0"), "--frames"),
    ],
)
def test_eval_refuses_metrics(vitok, models, photos, options, words):
    result = vitok("eval", photos, "--model", models.pictures, *options)
    assert result.code == 2 and result.out == "" and re.search(words, result.err.splitlines()[-1]), result


def test_eval_of_clips_beside_pca_of_clips_takes_whole_tubelets(vitok, models, files, tmp_path, small_pca):
    pytest.importorskip("av")
    files.clip(tmp_path / "clips" / "a.mp4", frames=8)
    files.picture(tmp_path / "photos" / "a.png", 48, 64)
    options = ("eval", tmp_path / "clips", "--frames", 8, "--size", 32, "--model", models.clips, "--json", "--pca")
    whole, single = (
        json.loads(vitok(*options, tmp_path / folder).out)["means"]["PCA"]["psnr"] for folder in ("clips", "photos")
    )
    assert whole > single + 1  # 32 numbers for 4 frames, against 8 for each
    package.create_model("Tiw64d1h1-Tiw64d1h1/4x16", channels=30).save(tmp_path / "thirty")
    assert vitok(*options, tmp_path / "clips", "--model", tmp_path / "thirty").code == 0


def test_eval_of_clips_beside_pca_of_pictures_needs_channels_for_every_frame(vitok, files, tmp_path, monkeypatch):
    pytest.importorskip("av")
    monkeypatch.setattr("vitok.cli.quality.score_folder", lambda *_, **__: pytest.fail("what is refused is not begun"))
    package.create_model("Tiw64d1h1-Tiw64d1h1/4x16", channels=30).save(tmp_path / "thirty")
    files.clip(tmp_path / "clips" / "a.mp4", frames=4)
    files.picture(tmp_path / "photos" / "a.png", 48, 64)
    options = ("--frames", 4, "--size", 32, "--model", tmp_path / "thirty", "--pca", tmp_path / "photos")
    result = vitok("eval", tmp_path / "clips", *options)
    assert result.code == 2 and result.out == ""
    assert "4 frames the same share of the 30 channels" in result.err.splitlines()[-1]
