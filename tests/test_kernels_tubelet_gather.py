"""The Triton tubelet gather without a GPU: its bits in the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs triton")

INTERPRET = r"""
import math, torch
from vitok.kernels.tubelet_gather import tubelet_gather

def expression(pixels, q, p, pad_zero, dtype, scale, shift):
    b, t, h, w, _ = pixels.shape
    lt, ly, lx = math.ceil(t / q), math.ceil(h / p), math.ceil(w / p)
    it, iy, ix = torch.arange(lt * q), torch.arange(ly * p), torch.arange(lx * p)
    values = pixels.float()[:, it.clamp(max=t - 1)][:, :, iy.clamp(max=h - 1)][:, :, :, ix.clamp(max=w - 1)]
    values = values * scale + shift
    if pad_zero:
        inside = (it < t)[:, None, None] & (iy < h)[None, :, None] & (ix < w)[None, None, :]
        values = torch.where(inside[None, ..., None], values, 0.0)
    values = values.view(b, lt, q, ly, p, lx, p, 3).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return values.reshape(b, lt * ly * lx, q * p * p * 3).to(dtype)

torch.manual_seed(0)
tubelets = [(1, 16, (2, 1, 32, 48)), (1, 16, (1, 1, 17, 33)), (4, 8, (1, 5, 9, 20)), (1, 8, (2, 2, 8, 16)),
            (2, 3, (1, 3, 7, 8)), (1, 1, (1, 1, 1, 1)), (1, 16, (0, 1, 16, 16)), (1, 16, (1, 1, 16, 400))]
sources, targets = (torch.uint8, torch.float32, torch.float16), (torch.float32, torch.float16)
cases = [(*tubelet, torch.uint8, torch.float16, pad_zero) for tubelet in tubelets for pad_zero in (False, True)]
cases += [(2, 8, (1, 3, 9, 20), source, target, True) for source in sources for target in targets]
for q, p, size, source, dtype, pad_zero in cases:
    pixels = torch.randint(0, 256, (*size, 3)).to(source) if source == torch.uint8 else torch.randn(*size, 3).to(source)
    first = pixels.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1)
    for layout in (pixels, first, pixels[..., :1].expand_as(pixels), pixels.flip(3)[:, :, :, ::2]):
        out = tubelet_gather(layout, q, p, pad_zero, dtype, 2 / 255, -1.0)
        expected = expression(layout, q, p, pad_zero, dtype, 2 / 255, -1.0)
        assert out.dtype == dtype and out.shape == expected.shape and out.is_contiguous()
        assert torch.equal(out, expected), (q, p, size, source, dtype, pad_zero, layout.stride())
print("equal")
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=600
    )


def test_interpreter_gives_the_bits_of_the_expression():
    """In a process of its own: the interpreter is chosen when triton is imported."""
    result = run_python(INTERPRET, TRITON_INTERPRET="1")
    assert result.stdout.strip() == "equal", result.stdout + result.stderr


def test_the_package_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; import vitok.kernels; print('imported')"
    result = run_python(code)
    assert result.stdout.strip() == "imported", result.stderr
