"""The cases that the GPU tests and the fuzz share, on the CPU: every op by every implementation, with gradients."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

SHARED = runpy.run_path(str(Path(__file__).with_name("op_cases.py")))
CASES = [(op, n) for op, cases in SHARED["CASES"].items() for n in range(len(cases))]
# Triton's interpreter is slow and its matrix products of bfloat16 are wrong; the ops' own tests use it at length.
IMPLS = [("native", torch.bfloat16), ("native", torch.float32), ("triton", torch.float32)]


@pytest.mark.parametrize(("impl", "dtype"), IMPLS, ids=lambda x: str(x).removeprefix("torch."))
@pytest.mark.parametrize(("op", "number"), CASES)
def test_against_float64(op, number, impl, dtype, judge):
    if reason := SHARED["unavailable"](op, impl, "cpu"):
        pytest.skip(reason)
    if impl == "triton" and number:
        pytest.skip("the first case is enough for the interpreter")
    SHARED["compare"](SHARED["sample"](op, dtype, **SHARED["CASES"][op][number]), impl, judge)


def test_every_op_has_cases():
    from vitok.ops._registry import OPS

    # What tubelet_unembed does with its rows; a library's product; what tests/gpu/test_inference.py is about.
    covered_by_another = {"tubelet_scatter", "linear", "packed_linear", "quantize_rows", "dequantize"}
    assert set(OPS) - covered_by_another <= set(SHARED["CASES"])


def test_mini_training_with_native_ops_follows_the_reference():
    mini = runpy.run_path(str(Path(__file__).with_name("mini_training.py")))
    reference, native = (mini["train"](impl, 6, "cpu") for impl in ("reference", "native"))
    assert reference[0][-1] < reference[0][0]
    mini["assert_alike"](native, reference, 0.01)
