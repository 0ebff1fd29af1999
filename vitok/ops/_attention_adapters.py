"""Attention of other libraries behind vitok's interface: torch's SDPA by backend, flash-attn 2, 3 and 4, xformers.

Each adapter takes the positional arguments of the op. q and k are normalised and rotated by `qk_norm_rope` first; masks
are said in the library's own words, or refused with the reason. Nothing is imported before an adapter runs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitok.ops._registry import Implementation
from vitok.ops.qk_norm_rope import qk_norm_rope

MASK_LENGTH = 4096  # an explicit L x L mask is built up to here: 16 MiB of bool
_SDPA_BACKENDS = {
    "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION", "math": "MATH",
}  # fmt: skip


def _rotated(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, table: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    """q, k, v [B, L, heads, head_dim], q and k normalised and rotated."""
    if q_weight is not None or table is not None:
        qkv = qk_norm_rope(qkv, q_weight, k_weight, table, eps=eps)
    return qkv.unbind(2)


def _sdpa_mask(length: int, window: int, causal_block: int) -> str:
    """How SDPA is told: "none", "causal" or "mask"."""
    whole_window, whole_block = window < 0 or window >= length - 1, causal_block == 0 or causal_block >= length
    if whole_window and whole_block:
        return "none"
    return "causal" if whole_window and causal_block == 1 else "mask"


def _readable(cu_seqlens: Tensor) -> bool:
    """May the host look at the segments: without waiting for a GPU, without breaking a traced graph."""
    return cu_seqlens.is_cpu and not torch.compiler.is_compiling()


def _sdpa_refuses(
    backend: str,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    table: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    window: int,
    causal_block: int,
) -> str:
    length, how = qkv.shape[1], _sdpa_mask(qkv.shape[1], window, causal_block)
    if cu_seqlens is not None and _readable(cu_seqlens):
        length = int(cu_seqlens.diff().max())
        how = _sdpa_mask(length, window, causal_block)
    elif cu_seqlens is not None:
        how = "mask"
    if how == "mask" and length > MASK_LENGTH:
        return f"this mask takes a {length} x {length} matrix there; at most {MASK_LENGTH} tokens"
    if how == "mask" and backend == "flash":
        return "torch's flash attention takes no mask other than causal"
    if not qkv.is_cuda and backend in ("efficient", "cudnn"):
        return f"torch has {backend} attention on CUDA only, qkv is on {qkv.device.type!r}"
    return ""


def _sdpa_plain(q: Tensor, k: Tensor, v: Tensor, window: int, causal_block: int, cu_seqlens: Tensor | None) -> Tensor:
    """[B, heads, L, head_dim] each."""
    length, mask = q.shape[2], None
    how = _sdpa_mask(length, window, causal_block) if cu_seqlens is None else "mask"
    if how == "mask":
        from vitok.ops.attention import key_bounds

        first, last = key_bounds(length, window, causal_block, cu_seqlens, q.device)
        keys = torch.arange(length, device=q.device)
        mask = (keys >= first[:, None]) & (keys < last[:, None])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=how == "causal")


def _sdpa(
    backend: str,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    table: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    window: int,
    causal_block: int,
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in _rotated(qkv, q_weight, k_weight, table, eps))
    if backend:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, _SDPA_BACKENDS[backend])):
            return _sdpa_segments(q, k, v, window, causal_block, cu_seqlens).transpose(1, 2)
    return _sdpa_segments(q, k, v, window, causal_block, cu_seqlens).transpose(1, 2)


def _sdpa_segments(
    q: Tensor, k: Tensor, v: Tensor, window: int, causal_block: int, cu_seqlens: Tensor | None
) -> Tensor:
    if cu_seqlens is None or not _readable(cu_seqlens):
        return _sdpa_plain(q, k, v, window, causal_block, cu_seqlens)
    lengths = cu_seqlens.diff().tolist()
    parts = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    return torch.cat([_sdpa_plain(a, b, c, window, causal_block, None) for a, b, c in parts], dim=2)


def implementations() -> list[Implementation]:
    """All adapters, the preferred first."""
    made: list[Implementation] = []

    def add(name: str, run: Any, refuses: Any, missing: str = "") -> None:
        made.append(Implementation(name, run, missing=missing, refuses=refuses))

    for backend in ("", *_SDPA_BACKENDS):
        name = f"sdpa:{backend}" if backend else "sdpa"
        add(name, partial(_sdpa, backend), partial(_sdpa_refuses, backend))
    return made
