"""Ten runs of every op give the same bits, with torch's deterministic algorithms asked for."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_ten_runs(shared, make, impl, number, dtype):
    given = make(dtype, number)
    first = shared["evaluate"](given, impl)
    for _ in range(9):
        for name, x in shared["evaluate"](given, impl).items():
            assert torch.equal(first[name], x), name
