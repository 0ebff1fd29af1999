"""gated_mlp_act: act(gate) * up, both halves of one projection (Shazeer, arXiv:2002.05202)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from vitok.errors import InputError
from vitok.ops._registry import Implementation, Op

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}


def gated_mlp_act(gate_up: Tensor, *, gate: str = "silu", impl: str = "auto") -> Tensor:
    """Gate one half of a projection with the other.

    Args:
        gate_up: [..., 2 * hidden], the gate in the first half.
        gate: "silu" or "gelu" (exact, by erf).
        impl: "auto" or "reference".

    Returns: [..., hidden] in the dtype of gate_up. Differentiable.

    >>> gated_mlp_act(torch.zeros(1, 6)).shape
    torch.Size([1, 3])
    """
    if gate not in _ACTIVATIONS:
        raise InputError(f"gate must be one of {', '.join(_ACTIVATIONS)}, got {gate!r}")
    if gate_up.shape[-1] % 2:
        raise InputError(f"gate_up must have an even last dimension, got {list(gate_up.shape)}")
    return _OP(impl, gate_up, gate)


def reference(gate_up: Tensor, gate: str) -> Tensor:
    first, second = gate_up.chunk(2, dim=-1)
    return _ACTIVATIONS[gate](first) * second


_OP = Op("gated_mlp_act", Implementation("reference", reference))
