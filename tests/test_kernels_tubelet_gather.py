"""The Triton tubelet gather without a GPU: its machine code for every GPU generation."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs triton")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=600
    )


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
