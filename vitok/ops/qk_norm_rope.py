"""qk_norm_rope: optional per-head RMS norm of q and k, then rotary positions, on the packed projection.

For channel i < d/2 of a head, with angle a = a(token, i):
    y[i]       = x[i] cos a - x[i + d/2] sin a
    y[i + d/2] = x[i + d/2] cos a + x[i] sin a
The pairs are halves apart, so that a kernel reads two contiguous runs (Su et al., arXiv:2104.09864).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitok.errors import InputError
from vitok.ops._registry import Implementation, Op
from vitok.ops.norm import reference as norm


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    table: Tensor | None = None,
    *,
    eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """Normalise and rotate q and k of a packed projection; v passes through.

    Args:
        qkv: [B, L, 3, heads, head_dim], floating point.
        q_weight, k_weight: [head_dim] weights of the RMS norm of each head of q and k, or both None for no norm.
        table: [2, L, head_dim / 2] float32 cosines and sines (`vitok.positions.rope_table`), or None for no rotation.
        eps: of the norm.
        impl: "auto" or "reference".

    Returns: [B, L, 3, heads, head_dim] in the dtype of qkv; arithmetic in float32 (float64 for float64).
    Differentiable.

    >>> qk_norm_rope(torch.ones(1, 1, 3, 2, 8), table=torch.stack((torch.ones(1, 4), torch.zeros(1, 4)))).sum().item()
    48.0
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise InputError(f"qkv must be [B, L, 3, heads, head_dim], got {list(qkv.shape)}")
    if table is not None and table.shape != (2, qkv.shape[1], qkv.shape[4] // 2):
        raise InputError(
            f"table must be [2, {qkv.shape[1]}, {qkv.shape[4] // 2}] for this qkv, got {list(table.shape)}"
        )
    return _OP(impl, qkv, q_weight, k_weight, table, eps)


def reference(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, table: Tensor | None, eps: float
) -> Tensor:
    qk, v = qkv[:, :, :2], qkv[:, :, 2:]
    wide = qk if qk.dtype == torch.float64 else qk.float()
    if q_weight is not None and k_weight is not None:
        wide = norm(wide, torch.stack((q_weight, k_weight))[:, None], None, "rms", eps)
    if table is not None:
        cos, sin = table.to(wide.dtype)[:, :, None, None]
        first, second = wide.chunk(2, dim=-1)
        wide = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((wide.to(qkv.dtype), v), dim=2)


_OP = Op("qk_norm_rope", Implementation("reference", reference))
