"""Whether Triton kernels can run: on CUDA tensors, and in Triton's interpreter (TRITON_INTERPRET=1) on CPU tensors."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _missing() -> str:
    try:
        found = importlib.util.find_spec("triton") is not None
    except ValueError:  # a module without a spec stands in for it
        found = False
    return "" if found else "triton is not installed; `pip install vitok[triton]` brings it"


# On the CPU Triton is its interpreter, which is for tests and never what "auto" wants.
DEVICES = ("cuda",)
MISSING = _missing()  # why Triton cannot be used at all, or ""


def refuses(tensor: Tensor, *dtypes: torch.dtype | None) -> str:
    """Why no Triton kernel can take this tensor and others of these dtypes, or ""."""
    if torch.float64 in (tensor.dtype, *dtypes):
        return "it computes in float32"
    if tensor.is_cuda or _INTERPRETED:
        return ""
    return f"Triton kernels take CUDA tensors (any, with TRITON_INTERPRET=1), got one on {tensor.device.type!r}"
