"""A mini tokenizer trained 100 steps with fused ops follows the one trained with the reference ops."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

MINI = runpy.run_path(str(Path(__file__).parents[1] / "mini_training.py"))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.02), (torch.bfloat16, 0.05)], ids=str)
def test_loss_at_every_step(impl, dtype, tolerance):
    reference = MINI["train"]("reference", 100, "cuda", dtype)
    fused = MINI["train"](impl, 100, "cuda", dtype)
    if not fused[2]:
        pytest.skip(f"{impl} computes none of the model's ops here")
    assert reference[0][-1] < 0.5 * reference[0][0], "nothing was learnt"
    MINI["assert_alike"](fused, reference, tolerance)
