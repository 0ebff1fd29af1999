"""gaussian_bottleneck: tokens -> mean and log-variance -> a sample and its KL divergence from N(0, I).

A library matrix product makes the moments; one kernel does the rest in a single pass over them: split, clamp,
exponential, counter-based noise, sample and KL. The noise is never stored: backward makes it again. Sources: Kingma and
Welling (arXiv:1312.6114), appendix B; ViTok (arXiv:2501.09755), section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitok import _native
from vitok.errors import InputError
from vitok.ops import _triton, noise
from vitok.ops._library import define, differentiable_once, kernels
from vitok.ops._registry import Implementation, Op
from vitok.ops._tensors import address, check_float, compute_dtype
from vitok.ops.linear import linear

LOGVAR_RANGE = (-30.0, 20.0)
CHUNK = 1024  # kSampleChunk of csrc/common/gaussian_sample.h


def gaussian_bottleneck(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    seed: int | Tensor,
    sample_ids: Tensor | None = None,
    sample: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sample latents and tell their KL divergence from the prior.

    With mean and v the two halves of tokens @ weight.T + bias, v clamped to [-30, 20]:

        z = mean + exp(v / 2) * noise        kl = mean over tokens and channels of (mean^2 + exp(v) - 1 - v) / 2

    Args:
        tokens: [B, L, width].
        weight: [2c, width], the mean's rows first. Taken in the tokens' dtype.
        bias: [2c] or None.
        seed, sample_ids: name the noise, see `gaussian_sample`.
        sample: False for z = mean.
        impl: "auto", "native", "triton" or "reference".

    Returns: (z, mean, logvar, kl): three of [B, L, c] in the tokens' dtype, or autocast's where it is on; kl [B] in
    float32 (float64 with float64).
    `gaussian_sample` on moments of your own returns z and kl alone and makes no clamped copy of the log-variance.
    Differentiable in tokens, weight and bias. Raises InputError for shapes, devices, seeds and ids that do not fit.

    >>> z, mean, logvar, kl = gaussian_bottleneck(torch.randn(2, 9, 32), torch.randn(8, 32), seed=0)
    >>> z.shape, kl.shape
    (torch.Size([2, 9, 4]), torch.Size([2]))
    """
    if tokens.dim() != 3 or weight.dim() != 2 or tokens.shape[-1] != weight.shape[-1]:
        raise InputError(
            f"tokens must be [B, L, width] and weight [2c, width], got {list(tokens.shape)} and {list(weight.shape)}"
        )
    check_float("tokens", tokens)
    if tokens.shape[1] < 1:
        raise InputError(f"tokens must be [B, L >= 1, width], got {list(tokens.shape)}")
    if weight.shape[0] < 2 or weight.shape[0] % 2:
        raise InputError(f"weight must be [2c, width], c >= 1, got {list(weight.shape)}")
    noise.check_keys(seed, sample_ids, tokens.shape[0], tokens.device)
    moments = linear(tokens, weight, bias)
    z, kl = gaussian_sample(moments, seed=seed, sample_ids=sample_ids, sample=sample, impl=impl)
    mean, logvar = moments.chunk(2, -1)
    return z, mean, logvar.clamp(*LOGVAR_RANGE), kl


def gaussian_sample(
    moments: Tensor,
    *,
    seed: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    sample: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The second half of `gaussian_bottleneck`, on moments [B, L, 2c] of any strides (mean, then log-variance).

    Args:
        seed: 0 <= seed < 2^64, or an int64 tensor of one element on the moments' device. A number is a constant to
            torch.compile and to a CUDA graph; a tensor is read by the kernel, without a wait, each time it runs.
        sample_ids: int64 [B] on the moments' device, by default 0 .. B-1. Element l * c + k of a sample's noise goes to
            token l, channel k, so a sample gets the same noise in any batch and from any implementation.
        sample: False for z = mean, a view.
        impl: "auto", "native", "triton" or "reference".

    Returns: (z, kl): [B, L, c] in the moments' dtype, contiguous if sampled; [B] in float32 (float64 with float64).
    Differentiable in the moments. Raises InputError for wrong shapes, dtypes, seeds and ids.
    """
    if moments.dim() != 3 or moments.shape[1] < 1 or moments.shape[2] < 2 or moments.shape[2] % 2:
        raise InputError(f"moments must be [B, L >= 1, 2c], c >= 1, got {list(moments.shape)}")
    check_float("moments", moments)
    number, seed_at = noise.check_keys(seed, sample_ids, moments.shape[0], moments.device)
    z, kl = _OP(impl, moments, number, seed_at, sample_ids, sample)
    return (z if sample else moments[..., : moments.shape[2] // 2]), kl


def reference(
    moments: Tensor, seed: int, seed_at: Tensor | None, sample_ids: Tensor | None, sample: bool
) -> tuple[Tensor, Tensor]:
    """Eager composition."""
    mean, logvar = moments.chunk(2, -1)
    logvar = logvar.clamp(*LOGVAR_RANGE)
    wide_mean, wide_logvar = (x.to(compute_dtype(moments)) for x in (mean, logvar))
    kl = 0.5 * (wide_mean.square() + (wide_logvar.expm1() - wide_logvar)).flatten(1).mean(1)
    if not sample:
        return mean, kl
    if sample_ids is None:
        sample_ids = torch.arange(moments.shape[0], device=moments.device)
    normal = noise.reference(sample_ids, seed, seed_at, mean.shape[1] * mean.shape[2]).view(mean.shape)
    return mean + torch.exp(0.5 * logvar) * normal.to(moments.dtype), kl


def _sizes(moments: Tensor) -> tuple[int, int, int]:
    batch, tokens, channels = moments.shape
    return batch, tokens, channels // 2


def _forward_empty(
    impl: str, moments: Tensor, seed: int, seed_at: Tensor | None, sample_ids: Tensor | None, sample: bool
) -> tuple[Tensor, Tensor]:
    z = moments.new_empty(_sizes(moments) if sample else (0,))
    return z, moments.new_empty((moments.shape[0],), dtype=compute_dtype(moments))


def _forward(
    impl: str, moments: Tensor, seed: int, seed_at: Tensor | None, sample_ids: Tensor | None, sample: bool
) -> tuple[Tensor, Tensor]:
    z, kl = _forward_empty(impl, moments, seed, seed_at, sample_ids, sample)
    batch, tokens, channels = _sizes(moments)
    partials = kl.new_empty((batch, -(-tokens * channels // CHUNK)))
    if impl == "triton":
        from vitok.kernels import gaussian_sample as kernel

        kernel.gaussian_sample_forward(moments, seed, seed_at, sample_ids, z if sample else None, kl, partials)
    else:
        _native.run(
            "gaussian_sample_forward", moments,
            moments.data_ptr(), _native.DTYPE[moments.dtype], (batch, tokens, channels), moments.stride(),
            *noise.native_keys(seed, seed_at, sample_ids),
            z.data_ptr() if sample else 0, kl.data_ptr(), partials.data_ptr(),
        )  # fmt: skip
    return z, kl


def _backward_empty(impl: str, moments: Tensor, *_: object) -> Tensor:
    return moments.new_empty(moments.shape)


def _backward(
    impl: str,
    moments: Tensor,
    dz: Tensor | None,
    dkl: Tensor | None,
    seed: int,
    seed_at: Tensor | None,
    sample_ids: Tensor | None,
) -> Tensor:
    dmoments = _backward_empty(impl, moments)
    if impl == "triton":
        from vitok.kernels import gaussian_sample as kernel

        kernel.gaussian_sample_backward(moments, dz, dkl, seed, seed_at, sample_ids, dmoments)
    else:
        _native.run(
            "gaussian_sample_backward", moments,
            moments.data_ptr(), _native.DTYPE[moments.dtype], _sizes(moments), moments.stride(),
            *noise.native_keys(seed, seed_at, sample_ids),
            address(dz), (0, 0, 0) if dz is None else dz.stride(),
            address(dkl), 0 if dkl is None else dkl.stride(0),
            dmoments.data_ptr(),
        )  # fmt: skip
    return dmoments


_KEYS = "SymInt seed, Tensor? seed_at, Tensor? sample_ids"
_FORWARD = define(
    f"gaussian_sample_forward(str impl, Tensor moments, {_KEYS}, bool sample) -> (Tensor z, Tensor kl)",
    _forward,
    _forward_empty,
)
_BACKWARD = define(
    f"gaussian_sample_backward(str impl, Tensor moments, Tensor? dz, Tensor? dkl, {_KEYS}) -> Tensor",
    _backward,
    _backward_empty,
)


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, impl, moments, seed, seed_at, sample_ids, sample):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(moments, seed_at, sample_ids)
        ctx.impl, ctx.seed, ctx.sample = impl, seed, sample
        ctx.set_materialize_grads(False)  # a loss without KL, or of nothing else, is common
        return _FORWARD(impl, moments, seed, seed_at, sample_ids, sample)

    @staticmethod
    @differentiable_once
    def backward(ctx, dz, dkl):  # type: ignore[no-untyped-def]
        moments, seed_at, sample_ids = ctx.saved_tensors
        dz = dz if ctx.sample else None
        return None, _BACKWARD(ctx.impl, moments, dz, dkl, ctx.seed, seed_at, sample_ids), None, None, None, None


def _run(
    impl: str, moments: Tensor, seed: int, seed_at: Tensor | None, sample_ids: Tensor | None, sample: bool
) -> tuple[Tensor, Tensor]:
    run = _Sample.apply if moments.requires_grad and torch.is_grad_enabled() else _FORWARD
    z, kl = run(impl, moments, seed, seed_at, sample_ids, sample)
    return z, kl


def _native_refuses(moments: Tensor, *_: object) -> str:
    return _native.refuses(moments)


def _triton_refuses(moments: Tensor, *_: object) -> str:
    return _triton.refuses(moments)


_OP = Op(
    "gaussian_bottleneck",
    *kernels(_run, _native_refuses, _triton_refuses),
    Implementation("reference", reference),
)
