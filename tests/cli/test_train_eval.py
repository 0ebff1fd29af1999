import json
import os
import re
import signal

import pytest
import torch

import vitok as package

pytest.importorskip("yaml")


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
    assert result.out == f"step 3 of 3; averaged model in {tmp_path / 'run' / 'model'}\n"
    first = package.load(tmp_path / "run" / "model").state_dict()
    longer = vitok("train", run, "steps=5")
    assert longer.code == 0 and "step 3 of 5" in longer.err and "step 5 of 5" in longer.out
    second = package.load(tmp_path / "run" / "model").state_dict()
    assert any(not torch.equal(first[key], second[key]) for key in first)
    again = vitok("train", run, "steps=5")
    assert again.code == 0 and "step 5 of 5" in again.out


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
        (("stepps=3",), "stepps"),
        (("steps=many",), "'steps' must be int"),
        (("steps=0",), "'steps'"),
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
def test_train_refuses(vitok, run, arguments, words):
    result = vitok("train", run, *arguments)
    assert result.code == 2 and result.out == "" and len(result.err.splitlines()) == 1, result
    assert result.err.startswith("error: ") and words in result.err, result.err


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: [", "cannot read"),
        ("- 1", "mapping"),
        ("steps: 3", "lacks data"),
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
    title, header, *rows, mean, summary = result.out.splitlines()
    assert "32 x 32 centre crops, 16 x 16 patches, 32 channels" in title and header.count("PSNR dB") == 1
    assert [row.split()[0] for row in rows] == ["a_0.png", "a_1.png", "b_2.png"] and mean.startswith("mean of 3")
    assert summary == "3 scored"


def test_eval_equals_reconstruct(vitok, models, photos, tmp_path):
    vitok("reconstruct", photos, "--out", tmp_path / "o", "--size", 32, "--model", models.pictures)
    rows = json.loads((tmp_path / "o" / "metrics.json").read_text())["results"]
    facts = json.loads(vitok("eval", photos, "--size", 32, "--model", models.pictures, "--json").out)
    (name,) = facts["means"]
    assert name == str(models.pictures) and facts["pictures"] == 3 and facts["failed"] == 0 and facts["size"] == 32
    for row, picture in zip(rows, facts["psnr"], strict=True):
        assert picture["input"] == row["input"] and picture[name] == pytest.approx(row["psnr"], abs=1e-6)
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
    assert facts["pictures"] == 3 and facts["failed"] == 1 and len(facts["psnr"]) == 3


@pytest.mark.parametrize(
    "options, words",
    [
        (("--pca", "nowhere"), "nowhere"),
        (("--pca", ".", "--groups", "("), "--groups '\\('"),
        (("--size", "0"), "--size"),
    ],
)
def test_eval_refuses(vitok, models, photos, options, words):
    result = vitok("eval", photos, "--model", models.pictures, *options)
    assert result.code == 2 and result.out == "" and re.search(words, result.err.splitlines()[-1]), result


def test_eval_of_nothing(vitok, models, tmp_path):
    result = vitok("eval", tmp_path / "nowhere", "--model", models.pictures, "--pca", tmp_path)
    assert result.code == 2 and len(result.err.splitlines()) == 1 and "nowhere does not exist" in result.err
    assert result.out == "0 of 1 scored, 1 failed\n"
