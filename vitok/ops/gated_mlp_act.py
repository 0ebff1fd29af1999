"""gated_mlp_act: act(gate) * up, both halves of one projection (Shazeer, arXiv:2002.05202).

One pass forward and one backward, the halves read where they lie: no activation is kept beside gate_up itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from vitok import _native
from vitok.errors import InputError
from vitok.ops import _triton
from vitok.ops._library import define, differentiable_once, kernels
from vitok.ops._registry import Implementation, Op
from vitok.ops._tensors import as_rows, check_float

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}


def gated_mlp_act(gate_up: Tensor, *, gate: str = "silu", impl: str = "auto") -> Tensor:
    """Gate one half of a projection with the other: act(gate_up[..., :hidden]) * gate_up[..., hidden:].

    Args:
        gate_up: [..., 2 * hidden], floating point, the gate in the first half. Rows may be any fixed distance apart, as
            those of a slice of a wider projection are; other layouts are copied first.
        gate: "silu", x / (1 + e^-x), or "gelu", x / 2 * (1 + erf(x / sqrt 2)).
        impl: "auto", "native", "triton" or "reference".

    Returns: [..., hidden] in the dtype of gate_up, contiguous. The kernels compute in float32 (float64 for float64) and
    round once. Differentiable; their backward pass saves gate_up alone. Raises InputError for a wrong shape, dtype or
    gate.

    >>> gated_mlp_act(torch.tensor([[0.0, 2.0, 3.0, 4.0]])).round(decimals=3)
    tensor([[0.0000, 7.0460]])
    """
    if gate not in tuple(_ACTIVATIONS):
        raise InputError(f"gate must be one of {', '.join(_ACTIVATIONS)}, got {gate!r}")
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise InputError(f"gate_up must have an even last dimension, got {list(gate_up.shape)}")
    check_float("gate_up", gate_up)
    return _OP(impl, gate_up, gate)


def reference(gate_up: Tensor, gate: str) -> Tensor:
    first, second = gate_up.chunk(2, dim=-1)
    return _ACTIVATIONS[gate](first) * second


def _empty_forward(impl: str, gate_up: Tensor, gate: str) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _forward(impl: str, gate_up: Tensor, gate: str) -> Tensor:
    out = _empty_forward(impl, gate_up, gate)
    if out.numel() == 0:
        return out
    hidden = out.shape[-1]
    rows = out.numel() // hidden
    gate_up, stride = as_rows(gate_up)
    if impl == "triton":
        from vitok.kernels import gated_mlp_act as kernel

        kernel.gated_mlp_act_forward(gate_up, out, rows, hidden, stride, gate)
        return out
    _native.run(
        "gated_mlp_act_forward", gate_up,
        gate_up.data_ptr(), _native.DTYPE[gate_up.dtype], rows, hidden, stride, gate == "gelu", out.data_ptr(),
    )  # fmt: skip
    return out


def _empty_backward(impl: str, grad: Tensor, gate_up: Tensor, gate: str) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _backward(impl: str, grad: Tensor, gate_up: Tensor, gate: str) -> Tensor:
    grad_gate_up = _empty_backward(impl, grad, gate_up, gate)
    if grad_gate_up.numel() == 0:
        return grad_gate_up
    hidden = grad.shape[-1]
    rows = grad.numel() // hidden
    gate_up, stride = as_rows(gate_up)
    grad, grad_stride = as_rows(grad)
    if impl == "triton":
        from vitok.kernels import gated_mlp_act as kernel

        kernel.gated_mlp_act_backward(grad, gate_up, grad_gate_up, rows, hidden, grad_stride, stride, gate)
        return grad_gate_up
    _native.run(
        "gated_mlp_act_backward", gate_up,
        grad.data_ptr(), gate_up.data_ptr(), _native.DTYPE[gate_up.dtype], rows, hidden, grad_stride, stride,
        gate == "gelu", grad_gate_up.data_ptr(),
    )  # fmt: skip
    return grad_gate_up


_FORWARD = define("gated_mlp_act_forward(str impl, Tensor gate_up, str gate) -> Tensor", _forward, _empty_forward)
_BACKWARD = define(
    "gated_mlp_act_backward(str impl, Tensor grad, Tensor gate_up, str gate) -> Tensor", _backward, _empty_backward
)


class _GatedMlpAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, impl, gate_up, gate):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gate_up)
        ctx.impl, ctx.gate = impl, gate
        return _FORWARD(impl, gate_up, gate)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (gate_up,) = ctx.saved_tensors
        return None, _BACKWARD(ctx.impl, grad, gate_up, ctx.gate), None


def _run(impl: str, gate_up: Tensor, gate: str) -> Tensor:
    if gate_up.requires_grad and torch.is_grad_enabled():
        return _GatedMlpAct.apply(impl, gate_up, gate)
    return _FORWARD(impl, gate_up, gate)


def _native_refuses(gate_up: Tensor, gate: str) -> str:
    return _native.refuses(gate_up)


def _triton_refuses(gate_up: Tensor, gate: str) -> str:
    return _triton.refuses(gate_up)


_OP = Op(
    "gated_mlp_act",
    *kernels(_run, _native_refuses, _triton_refuses),
    Implementation("reference", reference),
    pointwise=True,
)
