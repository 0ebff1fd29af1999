"""Tests of ops run with uninitialised memory full of NaN, so that an element nobody wrote is seen."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

with torch.device("cpu"):  # torch remembers its constructors at the first such block, which must be the real ones
    torch.empty(0)


def _poison(x: Tensor) -> Tensor:
    if x.is_floating_point() and x.device.type in ("cpu", "cuda") and type(x) is Tensor:
        x.detach().fill_(math.nan)
    return x


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: _poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: _poison(empty_like(*args, **kwargs)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: _poison(new_empty(*args, **kwargs)))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(["-DVITOK_EMULATE_BF16"], id="pairs"),
        pytest.param(["-DVITOK_EMULATE_BF16", "-DVITOK_EMULATE_AMX"], id="tiles"),
    ],
)
def compile_emulating(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, usable_isas: Sequence[str]
) -> Callable[[str, Sequence[Path]], ctypes.CDLL]:
    """Makes a library of a source and CPU kernels, in which AVX-512 emulates dot products of bf16, or AMX as well."""
    sources = Path(__file__).parents[2] / "csrc"
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or "avx512" not in usable_isas or not sources.is_dir():
        pytest.skip("needs the sources, a C++ compiler and AVX-512")

    def compile(source: str, kernels: Sequence[Path]) -> ctypes.CDLL:
        folder = tmp_path_factory.mktemp("emulated")
        (folder / "emulated.cpp").write_text(source)
        subprocess.run(
            [
                compiler, "-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-mavx2", "-mfma", "-mf16c",
                "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *request.param, "-DVITOK_ISA=avx512",
                f"-I{sources}", "emulated.cpp", *map(str, kernels), "-o", "emulated.so",
            ],
            cwd=folder, check=True, timeout=600,
        )  # fmt: skip
        return ctypes.CDLL(str(folder / "emulated.so"))

    return compile
