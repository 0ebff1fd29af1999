"""The generator of examples/ trains on a cache and samples pictures through the decoder of the model that made it."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vitok.cli import command
from vitok.io import read_image

SCRIPT = Path(__file__).parents[2] / "examples" / "train_dit.py"
SMALL = ["--width", "32", "--depth", "2", "--heads", "2", "--batch", "8", "--sampling-steps", "3", "--samples", "2"]
ACCELERATE = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no"]  # which it would have to ask for


@pytest.fixture
def train_dit():
    pytest.importorskip("diffusers", reason="of the extra diffusers")
    spec = importlib.util.spec_from_file_location("train_dit", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_trains_and_samples(pictures, tiny, tmp_path, train_dit, capsys):
    tiny().save(tmp_path / "model")
    root, out = tmp_path / "cache", tmp_path / "out"
    encode = ["encode", str(pictures), "--out", str(root), "--format", "safetensors", "--size", "16", "--flip"]
    command.main([*encode, "--workers", "0", "--model", str(tmp_path / "model")], standalone_mode=False)
    losses = train_dit.main([str(root), "--out", str(out), "--steps", "3", *SMALL])
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    assert sorted(path.name for path in out.iterdir()) == ["dit.json", "dit.safetensors", "samples.png"]
    assert read_image(out / "samples.png").pixels.shape == (16, 2 * 16 + 8, 3)
    assert "step 3/3  loss" in capsys.readouterr().out


def test_the_checkpoint_is_a_model_of_diffusers(cache, tiny, tmp_path, train_dit):
    root, _ = cache(3, shape=(4, 2, 2), model=tiny())
    train_dit.main([str(root), "--out", str(tmp_path), "--steps", "1", *SMALL])
    from diffusers import DiTTransformer2DModel

    again = DiTTransformer2DModel.from_config(json.loads((tmp_path / "dit.json").read_text()))
    again.load_state_dict(load_file(tmp_path / "dit.safetensors"))
    assert again.config.num_embeds_ada_norm == 3


def test_same_seed_same_weights(cache, tiny, tmp_path, train_dit):
    root, _ = cache(3, shape=(4, 2, 2), model=tiny(), flip=False, labels=False)
    states = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        train_dit.main([str(root), "--out", str(tmp_path / name), "--steps", "2", "--seed", seed, *SMALL])
        states.append(load_file(tmp_path / name / "dit.safetensors")["proj_out_2.weight"])
    assert states[0].equal(states[1]) and not states[0].equal(states[2])


def test_goes_on_from_a_checkpoint_with_guidance(cache, tiny, tmp_path, train_dit):
    root, _ = cache(3, shape=(4, 2, 2), model=tiny())
    train_dit.main([str(root), "--out", str(tmp_path / "a"), "--steps", "2", *SMALL])
    checkpoint = tmp_path / "a" / "dit.safetensors"
    options = ["--steps", "0", "--checkpoint", str(checkpoint), "--guidance", "2"]
    assert train_dit.main([str(root), "--out", str(tmp_path / "b"), *options, *SMALL]) == []
    assert (tmp_path / "b" / "dit.safetensors").read_bytes() == checkpoint.read_bytes()
    pictures = [read_image(tmp_path / name / "samples.png").pixels for name in "ab"]
    assert not pictures[0].equal(pictures[1])


def test_another_model_is_refused(cache, tiny, tmp_path, train_dit, one_sentence):
    root, _ = cache(3, shape=(4, 2, 2), model=tiny())
    with pytest.raises(ValueError) as error:
        train_dit.main([str(root), "--out", str(tmp_path / "out"), "--model", "demo", *SMALL])
    one_sentence(error.value, "was made by another model")


def test_latents_that_do_not_fit_are_refused(cache, tiny, tmp_path, train_dit, one_sentence):
    root, _ = cache(3, shape=(4, 3, 2), model=tiny())
    with pytest.raises(ValueError) as error:
        train_dit.main([str(root), "--out", str(tmp_path / "out"), *SMALL])
    one_sentence(error.value, "square latents", "[4, 3, 2]")


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_ranks(cache, tiny, tmp_path, train_dit, torchrun, processes, launcher):
    root, _ = cache(3, 2, shape=(4, 2, 2), model=tiny())
    out = tmp_path / "out"
    script = [str(SCRIPT), str(root), "--out", str(out), "--steps", "2", "--device", "cpu", *SMALL]
    if launcher == "torchrun":
        ended = torchrun(*script)
    else:
        ended = processes.run([sys.executable, "-m", "accelerate.commands.launch", *ACCELERATE, *script])
    assert ended.returncode == 0, ended.stderr
    assert (out / "samples.png").exists() and ended.stdout.count("step 2/2") == 1
    assert "deprecated" not in ended.stderr


@pytest.mark.long
def test_loss_falls(cache, tiny, tmp_path, train_dit):
    sure = torch.full((4, 4, 4, 4), -8.0)
    root, _ = cache(4, shape=(4, 4, 4), model=tiny(), logvar=sure, flipped_logvar=sure)
    options = ["--steps", "300", "--width", "64", "--depth", "2", "--heads", "2", "--batch", "16", "--lr", "2e-3"]
    losses = torch.tensor(train_dit.main([str(root), "--out", str(tmp_path / "out"), *options]))
    assert losses[:10].mean() > 1.7 and losses[-50:].mean() < 1.35
