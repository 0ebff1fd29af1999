"""The Triton tubelet gather without a GPU: its bits in the interpreter, its machine code for every GPU generation."""

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


COMPILE = r"""
import itertools, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vitok.kernels import tubelet_gather as op

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
kernel = op.tubelet_gather_forward_kernel
STRIDES = ["pixels_stride_b", "pixels_stride_t", "pixels_stride_y"]


def resources(capability, source, target, q, p, pad_zero, whole_rows):
    constants = {"Q": q, "P": p, "PAD_ZERO": pad_zero, "WHOLE_ROWS": whole_rows, "BLOCK": op.BLOCK}
    if whole_rows:  # as a launch specialises a stride of one
        constants["pixels_stride_c"] = 1
    kinds = {"pixels_ptr": "*" + source, "out_ptr": "*" + target, "scale": "fp32", "shift": "fp32"}
    kinds |= {"pixels_stride_b": "i64", **dict.fromkeys(constants, "constexpr")}
    signature = {n: kinds.get(n, "i32") for n in kernel.arg_names}
    divisible = ["pixels_ptr", "out_ptr", "row_elements", *(STRIDES if whole_rows else [])]
    attrs = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in divisible}
    # Constants of the signature are given by position, as a launch gives them.
    by_position = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    compiled = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=by_position, attrs=attrs),
                              target=GPUTarget("cuda", capability, 32),
                              options={"num_warps": op.NUM_WARPS, "enable_fp_fusion": False})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.check_output([TOOLS / "cuobjdump", "--dump-resource-usage", cubin.name], text=True)
        sass = subprocess.check_output([TOOLS / "nvdisasm", cubin.name], text=True)
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    count = lambda pattern: len(re.findall(pattern, sass))
    return {"registers": registers, "stack": stack, "local": local, "spills": count(r"\b(LDL|STL)\b"),
            "fused": count(r"\bFFMA"), "wide_stores": count(r"\bSTG\.E\.128\b"),
            "wide_loads": count(r"\bLDG\.E\.(64|128)(\.CONSTANT)?\b")}


variants = [("u8", "bf16", 1, 16, False), ("u8", "bf16", 4, 8, True), ("fp32", "fp16", 1, 16, True),
            ("bf16", "fp32", 2, 3, False)]
for capability in (80, 90, 100):
    for (source, target, q, p, pad_zero), whole_rows in itertools.product(variants, (True, False)):
        found = resources(capability, source, target, q, p, pad_zero, whole_rows)
        print(f"sm_{capability} {source}->{target} {q}x{p} pad_zero={pad_zero} whole_rows={whole_rows}", found)
        assert found["stack"] == found["local"] == found["spills"] == 0, found
        assert found["fused"] == 0, "product and sum must be rounded separately"
        assert found["wide_stores"] > 0, "stores are to be 16 bytes wide"
        assert found["registers"] <= 128, found
        if whole_rows and p % 8 == 0:
            assert found["wide_loads"] > 0, "interleaved rows are to be read by wide loads"
print("compiled")
"""


@pytest.mark.long
def test_machine_code_ahead_of_time(tmp_path):
    result = run_python(COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    print(result.stdout)
    assert result.stdout.strip().endswith("compiled"), result.stdout + result.stderr


def test_the_package_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; import vitok.kernels; print('imported')"
    result = run_python(code)
    assert result.stdout.strip() == "imported", result.stderr
