"""attention: softmax(Q K' / sqrt(d)) V over the packed projection, with QK-norm, rotary positions and masks.

Every mask is one interval of keys for each query i, the intersection of those asked for:
    full            0 <= j < L
    window r        i - r <= j <= i + r
    causal_block c  j < (i // c + 1) c         1 is causal, h * w tokens is block-causal in time
    cu_seqlens      the segment of i; i, j and c then count from the segment's start
and the queries that see key j are an interval too, so that kernels skip whole blocks on either side. Sources:
Vaswani et al., arXiv:1706.03762; memory linear in L as in Dao et al., arXiv:2205.14135.
"""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import torch
from torch import Tensor

from vitok.errors import InputError
from vitok.ops import _attention_adapters, _attention_native, _triton
from vitok.ops._library import define, differentiable_once, kernels
from vitok.ops._registry import Implementation, Op
from vitok.ops._tensors import check_eps, check_float, compute_dtype, neighbouring
from vitok.ops.qk_norm_rope import qk_norm_rope

FAR = 2**30  # a window or block this large is the whole sequence; sums of two of them stay within int32
MAX_HEAD_DIM = 256


def attention(
    qkv: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    table: Tensor | None = None,
    *,
    eps: float = 1e-6,
    window: int | None = None,
    causal_block: int | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Normalise and rotate q and k as `qk_norm_rope` does, then attend from every token to the keys its masks leave.

    Args:
        qkv: [B, L, 3, heads, head_dim], floating point, read by stride (copied if the last stride is not 1). head_dim
            is even when there is a table.
        q_weight, k_weight: [head_dim] weights of the RMS norm of each head of q and k, or both None for no norm.
        table: [2, L, head_dim / 2] float32 cosines and sines (`vitok.positions.rope_table`), or None for no rotation.
        eps: of the norm.
        window: r >= 0: only keys at most r tokens away, in the order of the sequence. None for all.
        causal_block: c >= 1: only keys of the query's own block of c tokens and of those before it. None for all.
        cu_seqlens: [S + 1] int32 or int64 on qkv's device, 0 = cu[0] <= ... <= cu[S] = L: tokens attend within their
            segment; B must be 1. The values are checked on the CPU outside torch.compile; else wrong ones give wrong
            numbers from our kernels, but never an access outside a tensor.
        impl: "auto", "native", "triton", "sdpa" (torch chooses), "sdpa:flash", "sdpa:efficient", "sdpa:cudnn",
            "sdpa:math", "flash_attn", "xformers" or "reference" (builds the L x L matrix).

    Returns: [B, L, heads, head_dim] in the dtype of qkv. Differentiable in qkv and the weights. Raises InputError for
    wrong arguments and ImplementationError where the implementation named cannot take them.

    >>> attention(torch.ones(1, 5, 3, 2, 8), window=1).shape
    torch.Size([1, 5, 2, 8])
    """
    _check(qkv, q_weight, k_weight, table, window, causal_block, cu_seqlens)
    check_eps(eps)
    return _OP(
        impl, qkv, q_weight, k_weight, table, cu_seqlens, float(eps),
        -1 if window is None else min(window, FAR), 0 if causal_block is None else min(causal_block, FAR),
    )  # fmt: skip


def _check(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    table: Tensor | None,
    window: int | None,
    causal_block: int | None,
    cu_seqlens: Tensor | None,
) -> None:
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise InputError(f"qkv must be [B, L, 3, heads, head_dim], got {list(qkv.shape)}")
    check_float("qkv", qkv)
    batch, length, _, heads, head_dim = qkv.shape
    if heads == 0 or head_dim == 0:
        raise InputError(f"qkv must have at least one head and channel, got {list(qkv.shape)}")
    if (q_weight is None) != (k_weight is None):
        raise InputError("q_weight and k_weight must be given both or neither, got one")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is None:
            continue
        check_float(name, weight)
        if weight.shape != (head_dim,):
            raise InputError(f"{name} must be [{head_dim}] for this qkv, got {list(weight.shape)}")
    if q_weight is not None and k_weight is not None and q_weight.dtype != k_weight.dtype:
        raise InputError(f"k_weight must have the dtype of q_weight, {q_weight.dtype}, got {k_weight.dtype}")
    if table is not None:
        if head_dim % 2:
            raise InputError(f"qkv must have an even head_dim to be rotated by a table, got {head_dim}")
        if table.shape != (2, length, head_dim // 2) or table.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"table must be float32 or float64 [2, {length}, {head_dim // 2}] for this qkv, got {table.dtype} "
                f"{list(table.shape)}"
            )
    for name, number, least in (("window", window, 0), ("causal_block", causal_block, 1)):
        if number is not None and (
            isinstance(number, bool) or not isinstance(number, (int, torch.SymInt)) or number < least
        ):
            raise InputError(f"{name} must be an integer of at least {least} or None, got {number!r}")
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise InputError(
                f"cu_seqlens must be int32 or int64 [segments + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
            )
        if batch != 1:
            raise InputError(f"qkv must have a batch of 1 where cu_seqlens divides it, got {batch}")
    for name, x in (("q_weight", q_weight), ("k_weight", k_weight), ("table", table), ("cu_seqlens", cu_seqlens)):
        if x is not None and x.device != qkv.device:
            raise InputError(f"{name} must be on qkv's device {qkv.device}, got {x.device}")
    if cu_seqlens is not None and cu_seqlens.is_cpu and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != length or any(a > b for a, b in itertools.pairwise(ends)):
            shown = ends if len(ends) <= 8 else [*ends[:4], "...", *ends[-3:]]
            raise InputError(f"cu_seqlens must rise from 0 to the length {length}, got {shown}")


def key_bounds(
    length: int, window: int, causal_block: int, cu_seqlens: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """First and past-the-last key that each query sees, two int64 [L]; window -1 and causal_block 0 mean none."""
    at = torch.arange(length, device=device)
    first, last = torch.zeros_like(at), torch.full_like(at, length)
    if cu_seqlens is not None:
        ends = cu_seqlens.long()
        segment = torch.bucketize(at, ends[1:], right=True).clamp(max=len(ends) - 2)
        first, last = torch.minimum(ends[segment].clamp(min=0), at), ends[segment + 1].clamp(max=length)
    block_end = first + ((at - first) // causal_block + 1) * causal_block if causal_block else last
    if window >= 0:
        first, last = torch.maximum(first, at - window), torch.minimum(last, at + window + 1)
    return first, torch.maximum(torch.minimum(last, block_end), at + 1)


def reference(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    table: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    window: int,
    causal_block: int,
) -> Tensor:
    """Eager composition with an explicit mask; float64 when qkv is."""
    if q_weight is not None or table is not None:
        qkv = qk_norm_rope(qkv, q_weight, k_weight, table, eps=eps, impl="reference")
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    if window >= 0 or causal_block or cu_seqlens is not None:
        first, last = key_bounds(qkv.shape[1], window, causal_block, cu_seqlens, qkv.device)
        keys = torch.arange(qkv.shape[1], device=qkv.device)
        scores = scores.masked_fill((keys < first[:, None]) | (keys >= last[:, None]), -torch.inf)
    weights = scores.softmax(-1, dtype=compute_dtype(qkv)).to(v.dtype)
    return (weights @ v).transpose(1, 2).to(qkv.dtype)  # autocast multiplies in its own dtype


def _forward(impl: str, qkv: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    module: Any = importlib.import_module("vitok.kernels.attention") if impl == "triton" else _attention_native
    made: tuple[Tensor, Tensor] = module.forward(qkv, *args)
    return made


def _forward_empty(impl: str, qkv: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    batch, length, _, heads, head_dim = qkv.shape
    lse = qkv.new_empty((batch, heads, length), dtype=compute_dtype(qkv))
    return qkv.new_empty((batch, length, heads, head_dim)), lse


def _backward(impl: str, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    module: Any = importlib.import_module("vitok.kernels.attention_backward") if impl == "triton" else _attention_native
    made: tuple[Tensor, Tensor, Tensor] = module.backward(*args)
    return made


def _backward_empty(
    impl: str, grad: Tensor, out: Tensor, lse: Tensor, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    weights = (qkv.new_empty((0,)) if w is None else w.new_empty(w.shape) for w in (q_weight, k_weight))
    return qkv.new_empty(qkv.shape), *weights  # type: ignore[return-value]


# window -1 and causal_block 0 stand for None. lse is the natural logarithm of each row's sum of exponentials,
# [B, heads, L] in float32 (float64 for float64): 4 bytes beside the 2 * head_dim bytes of a row of out.
_ARGUMENTS = (
    "Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor? table, Tensor? cu_seqlens, "
    "float eps, SymInt window, SymInt causal_block"
)
_FORWARD = define(f"attention_forward(str impl, {_ARGUMENTS}) -> (Tensor out, Tensor lse)", _forward, _forward_empty)
_BACKWARD = define(
    f"attention_backward(str impl, Tensor grad, Tensor out, Tensor lse, {_ARGUMENTS}) -> "
    "(Tensor dqkv, Tensor dq_weight, Tensor dk_weight)",
    _backward,
    _backward_empty,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, impl, qkv, q_weight, k_weight, table, cu_seqlens, eps, window, causal_block):  # type: ignore[no-untyped-def]
        out, lse = _FORWARD(impl, qkv, q_weight, k_weight, table, cu_seqlens, eps, window, causal_block)
        ctx.save_for_backward(out, lse, qkv, q_weight, k_weight, table, cu_seqlens)
        ctx.impl, ctx.numbers = impl, (eps, window, causal_block)
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        saved = ctx.saved_tensors  # unpacked once: activation checkpointing allows no more
        dqkv, dq_weight, dk_weight = _BACKWARD(ctx.impl, grad, *saved, *ctx.numbers)
        weights = (dq_weight, dk_weight) if saved[3] is not None else (None, None)
        return None, dqkv, *weights, None, None, None, None, None


def _run(impl: str, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, *args: Any) -> Tensor:
    out: Tensor
    qkv = neighbouring(qkv)
    trained = any(x is not None and x.requires_grad for x in (qkv, q_weight, k_weight))
    if trained and torch.is_grad_enabled():
        out = _Attention.apply(impl, qkv, q_weight, k_weight, *args)
    else:
        out = _FORWARD(impl, qkv, q_weight, k_weight, *args)[0]
    return out


def _native_refuses(qkv: Tensor, *args: Any) -> str:
    if qkv.is_cuda:
        return "the native library has no CUDA attention: triton, sdpa, flash_attn and xformers serve it"
    return _attention_native.refuses(qkv, *args)


def _triton_refuses(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, table: Tensor | None, *args: Any
) -> str:
    for name, x in (("qkv", qkv), ("q_weight", q_weight), ("k_weight", k_weight), ("table", table)):
        if x is not None and x.dtype == torch.float64:
            return f"it computes in float32, {name} is torch.float64"
    if table is not None and table.dtype != torch.float32:
        return f"table must be float32 there, got {table.dtype}"
    if qkv.shape[-1] % 8 or qkv.shape[-1] > MAX_HEAD_DIM:
        return f"head_dim must be a multiple of 8 up to {MAX_HEAD_DIM}, got {qkv.shape[-1]}"
    if qkv.dtype == torch.float32 and qkv.shape[-1] > 128:
        return f"in float32 head_dim must be at most 128 there, got {qkv.shape[-1]}"
    if qkv.shape[1] >= FAR:
        return f"it takes fewer than {FAR} tokens, got {qkv.shape[1]}"
    return _triton.refuses(qkv)


_OP = Op(
    "attention",
    *kernels(_run, _native_refuses, _triton_refuses),
    *_attention_adapters.implementations(),
    Implementation("reference", reference),
)
