"""vitok convert: a model directory that loads, and one sentence for what cannot be converted."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import vitok as package

plain = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "plain_formulas.py")))


@pytest.fixture
def files(tmp_path):
    sizes = {"width": 64, "hidden": 80, "depth": 1, "patch": 4, "channels": 6}
    models = {**plain.v2_model(sizes, 2), "v1": plain.author_v1_model(64, 70, 1, (1, 4), 6)}
    for name, weights in models.items():
        save_file({key: x.float().contiguous() for key, x in weights.items()}, tmp_path / f"{name}.safetensors")
    return {name: tmp_path / f"{name}.safetensors" for name in models}


def test_convert(vitok, files, tmp_path):
    both = ("--encoder", files["encoder"], "--decoder", files["decoder"])
    for number, command in enumerate((("v2", *both), ("v1", files["v1"]))):
        out = tmp_path / f"model{number}"
        result = vitok("convert", *command, "--out", out)
        assert result.code == 0 and result.out.strip() == str(out), result.err
        model = package.load(out)
        assert model.encode(torch.zeros(1, 3, 8, 8)).mode().shape == (1, 6, 2, 2)


def test_what_cannot_be_converted(vitok, files, tmp_path):
    torch.save({}, tmp_path / "x.pt")
    half = {key: x for key, x in plain.author_v1_model(64, 70, 1, (1, 4), 6).items() if key[:3] not in ("dec", "cod")}
    half.pop("tubelet_decode.proj.weight")
    half.pop("tubelet_decode.proj.bias")
    save_file({key: x.contiguous() for key, x in half.items()}, tmp_path / "half.safetensors")
    for command, words in (
        (("v2", "--encoder", files["encoder"]), "name --decoder too"),
        (("v2",), "or a published model by variant="),
        (("v1", tmp_path / "x.pt"), "is a pickle"),
        (("v1", tmp_path / "half.safetensors"), "needs both parts"),
        (("v1", files["encoder"]), "no such ViTok weights"),
    ):
        result = vitok("convert", *command, "--out", tmp_path / "out")
        assert result.code == 2 and words in result.err and len(result.err.splitlines()) == 1, result.err
    assert not list((tmp_path / "out").iterdir())
