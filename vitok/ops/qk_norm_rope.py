"""qk_norm_rope: optional per-head RMS norm of q and k, then rotary positions, on the packed projection.

For channel i < d/2 of a head, with angle a = a(token, i):
    y[i]       = x[i] cos a - x[i + d/2] sin a
    y[i + d/2] = x[i + d/2] cos a + x[i] sin a
The pairs are halves apart, so that a kernel reads two contiguous runs (Su et al., arXiv:2104.09864).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitok import _native
from vitok.errors import InputError
from vitok.ops import _triton
from vitok.ops._library import define, differentiable_once, kernels
from vitok.ops._registry import Implementation, Op
from vitok.ops._tensors import address, check_eps, check_float, compute_dtype, neighbouring

# Tokens whose shares of the weights' gradients become one float32 partial sum on the CPU; those are summed in float64.
BLOCK_TOKENS = 16
# Blocks that share the rows of q, as many for k and v, on CUDA: a few for each multiprocessor of any GPU.
CUDA_BLOCKS, CUDA_BLOCK_ROWS = 1024, 64
MAX_NATIVE_HEAD_DIM, MAX_CUDA_FLOAT64_HEAD_DIM = 1024, 256


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

        n = x / sqrt(mean(x^2) + eps) * weight      each head's row of q and of k; n = x without weights
        y[i]       = n[i] cos[i] - n[i + d/2] sin[i]
        y[i + d/2] = n[i + d/2] cos[i] + n[i] sin[i]

    Args:
        qkv: [B, L, 3, heads, head_dim], floating point, any strides; a copy is made when the stride of the last
            dimension is not 1. head_dim is even when there is a table.
        q_weight, k_weight: [head_dim] weights of the RMS norm of each head of q and k, floating point of one dtype, not
            necessarily that of qkv; or both None for no norm.
        table: [2, L, head_dim / 2] float32 cosines and sines, or None for no rotation; the reference takes float64.
            It gets no gradient. `vitok.positions.rope_table` makes it from explicit (t, y, x) coordinates.
        eps: of the norm.
        impl: "auto", "native", "triton" or "reference".

    Returns: contiguous [B, L, 3, heads, head_dim] in the dtype of qkv; arithmetic in float32 (float64 for float64).
    Differentiable in qkv and the weights; the backward pass keeps qkv and recomputes the rest, and without weights it
    keeps the table alone. Raises InputError for wrong shapes, dtypes and devices.

    Sources: RoFormer (Su et al., arXiv:2104.09864), RMSNorm (Zhang and Sennrich, arXiv:1910.07467), query-key
    normalisation (Henry et al., arXiv:2010.04245).

    >>> qk_norm_rope(torch.ones(1, 1, 3, 2, 8), table=torch.stack((torch.ones(1, 4), torch.zeros(1, 4)))).sum().item()
    48.0
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise InputError(f"qkv must be [B, L, 3, heads, head_dim], got {list(qkv.shape)}")
    check_float("qkv", qkv)
    check_eps(eps)
    length, head_dim = qkv.shape[1], qkv.shape[4]
    if head_dim < 1:
        raise InputError(f"qkv must have a head_dim of at least 1, got {list(qkv.shape)}")
    if (q_weight is None) != (k_weight is None):
        given, absent = ("q_weight", "k_weight") if k_weight is None else ("k_weight", "q_weight")
        raise InputError(f"q_weight and k_weight must both be given or both be None, got {given} without {absent}")
    if q_weight is not None and k_weight is not None:
        for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
            if weight.shape != (head_dim,):
                raise InputError(f"{name} must be [{head_dim}] for this qkv, got {list(weight.shape)}")
            check_float(name, weight)
            if weight.device != qkv.device:
                raise InputError(f"{name} must be on the device of qkv, {qkv.device}, got {weight.device}")
        if q_weight.dtype != k_weight.dtype:
            raise InputError(f"k_weight must have the dtype of q_weight, {q_weight.dtype}, got {k_weight.dtype}")
    if table is not None:
        if head_dim % 2:
            raise InputError(f"qkv must have an even head_dim for a rotation, got {head_dim}")
        if table.shape != (2, length, head_dim // 2):
            raise InputError(f"table must be [2, {length}, {head_dim // 2}] for this qkv, got {list(table.shape)}")
        if table.dtype not in (torch.float32, torch.float64):
            raise InputError(f"table must be float32 or float64, got {table.dtype}")
        if table.device != qkv.device:
            raise InputError(f"table must be on the device of qkv, {qkv.device}, got {table.device}")
    return _OP(impl, qkv, q_weight, k_weight, table, float(eps))


def reference(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, table: Tensor | None, eps: float
) -> Tensor:
    qk, v = qkv[:, :, :2], qkv[:, :, 2:]
    wide = qk.to(compute_dtype(qk))
    if q_weight is not None and k_weight is not None:
        weights = torch.stack((q_weight, k_weight))[:, None].to(wide.dtype)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weights
    if table is not None:
        cos, sin = table.detach().to(wide.dtype)[:, :, None, None]
        first, second = wide.chunk(2, dim=-1)
        wide = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((wide.to(qkv.dtype), v), dim=2)


def _blocks(qkv: Tensor) -> int:
    """Into how many parts the backward pass cuts the tokens; fixed by the shape, so that sums have one order."""
    tokens = qkv.shape[0] * qkv.shape[1]
    if qkv.is_cuda:
        return max(1, min(-(-tokens * qkv.shape[3] // CUDA_BLOCK_ROWS), CUDA_BLOCKS))
    return max(1, -(-tokens // BLOCK_TOKENS))


def _empty(impl: str, qkv: Tensor, *_: object) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _forward(
    impl: str, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, table: Tensor | None, eps: float
) -> Tensor:
    qkv = neighbouring(qkv)
    q_weight, k_weight, table = (None if x is None else neighbouring(x) for x in (q_weight, k_weight, table))
    if impl == "triton":
        from vitok.kernels import qk_norm_rope as kernel

        return kernel.qk_norm_rope_forward(qkv, q_weight, k_weight, table, eps)
    out = _empty(impl, qkv)
    batch, length, _, heads, head_dim = qkv.shape
    _native.run(
        "qk_norm_rope_forward", qkv,
        qkv.data_ptr(), _native.DTYPE[qkv.dtype], (batch, length, heads, head_dim), qkv.stride()[:4],
        *_weights(q_weight, k_weight), *_table(table), eps, out.data_ptr(),
    )  # fmt: skip
    return out


def _weights(q_weight: Tensor | None, k_weight: Tensor | None) -> tuple[int, int, str]:
    if q_weight is None or k_weight is None:
        return 0, 0, "float32"
    return q_weight.data_ptr(), k_weight.data_ptr(), _native.DTYPE[q_weight.dtype]


def _table(table: Tensor | None) -> tuple[int, tuple[int, int]]:
    return (0, (0, 0)) if table is None else (table.data_ptr(), (table.stride(0), table.stride(1)))


def _empty_backward(
    impl: str, grad: Tensor, qkv: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    dqkv = grad.new_empty(grad.shape)
    if q_weight is None or k_weight is None:
        return dqkv, grad.new_empty(0), grad.new_empty(0)
    return dqkv, q_weight.new_empty(q_weight.shape), k_weight.new_empty(k_weight.shape)


def _backward(
    impl: str,
    grad: Tensor,
    qkv: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    table: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad = neighbouring(grad)
    qkv, q_weight, k_weight, table = (None if x is None else neighbouring(x) for x in (qkv, q_weight, k_weight, table))
    if impl == "triton":
        from vitok.kernels import qk_norm_rope_backward as kernel

        dqkv, dq_weight, dk_weight = kernel.qk_norm_rope_backward(grad, qkv, q_weight, k_weight, table, eps)
        if dq_weight is None or dk_weight is None:
            return dqkv, grad.new_empty(0), grad.new_empty(0)
        return dqkv, dq_weight, dk_weight
    gradients = _empty_backward(impl, grad, qkv, q_weight, k_weight)
    dqkv, dq_weight, dk_weight = gradients
    batch, length, _, heads, head_dim = grad.shape
    blocks = _blocks(grad)
    pointers = (0, 0, 0)
    if qkv is not None:
        partials = grad.new_empty((blocks, 2, head_dim), dtype=compute_dtype(grad))
        pointers = (dq_weight.data_ptr(), dk_weight.data_ptr(), partials.data_ptr())
    _native.run(
        "qk_norm_rope_backward", grad,
        grad.data_ptr(), address(qkv), _native.DTYPE[grad.dtype],
        (batch, length, heads, head_dim), grad.stride()[:4], (0, 0, 0, 0) if qkv is None else qkv.stride()[:4],
        *_weights(q_weight, k_weight), *_table(table), eps, dqkv.data_ptr(), *pointers, blocks,
    )  # fmt: skip
    return gradients


_FORWARD = define(
    "qk_norm_rope_forward(str impl, Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor? table, float eps) "
    "-> Tensor",
    _forward,
    _empty,
)
_BACKWARD = define(
    "qk_norm_rope_backward(str impl, Tensor grad, Tensor? qkv, Tensor? q_weight, Tensor? k_weight, Tensor? table, "
    "float eps) -> (Tensor, Tensor, Tensor)",
    _backward,
    _empty_backward,
)


class _QkNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, impl, qkv, q_weight, k_weight, table, eps):  # type: ignore[no-untyped-def]
        ctx.impl, ctx.eps = impl, eps
        ctx.save_for_backward(None if q_weight is None else qkv, q_weight, k_weight, table)
        return _FORWARD(impl, qkv, q_weight, k_weight, table, eps)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        qkv, q_weight, k_weight, table = ctx.saved_tensors
        dqkv, dq_weight, dk_weight = _BACKWARD(ctx.impl, grad, qkv, q_weight, k_weight, table, ctx.eps)
        needs = ctx.needs_input_grad
        return (
            None,
            dqkv if needs[1] else None,
            dq_weight if needs[2] else None,
            dk_weight if needs[3] else None,
            None,
            None,
        )


def _run(
    impl: str, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, table: Tensor | None, eps: float
) -> Tensor:
    trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (qkv, q_weight, k_weight))
    run = _QkNormRope.apply if trains else _FORWARD
    return run(impl, qkv, q_weight, k_weight, table, eps)


def _table_refused(table: Tensor | None) -> str:
    return "" if table is None or table.dtype == torch.float32 else f"its table is float32, got {table.dtype}"


def _native_refuses(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, table: Tensor | None, eps: float
) -> str:
    largest = MAX_CUDA_FLOAT64_HEAD_DIM if qkv.is_cuda and qkv.dtype == torch.float64 else MAX_NATIVE_HEAD_DIM
    if qkv.shape[4] > largest:
        return f"a head has at most {largest} channels, got {qkv.shape[4]}"
    return _table_refused(table) or _native.refuses(qkv, q_weight)


def _triton_refuses(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, table: Tensor | None, eps: float
) -> str:
    return _triton.refuses(qkv, None if q_weight is None else q_weight.dtype) or _table_refused(table)


_OP = Op(
    "qk_norm_rope",
    *kernels(_run, _native_refuses, _triton_refuses),
    Implementation("reference", reference),
)
