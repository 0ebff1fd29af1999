"""Kernels as operators of torch: schema, fake tensors and devices, in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("vitok", "FRAGMENT")


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register `vitok::<name>` and return the callable operator.

    Args:
        schema: "name(Tensor x, ...) -> Tensor"; of the arguments, the first is by convention `str impl`.
        run: computes it, on the CPU and on CUDA.
        fake: allocates what `run` returns, with its strides, and computes nothing.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"vitok::{name}", fake, lib=_LIBRARY)
    operator: Callable[..., Any] = getattr(torch.ops.vitok, name).default
    return operator
