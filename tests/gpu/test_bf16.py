"""Every op in 16 bits on the GPU, forward and backward, judged by float64 on the CPU."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_against_float64(shared, make, number, impl, dtype, judge):
    shared["compare"](make(dtype, number), impl, judge)
