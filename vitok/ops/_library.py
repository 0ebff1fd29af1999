"""Kernels as operators of torch (schema, fake tensors and devices in one call) and as implementations of an op."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from vitok import _native
from vitok.ops import _triton
from vitok.ops._registry import Implementation

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_LIBRARY = torch.library.Library("vitok", "FRAGMENT")


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register `vitok::<name>` and return a function that computes it.

    The function goes through torch's dispatcher where somebody watches it (the compiler, a mode, a tensor subclass) and
    else straight to `run`, which saves several microseconds a call.

    Args:
        schema: "name(str impl, Tensor x, ...) -> Tensor"; the implementation, then a tensor, then anything.
        run: computes it, on the CPU and on CUDA.
        fake: allocates what `run` returns, with its strides, and computes nothing.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"vitok::{name}", fake, lib=_LIBRARY)
    operator: Callable[..., Any] = getattr(torch.ops.vitok, name).default

    def call(*args: Any) -> Any:
        tensor = args[1]
        watched = torch.compiler.is_compiling() or _len_torch_dispatch_stack() or type(tensor) not in _PLAIN
        return operator(*args) if watched or tensor.is_meta else run(*args)

    return call


def kernels(
    run: Callable[..., Any], native_refuses: Callable[..., str], triton_refuses: Callable[..., str]
) -> tuple[Implementation, Implementation]:
    """The implementations "native" and "triton" of an op, both computed by `run(impl, *args)`."""
    return (
        Implementation("native", partial(run, "native"), missing=_native.reason(), refuses=native_refuses),
        Implementation("triton", partial(run, "triton"), missing=_triton.MISSING, refuses=triton_refuses),
    )
