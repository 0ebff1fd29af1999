"""norm: layer norm or RMS norm over the last dimension, statistics in float32 (float64 for float64)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vitok.errors import InputError
from vitok.ops._registry import Implementation, Op


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None = None, *, kind: str, eps: float, impl: str = "auto"
) -> Tensor:
    """Normalise rows.

    kind "layer": (x - mean) / sqrt(var + eps) * weight + bias (Ba et al., arXiv:1607.06450);
    kind "rms": x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, arXiv:1910.07467).

    Args:
        x: [..., width], floating point.
        weight, bias: [width] or None.
        impl: "auto" or "reference".

    Returns: the shape and dtype of x. Differentiable in all tensors.

    >>> norm(torch.ones(2, 4), None, kind="rms", eps=0.0)[0, 0].item()
    1.0
    """
    if kind not in ("layer", "rms"):
        raise InputError(f"kind must be 'layer' or 'rms', got {kind!r}")
    return _OP(impl, x, weight, bias, kind, eps)


def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float) -> Tensor:
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = x.double() if x.dtype == torch.float64 else x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    return (y if bias is None else y + bias).to(x.dtype)


_OP = Op("norm", Implementation("reference", reference))
