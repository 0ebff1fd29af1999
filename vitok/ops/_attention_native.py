"""The native CPU attention behind `vitok.ops.attention`: what it takes, its scratch memory and its two calls.

The kernel works on `slots` heads at a time. For each it keeps a few packed matrices of [L, head_dim] numbers of 4 bytes
(8 in float64), rows padded to 16 and tokens to 192, so scratch grows linearly with the length and the threads, and not
with the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitok import _native
from vitok.ops._tensors import address, compute_dtype, neighbouring

HEAD_PADDING, TOKEN_PADDING = 16, 192  # as csrc/common/attention.h has them
FORWARD_MATRICES, FORWARD_MATRICES_FLOAT64, BACKWARD_MATRICES = 2, 3, 8
MAX_HEAD_DIM = 256
# Short heads are packed several at a time, so that threads meet less often; this many tokens still fit a core's cache.
SLOT_TOKENS = 1024


def refuses(qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, table: Tensor | None, *_: object) -> str:
    """Why the kernel cannot take these arguments, or ""."""
    head_dim = qkv.shape[-1]
    if qkv.dtype != torch.float64 and (head_dim % 8 or head_dim > MAX_HEAD_DIM):
        return f"head_dim must be a multiple of 8 up to {MAX_HEAD_DIM}, got {head_dim}"
    return _native.refuses(qkv, q_weight, k_weight, table)


def _padded(n: int, step: int) -> int:
    return -(-n // step) * step


def _scratch(qkv: Tensor, slots: int, matrices: int, extra: int) -> Tensor:
    """Uninitialised memory: an interval of keys a token, the slots' matrices, `extra` fp32 numbers, alignment."""
    length, head_dim = qkv.shape[1], qkv.shape[4]
    element = 8 if qkv.dtype == torch.float64 else 4
    tokens = _padded(length, TOKEN_PADDING)
    size = 16 * tokens + slots * matrices * tokens * _padded(head_dim, HEAD_PADDING) * element + 4 * extra + 128
    return qkv.new_empty((size,), dtype=torch.uint8)


def _inputs(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    table: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """What the kernel reads: heads side by side, weights of one dtype, the table in what it computes in, int64 ends."""
    qkv = neighbouring(qkv)
    if q_weight is not None and k_weight is not None:
        common = torch.promote_types(q_weight.dtype, k_weight.dtype)
        q_weight, k_weight = q_weight.to(common).contiguous(), k_weight.to(common).contiguous()
    if table is not None:
        table = table.to(compute_dtype(qkv)).contiguous()
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.long().contiguous()
    return qkv, q_weight, k_weight, table, cu_seqlens


def _arguments(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    table: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    window: int,
    causal_block: int,
    lse: Tensor,
    scratch: Tensor,
    slots: int,
) -> tuple[object, ...]:
    batch, length, _, heads, head_dim = qkv.shape
    return (
        qkv.data_ptr(), _native.DTYPE[qkv.dtype], (batch, length, heads, head_dim), qkv.stride()[:4],
        address(q_weight), address(k_weight), "float32" if q_weight is None else _native.DTYPE[q_weight.dtype],
        address(table), eps, window, causal_block,
        address(cu_seqlens), 0 if cu_seqlens is None else len(cu_seqlens) - 1,
        lse.data_ptr(), scratch.data_ptr(), scratch.numel(), slots,
    )  # fmt: skip


def forward(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    table: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    window: int,
    causal_block: int,
) -> tuple[Tensor, Tensor]:
    """out [B, L, heads, head_dim] and the logarithm of each row's sum of exponentials [B, heads, L]."""
    qkv, q_weight, k_weight, table, cu_seqlens = _inputs(qkv, q_weight, k_weight, table, cu_seqlens)
    batch, length, _, heads, head_dim = qkv.shape
    wide = compute_dtype(qkv)
    out = qkv.new_empty((batch, length, heads, head_dim))
    lse = qkv.new_empty((batch, heads, length), dtype=wide)
    if out.numel() == 0:
        return out, lse
    slots = min(batch * heads, torch.get_num_threads() * max(1, SLOT_TOKENS // length))
    scratch = _scratch(qkv, slots, FORWARD_MATRICES_FLOAT64 if wide == torch.float64 else FORWARD_MATRICES, 0)
    arguments = _arguments(qkv, q_weight, k_weight, table, cu_seqlens, eps, window, causal_block, lse, scratch, slots)
    _native.run("attention_forward", qkv, *arguments, out.data_ptr())
    return out, lse


def backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    table: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    window: int,
    causal_block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv (contiguous), q_weight and k_weight (empty where there is none). Incoming ones are read by
    stride, and copied if the elements of a head do not lie side by side."""
    grad = neighbouring(grad)
    dtypes = [None if w is None else w.dtype for w in (q_weight, k_weight)]
    qkv, q_weight, k_weight, table, cu_seqlens = _inputs(qkv, q_weight, k_weight, table, cu_seqlens)
    batch, length, _, heads, head_dim = qkv.shape
    dqkv = qkv.new_empty(qkv.shape)
    weights = [qkv.new_empty((0,)) if w is None else w.new_empty(w.shape) for w in (q_weight, k_weight)]
    if dqkv.numel() == 0:
        return dqkv, weights[0].zero_(), weights[1].zero_()
    slots = min(batch * heads, torch.get_num_threads())
    partials = 0
    if q_weight is not None:
        stretches = -(-length // TOKEN_PADDING)
        partials = batch * heads * stretches * 2 * _padded(head_dim, HEAD_PADDING)
    scratch = _scratch(qkv, slots, BACKWARD_MATRICES, slots * 2 * _padded(length, TOKEN_PADDING) + partials)
    arguments = _arguments(qkv, q_weight, k_weight, table, cu_seqlens, eps, window, causal_block, lse, scratch, slots)
    _native.run(
        "attention_backward", qkv, *arguments,
        out.data_ptr(), grad.data_ptr(), grad.stride()[:3], dqkv.data_ptr(),
        *(0 if w is None else d.data_ptr() for w, d in zip((q_weight, k_weight), weights, strict=True)),
    )  # fmt: skip
    dq_weight, dk_weight = (d if dtype is None else d.to(dtype) for d, dtype in zip(weights, dtypes, strict=True))
    return dqkv, dq_weight, dk_weight
