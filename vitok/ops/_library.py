"""Kernels as operators of torch (schema, fake tensors and devices in one call) and as implementations of an op."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from vitok import _native
from vitok.ops import _triton
from vitok.ops._registry import Implementation

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_LIBRARY = torch.library.Library("vitok", "FRAGMENT")


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register `vitok::<name>` and return a function that computes it.

    The function goes through torch's dispatcher where somebody watches it (the compiler, a mode, a tensor subclass) or
    has left something to do (a lazy negation) and else straight to `run`, which saves several microseconds a call.

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
        if torch.compiler.is_compiling() or _len_torch_dispatch_stack() or type(args[1]) not in _PLAIN:
            return operator(*args)
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)
        for x in args:
            if isinstance(x, torch.Tensor) and (x.is_neg() or x.is_meta):
                return operator(*args)
        return run(*args)

    return call


def _refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    for x in args:
        if isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(f"{name} has no forward-mode derivative; impl='reference' has one")


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the backward of an autograd.Function refuse create_graph, rather than give a gradient that lacks terms.

    Torch's own `once_differentiable` notices only where the incoming gradient has a graph.
    """

    @wraps(backward)
    def run(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "vitok's kernels have no gradient of a gradient (create_graph); impl='reference' has one"
            )
        return backward(ctx, *gradients)

    return run


def kernels(
    run: Callable[..., Any], native_refuses: Callable[..., str], triton_refuses: Callable[..., str]
) -> tuple[Implementation, Implementation]:
    """The implementations "native" and "triton" of an op, both computed by `run(impl, *args)`."""
    return (
        Implementation("native", partial(run, "native"), missing=_native.reason(), refuses=native_refuses),
        Implementation("triton", partial(run, "triton"), _triton.MISSING, triton_refuses, devices=_triton.DEVICES),
    )
