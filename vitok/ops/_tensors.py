"""What ops ask of a tensor before its address goes to a kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of arithmetic on x: float32, float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def address(x: Tensor | None) -> int:
    """0 says that there is no tensor."""
    return 0 if x is None else x.data_ptr()


def neighbouring(x: Tensor) -> Tensor:
    """x with the elements of its last dimension side by side; a copy where they are not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """x as rows of neighbouring elements, and their distance. A copy where no single stride leads through all rows."""
    width = x.shape[-1]
    if x.is_contiguous():
        return x, width
    flat = neighbouring(x.reshape(-1, width))
    return flat, flat.stride(0)
