"""Tests of ops run with uninitialised memory full of NaN, so that an element nobody wrote is seen."""

from __future__ import annotations

import math

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
