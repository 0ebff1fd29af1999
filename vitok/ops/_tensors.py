"""What ops ask of their arguments, and of a tensor before its address goes to a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from vitok.errors import InputError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_float(name: str, x: Tensor) -> None:
    """InputError for anything but the four dtypes that kernels compute on."""
    if x.dtype not in FLOATS:
        raise InputError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")


def check_eps(eps: float) -> None:
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 <= eps < float("inf"):
        raise InputError(f"eps must be a finite number of at least 0, got {eps!r}")


def is_integer(n: object, least: int) -> bool:
    return isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) and n >= least


def check_integers(name: str, values: object, wanted: str) -> None:
    """InputError unless `values` are as many integers of at least 1 as `wanted` names, such as "(T, H, W)"."""
    if (
        not isinstance(values, (tuple, list))
        or len(values) != wanted.count(",") + 1
        or not all(is_integer(n, 1) for n in values)
    ):
        raise InputError(f"{name} must be {wanted}, integers of at least 1, got {values!r}")


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
