"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, called with random arguments."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vitok import _native

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "csrc" / "sanitize.sh"


@pytest.mark.long
@pytest.mark.skipif(not SCRIPT.is_file(), reason="needs the source tree")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_nothing_is_reported():
    pytest.importorskip("pybind11", reason="needs the build's tools")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHON"] = os.path.relpath(sys.executable)  # as the Makefile gives it
    result = subprocess.run([SCRIPT], capture_output=True, text=True, env=environment, timeout=900)
    print(result.stdout[-4000:])
    assert result.returncode == 0, result.stderr[-4000:]
    assert "0 failures" in result.stdout


NOISE = {"seed": 0, "seed_at": 0, "sample_ids": 64, "stride_id": 1}
MOMENTS = {"moments": 64, "dtype": "float32", "sizes": (4, 2, 3), "strides": (12, 6, 1), **NOISE}
# Valid but for an absent output: nothing is read at these addresses even if a stride is taken.
VALID = {
    "normal_noise": {**NOISE, "samples": 4, "elements": 3, "out": 0},
    "gaussian_sample_forward": {**MOMENTS, "z": 64, "kl": 0, "partials": 64},
    "gaussian_sample_backward": {
        **MOMENTS, "dz": 64, "dz_strides": (6, 3, 1), "dkl": 64, "dkl_stride": 1, "dmoments": 0,
    },
    "pixel_loss_backward": {
        "prediction": 64, "dtype": "float32", "prediction_strides": (12, 12), "target": 64, "target_dtype": "float32",
        "sizes": (4, 1, 2, 2), "strides": (12, 12, 6, 3, 1), "q": 1, "p": 2, "kind": 0, "eps": 0.0, "scale": 1.0,
        "shift": 0.0, "grad": 64, "grad_stride": 1, "grad_prediction": 0,
    },
    "qk_norm_rope_forward": {
        "qkv": 64, "dtype": "float32", "sizes": (1, 4, 2, 16), "strides": (384, 96, 32, 16), "q_weight": 0,
        "k_weight": 0, "weight_dtype": "float32", "table": 0, "table_strides": (0, 0), "eps": 1e-6, "out": 0,
    },
}  # fmt: skip


@pytest.mark.skipif(_native.library() is None, reason="no native library")
@pytest.mark.parametrize("value", [-1, -(2**62), 2**62])
@pytest.mark.parametrize(
    ("kernel", "stride"),
    [
        ("normal_noise", "stride_id"),
        ("gaussian_sample_forward", "stride_id"),
        ("gaussian_sample_forward", "strides"),
        ("gaussian_sample_backward", "stride_id"),
        ("gaussian_sample_backward", "strides"),
        ("gaussian_sample_backward", "dz_strides"),
        ("gaussian_sample_backward", "dkl_stride"),
        ("pixel_loss_backward", "grad_stride"),
    ],
)
def test_strides_that_lead_outside_are_refused(kernel, stride, value):
    """A run found the numbers of samples read before their tensor; the others are like it."""
    good = VALID[kernel][stride]
    wrong = [(*good[:at], value, *good[at + 1 :]) for at in range(len(good))] if isinstance(good, tuple) else [value]
    for bad in wrong:
        with pytest.raises(ValueError, match=f"{stride} must not be negative|{stride} leads beyond"):
            getattr(_native.library(), f"{kernel}_cpu")(**(VALID[kernel] | {stride: bad}))


@pytest.mark.skipif(_native.library() is None, reason="no native library")
def test_negative_strides_of_an_absent_table_are_refused():
    """As those of a table that is there: nothing else tells a caller that it mixed up its arguments."""
    with pytest.raises(ValueError, match="table_strides must not be negative"):
        _native.library().qk_norm_rope_forward_cpu(**(VALID["qk_norm_rope_forward"] | {"table_strides": (-1, -1)}))
