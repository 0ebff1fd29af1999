"""Attention of other libraries behind vitok's interface: torch's SDPA by backend, flash-attn 2, 3 and 4, xformers.

q and k are normalised and rotated by `qk_norm_rope` first; masks are said in the library's own words, or refused with
the reason. Nothing is imported before an adapter runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
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
_CUDA = ("cuda",)


def _adapter(
    name: str,
    run: Callable[..., Tensor],
    refuses: Callable[..., str],
    missing: str = "",
    devices: tuple[str, ...] = _CUDA,
) -> Implementation:
    """An implementation made of `run(q, k, v, cu_seqlens, window, causal_block)`, on [B, L, heads, head_dim] each, and
    `refuses(qkv, cu_seqlens, window, causal_block)`."""

    def run_op(
        qkv: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        table: Tensor | None,
        cu_seqlens: Tensor | None,
        eps: float,
        window: int,
        causal_block: int,
    ) -> Tensor:
        if q_weight is not None or table is not None:
            qkv = qk_norm_rope(qkv, q_weight, k_weight, table, eps=eps)
        return run(*qkv.unbind(2), cu_seqlens, window, causal_block)

    def refuses_op(qkv: Tensor, *args: Any) -> str:
        _, _, _, cu_seqlens, _, window, causal_block = args
        return refuses(qkv, cu_seqlens, window, causal_block)

    return Implementation(name, run_op, missing, refuses_op, devices)


def _sdpa_mask(length: int, window: int, causal_block: int) -> str:
    """How SDPA is told: "none", "causal" or "mask"."""
    whole_window, whole_block = window < 0 or window >= length - 1, causal_block == 0 or causal_block >= length
    if whole_window and whole_block:
        return "none"
    return "causal" if whole_window and causal_block == 1 else "mask"


def _readable(cu_seqlens: Tensor) -> bool:
    """May the host look at the segments: without waiting for a GPU, without breaking a traced graph."""
    return cu_seqlens.is_cpu and not torch.compiler.is_compiling()


def _sdpa_refuses(backend: str, qkv: Tensor, cu_seqlens: Tensor | None, window: int, causal_block: int) -> str:
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


def _sdpa_plain(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int, causal_block: int) -> Tensor:
    """[B, heads, L, head_dim] each."""
    length, mask = q.shape[2], None
    how = _sdpa_mask(length, window, causal_block) if cu_seqlens is None else "mask"
    if how == "mask":
        from vitok.ops.attention import key_bounds

        first, last = key_bounds(length, window, causal_block, cu_seqlens, q.device)
        keys = torch.arange(length, device=q.device)
        mask = (keys >= first[:, None]) & (keys < last[:, None])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=how == "causal")


def _sdpa_segments(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int, causal_block: int
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if cu_seqlens is None or not _readable(cu_seqlens):
        return _sdpa_plain(q, k, v, cu_seqlens, window, causal_block).transpose(1, 2)
    lengths = cu_seqlens.diff().tolist()
    parts = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    return torch.cat([_sdpa_plain(a, b, c, None, window, causal_block) for a, b, c in parts], dim=2).transpose(1, 2)


def _sdpa(backend: str, *args: Any) -> Tensor:
    if not backend:
        return _sdpa_segments(*args)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, _SDPA_BACKENDS[backend])):
        return _sdpa_segments(*args)


def _found(*modules: str) -> str:
    """The first module that is there, without importing it (of a dotted name, its package only), or ""."""
    for module in modules:
        try:
            if importlib.util.find_spec(module.split(".")[0]) is not None:
                return module
        except ValueError:  # a module without a spec stands in for it
            continue
    return ""


def _flash_attn_function(device: torch.device, segments: bool) -> tuple[Callable[..., Any], int | None]:
    """The function of the newest flash-attn there is, and what it calls an unlimited side of a window."""
    name = "flash_attn_varlen_func" if segments else "flash_attn_func"
    modules: list[tuple[str, int | None]] = [("flash_attn", -1)]
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9:  # 3 and 4 are for Hopper and later
        modules = [("flash_attn.cute", None), ("flash_attn_interface", -1), *modules]
    for module, unlimited in modules:
        try:
            return getattr(importlib.import_module(module), name), unlimited
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"flash-attn is installed, but none of its modules has {name}")


def _flash_attn_refuses(qkv: Tensor, cu_seqlens: Tensor | None, window: int, causal_block: int) -> str:
    if not qkv.is_cuda:
        return f"flash-attn takes CUDA tensors, got one on {qkv.device.type!r}"
    if qkv.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn takes float16 and bfloat16, got {qkv.dtype}"
    if qkv.shape[-1] % 8 or qkv.shape[-1] > 256:
        return f"flash-attn takes a head_dim that is a multiple of 8 up to 256, got {qkv.shape[-1]}"
    return "flash-attn has no block-causal mask" if causal_block > 1 else ""


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int, causal_block: int) -> Tensor:
    """flash-attn 4 (`flash_attn.cute`), 3 (`flash_attn_interface`) or 2 (`flash_attn`)."""
    run, unlimited = _flash_attn_function(q.device, cu_seqlens is not None)
    side = unlimited if window < 0 else window
    options: dict[str, Any] = {"causal": causal_block == 1, "window_size": (side, 0 if causal_block == 1 else side)}
    if causal_block == 1 and window < 0:
        options["window_size"] = (unlimited, unlimited)
    if torch.are_deterministic_algorithms_enabled():
        options["deterministic"] = True
    if cu_seqlens is None:
        out = run(q, k, v, **options)
    else:
        # The longest segment is not known without waiting for the GPU; L is a bound, its extra blocks end at once.
        ends = cu_seqlens.int().contiguous()
        options |= {f"cu_seqlens_{x}": ends for x in "qk"} | {f"max_seqlen_{x}": q.shape[1] for x in "qk"}
        known = inspect.signature(run).parameters  # flash-attn 4 took no max_seqlen at first
        out = run(q[0], k[0], v[0], **{name: value for name, value in options.items() if name in known})
    out = out[0] if isinstance(out, tuple) else out  # flash-attn 4 returns lse as well
    return out if cu_seqlens is None else out[None]


def _xformers_refuses(qkv: Tensor, cu_seqlens: Tensor | None, window: int, causal_block: int) -> str:
    if not qkv.is_cuda:
        return f"xformers takes CUDA tensors, got one on {qkv.device.type!r}"
    if qkv.dtype == torch.float64:
        return "xformers takes no torch.float64"
    if causal_block > 1:
        return "xformers has no block-causal mask"
    if cu_seqlens is not None and window >= 0:
        return "xformers has no window within segments"
    return ""


def _xformers(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int, causal_block: int) -> Tensor:
    """`memory_efficient_attention`; its segments are lists on the host, so that cu_seqlens waits for the GPU."""
    ops = importlib.import_module("xformers.ops")
    masks = importlib.import_module("xformers.ops.fmha.attn_bias")
    bias = None
    if cu_seqlens is not None:
        bias = masks.BlockDiagonalMask.from_seqlens([n for n in cu_seqlens.diff().tolist() if n])
        bias = bias.make_causal() if causal_block == 1 else bias
    elif window >= 0:
        bias = masks.LocalAttentionFromBottomRightMask(
            window_left=window, window_right=0 if causal_block == 1 else window
        )
    elif causal_block == 1:
        bias = masks.LowerTriangularMask()
    out: Tensor = ops.memory_efficient_attention(q, k, v, attn_bias=bias)
    return out


def implementations() -> list[Implementation]:
    """All adapters, the preferred first."""
    return [
        *(
            _adapter(
                f"sdpa:{backend}" if backend else "sdpa",
                partial(_sdpa, backend),
                partial(_sdpa_refuses, backend),
                devices=_CUDA if backend in ("efficient", "cudnn") else ("cpu", "cuda"),
            )
            for backend in ("", *_SDPA_BACKENDS)
        ),
        _adapter(
            "flash_attn",
            _flash_attn,
            _flash_attn_refuses,
            ""
            if _found("flash_attn_interface", "flash_attn")
            else "flash-attn is not installed; `pip install flash-attn` builds it",
        ),
        _adapter(
            "xformers",
            _xformers,
            _xformers_refuses,
            "" if _found("xformers") else "xformers is not installed; `pip install xformers` brings it",
        ),
    ]
