"""Tests that need a CUDA device; without one the folder is skipped."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Before cuBLAS is initialised: what torch.use_deterministic_algorithms wants of it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

SHARED = runpy.run_path(str(Path(__file__).parents[1] / "op_cases.py"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`op` and `number` stand for every case of every op, `impl` for what replaces the reference."""
    if "number" in metafunc.fixturenames:
        cases = [(op, n) for op, parameters in SHARED["CASES"].items() for n in range(len(parameters))]
        metafunc.parametrize(("op", "number"), cases)
    elif "op" in metafunc.fixturenames:
        metafunc.parametrize("op", list(SHARED["CASES"]))
    if "impl" in metafunc.fixturenames:
        metafunc.parametrize("impl", ["native", "triton"])


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    """No TF32: float32 is to mean float32 in what is compared."""
    saved = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = saved


@pytest.fixture(autouse=True)
def _one_process_a_fault() -> Iterator[None]:
    """After an access outside a tensor nothing runs in the process any more: pytest-xdist replaces one that ends."""
    yield
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"the CUDA context is lost: {error}", file=sys.__stderr__, flush=True)
            os._exit(1)


@pytest.fixture
def shared() -> dict[str, Any]:
    """The names of tests/op_cases.py."""
    return SHARED


@pytest.fixture
def make(op: str, impl: str) -> Any:
    """`make(dtype, number)`: case `number` of the op on the GPU; skips with the reason where `impl` cannot run here."""
    if reason := SHARED["unavailable"](op, impl, "cuda"):
        pytest.skip(reason)

    def sample(dtype: torch.dtype, number: int = 0) -> Any:
        return SHARED["sample"](op, dtype, "cuda", **SHARED["CASES"][op][number])

    return sample
