"""Runs small enough for milliseconds a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vitok
from vitok.train import checkpoints
from vitok.train.config import TrainConfig

SIZES = {
    "encoder_width": 48,
    "encoder_heads": 2,
    "encoder_depth": 1,
    "decoder_width": 48,
    "decoder_heads": 2,
    "decoder_depth": 1,
}


@pytest.fixture
def sizes() -> dict[str, int]:
    return SIZES


@pytest.fixture
def config(pictures, tmp_path):
    def make(out: str = "run", **fields: object) -> TrainConfig:
        defaults = {
            "data": str(pictures), "out": str(tmp_path / out), "model": "S-S/8", "channels": 4, "overrides": SIZES,
            "steps": 6, "batch": 4, "crop": 16, "short_side": (16, 32), "learning_rate": 1e-3, "warmup": 2, "ema": 0.9,
            "precision": "fp32", "workers": 0, "save_every": 100,
        }  # fmt: skip
        return TrainConfig.from_dict(defaults | fields)

    return make


@pytest.fixture
def second_stage(config, tmp_path, vgg_hed):
    vitok.create_model("S-S/8", channels=4, **SIZES).save(tmp_path / "first")
    fields = {
        "stage": 2, "init": str(tmp_path / "first"), "perceptual": "vgg_hed", "perceptual_weights": str(vgg_hed),
        "discriminator_width": 8, "discriminator_warmup": 2, "discriminator_learning_rate": 1e-3, "lecam_weight": 0.1,
    }  # fmt: skip
    return lambda out="run", **changes: config(out, **(fields | changes))


@pytest.fixture
def state_of() -> Callable[[TrainConfig], dict[str, torch.Tensor]]:
    """`state_of(config)`: the tensors of the run's checkpoint, written by one rank."""

    def read(config: TrainConfig) -> dict[str, torch.Tensor]:
        path = checkpoints.newest(Path(config.out))
        assert path is not None
        (file,) = path.glob("*.safetensors")
        return load_file(file)

    return read
