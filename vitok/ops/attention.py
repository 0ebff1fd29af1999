"""attention: softmax(Q K' / sqrt(d)) V over the packed projection, bidirectional."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vitok.errors import InputError
from vitok.ops._registry import Implementation, Op


def attention(qkv: Tensor, *, impl: str = "auto") -> Tensor:
    """Attend from every token to every token.

    Args:
        qkv: [B, L, 3, heads, head_dim], floating point (Vaswani et al., arXiv:1706.03762).
        impl: "auto", "sdpa" (torch's fused attention; memory linear in L) or "reference" (the L x L matrix is built).

    Returns: [B, L, heads, head_dim] in the dtype of qkv. Differentiable.

    >>> attention(torch.ones(1, 5, 3, 2, 8)).shape
    torch.Size([1, 5, 2, 8])
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise InputError(f"qkv must be [B, L, 3, heads, head_dim], got {list(qkv.shape)}")
    return _OP(impl, qkv)


def reference(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    compute = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    return (scores.softmax(-1, dtype=compute).to(v.dtype) @ v).transpose(1, 2)


def _sdpa(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


_OP = Op("attention", Implementation("sdpa", _sdpa), Implementation("reference", reference))
