"""Gaussian sample and KL from moments, in one pass.

    v = clamp(logvar, -30, 20)
    z[b, l, k] = mean + exp(v / 2) * noise(seed, sample id of b, element l * c + k)
    kl[b]      = 1 / (2 L c) * sum of mean^2 + (exp(v) - 1 - v)

Fused: split, clamp, exponentials, noise, sample and the reduction. In bf16 an element costs 4 bytes in and 2 out where
the eager composition moves over 60; noise is made from counters in registers, forward and again backward, and never
stored. The linear before it stays with the library: at 2c = 32 columns it is a plain skinny product.

moments     [B, L, 2c]  float16, bfloat16 or float32, any strides; mean, then logvar
sample_ids  [B]         int64, any stride, or absent (0, 1, ...)
seed_at     one element int64, or absent
z, dz       [B, L, c]   of the moments' dtype; z contiguous, dz of any strides
kl, dkl     [B]         float32
dmoments    [B, L, 2c]  of the moments' dtype, contiguous
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .noise import noise_block, noise_keys, signed_words

# Elements of a program, fixed by the scratch tensor that callers bring (CHUNK of vitok.ops.gaussian_bottleneck): over 4
# warps 8 a thread, which is two Philox blocks. Not measured yet.
CHUNK = 1024
NUM_WARPS = 4

# Partial sums a program adds at a time.
PARTIALS = 256


@triton.jit
def exponential(x):
    """e^x to about 2 units in the last place for |x| <= 20; the hardware's exp2(x log2 e) loses digits as x grows."""
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = x - n * 0.693145751953125  # Cody and Waite: this product is exact
    rest = rest - n * 1.4286068203094172e-6
    y = rest * 1.9870899e-4 + 1.3975252e-3
    y = y * rest + 8.333452e-3
    y = y * rest + 4.1666e-2
    y = y * rest + 0.16666666
    y = y * rest + 0.5
    y = y * rest * rest + rest + 1.0
    return y * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def variance_excess(v, variance):
    """e^v - 1 - v, given e^v; by its own polynomial near 0, so that nothing cancels there."""
    y = v * 1.9870899e-4 + 1.3975252e-3
    y = y * v + 8.333452e-3
    y = y * v + 4.1666e-2
    y = y * v + 0.16666666
    y = y * v + 0.5
    return tl.where(tl.abs(v) < 0.5, y * v * v, variance - 1.0 - v)


@triton.jit
def place(chunk, CHANNELS: tl.constexpr, CHUNK: tl.constexpr):
    """Token and channel of a chunk's elements, [CHUNK] int64; only one division per program is one of 64 bits."""
    i = tl.arange(0, CHUNK)
    if CHUNK % CHANNELS == 0:
        token = chunk * (CHUNK // CHANNELS) + i // CHANNELS
    else:
        i += (chunk * CHUNK % CHANNELS).to(tl.int32)
        token = chunk * CHUNK // CHANNELS + i // CHANNELS
    return token, (i % CHANNELS).to(tl.int64)


@triton.jit
def clamp_logvar(logvar):
    """The clamp that keeps NaN."""
    return tl.where(logvar < -30.0, -30.0, tl.where(logvar > 20.0, 20.0, logvar))


@triton.jit
def sample_noise(b, chunk, sample_ids_ptr, sample_ids_stride, seed_at_ptr, seed_low, seed_high,
                 HAS_IDS: tl.constexpr, HAS_SEED_AT: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """The noise of one chunk, [CHUNK]."""
    sample = b
    if HAS_IDS:
        sample = tl.load(sample_ids_ptr + b * sample_ids_stride)
    key0, key1 = noise_keys(seed_low, seed_high, seed_at_ptr, HAS_SEED_AT)
    return noise_block(key0, key1, sample, chunk * (CHUNK // 4) + tl.arange(0, CHUNK // 4))


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def gaussian_sample_forward_kernel(
    mean_ptr,
    logvar_ptr,
    sample_ids_ptr,
    seed_at_ptr,
    z_ptr,
    partials_ptr,
    seed_low,
    seed_high,
    elements,
    chunks,
    stride_b,
    stride_l,
    stride_c,
    sample_ids_stride,
    SAMPLE: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_SEED_AT: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One chunk of one sample: z = mean + exp(v / 2) * noise, and its sum of mean^2 + e^v - 1 - v."""
    b = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = (tl.program_id(0) % chunks).to(tl.int64)
    e = chunk * CHUNK + tl.arange(0, CHUNK)  # [CHUNK] element of the sample
    inside = e < elements
    token, channel = place(chunk, CHANNELS, CHUNK)
    at = b * stride_b + token * stride_l + channel * stride_c
    mean = tl.load(mean_ptr + at, mask=inside, other=0.0).to(tl.float32)
    logvar = tl.load(logvar_ptr + at, mask=inside, other=0.0).to(tl.float32)
    v = clamp_logvar(logvar)
    deviation = exponential(0.5 * v)
    total = tl.sum(mean * mean + variance_excess(v, deviation * deviation), axis=0)
    tl.store(partials_ptr + tl.program_id(0).to(tl.int64), total)
    if SAMPLE:
        noise = sample_noise(b, chunk, sample_ids_ptr, sample_ids_stride, seed_at_ptr, seed_low, seed_high,
                             HAS_IDS, HAS_SEED_AT, CHUNK)  # fmt: skip
        z = mean + deviation * noise
        tl.store(z_ptr + b * elements + e, z.to(z_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sum_partials_kernel(partials_ptr, kl_ptr, chunks, scale, PARTIALS: tl.constexpr):
    """kl[b] = scale * sum of the sample's partial sums, always in the same order."""
    b = tl.program_id(0).to(tl.int64)
    total = tl.zeros((PARTIALS,), tl.float32)
    for start in range(0, chunks, PARTIALS):
        i = start + tl.arange(0, PARTIALS)
        total += tl.load(partials_ptr + b * chunks + i, mask=i < chunks, other=0.0)
    tl.store(kl_ptr + b, tl.sum(total, axis=0) * scale)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def gaussian_sample_backward_kernel(
    mean_ptr,
    logvar_ptr,
    sample_ids_ptr,
    seed_at_ptr,
    dz_ptr,
    dkl_ptr,
    dmoments_ptr,
    seed_low,
    seed_high,
    elements,
    chunks,
    stride_b,
    stride_l,
    stride_c,
    dz_stride_b,
    dz_stride_l,
    dz_stride_c,
    dkl_stride,
    sample_ids_stride,
    scale,
    HAS_DZ: tl.constexpr,
    HAS_DKL: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_SEED_AT: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """dmean = dz + s * mean; dlogvar = (dz * exp(v / 2) * noise + s * (e^v - 1)) / 2, 0 where the clamp is at work.

    s = scale * dkl[b] with scale = 1 / (L c).
    """
    b = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = (tl.program_id(0) % chunks).to(tl.int64)
    e = chunk * CHUNK + tl.arange(0, CHUNK)  # [CHUNK] element of the sample
    inside = e < elements
    token, channel = place(chunk, CHANNELS, CHUNK)
    at = b * stride_b + token * stride_l + channel * stride_c
    mean = tl.load(mean_ptr + at, mask=inside, other=0.0).to(tl.float32)
    logvar = tl.load(logvar_ptr + at, mask=inside, other=0.0).to(tl.float32)
    v = clamp_logvar(logvar)
    deviation = exponential(0.5 * v)
    dmean = mean * 0.0
    dlogvar = mean * 0.0
    if HAS_DKL:
        s = tl.load(dkl_ptr + b * dkl_stride) * scale
        dmean = s * mean
        dlogvar = s * (variance_excess(v, deviation * deviation) + v)
    if HAS_DZ:
        dz_at = dz_ptr + b * dz_stride_b + token * dz_stride_l + channel * dz_stride_c
        dz = tl.load(dz_at, mask=inside, other=0.0).to(tl.float32)
        noise = sample_noise(b, chunk, sample_ids_ptr, sample_ids_stride, seed_at_ptr, seed_low, seed_high,
                             HAS_IDS, HAS_SEED_AT, CHUNK)  # fmt: skip
        dmean += dz
        dlogvar += dz * deviation * noise
    dlogvar = tl.where((logvar >= -30.0) & (logvar <= 20.0), 0.5 * dlogvar, 0.0)
    out = dmoments_ptr + 2 * b * elements + token * (2 * CHANNELS) + channel
    tl.store(out, dmean.to(dmoments_ptr.dtype.element_ty), mask=inside)
    tl.store(out + CHANNELS, dlogvar.to(dmoments_ptr.dtype.element_ty), mask=inside)


def gaussian_sample_forward(
    moments: torch.Tensor,
    seed: int,
    seed_at: torch.Tensor | None,
    sample_ids: torch.Tensor | None,
    z: torch.Tensor | None,
    kl: torch.Tensor,
    partials: torch.Tensor,
) -> None:
    """Fill z, if there is one, and kl. `partials` is scratch, [B, ceil(L * c / CHUNK)] float32."""
    batch, chunks = partials.shape
    if batch == 0:
        return
    channels = moments.shape[2] // 2
    elements = moments.shape[1] * channels
    seed_low, seed_high = signed_words(seed)
    gaussian_sample_forward_kernel[(batch * chunks,)](
        moments,
        moments[..., channels:],
        moments if sample_ids is None else sample_ids,
        moments if seed_at is None else seed_at,
        moments if z is None else z,
        partials,
        seed_low,
        seed_high,
        elements,
        chunks,
        moments.stride(0),
        moments.stride(1),
        moments.stride(2),
        0 if sample_ids is None else sample_ids.stride(0),
        SAMPLE=z is not None,
        HAS_IDS=sample_ids is not None,
        HAS_SEED_AT=seed_at is not None,
        CHANNELS=channels,
        CHUNK=CHUNK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    sum_partials_kernel[(batch,)](
        partials,
        kl,
        chunks,
        0.5 / elements,
        PARTIALS=PARTIALS,
        num_warps=NUM_WARPS,
    )


def gaussian_sample_backward(
    moments: torch.Tensor,
    dz: torch.Tensor | None,
    dkl: torch.Tensor | None,
    seed: int,
    seed_at: torch.Tensor | None,
    sample_ids: torch.Tensor | None,
    dmoments: torch.Tensor,
) -> None:
    """Fill dmoments from the gradients that there are."""
    batch, tokens, width = moments.shape
    if batch == 0:
        return
    channels = width // 2
    elements = tokens * channels
    chunks = triton.cdiv(elements, CHUNK)
    seed_low, seed_high = signed_words(seed)
    gaussian_sample_backward_kernel[(batch * chunks,)](
        moments,
        moments[..., channels:],
        moments if sample_ids is None else sample_ids,
        moments if seed_at is None else seed_at,
        moments if dz is None else dz,
        moments if dkl is None else dkl,
        dmoments,
        seed_low,
        seed_high,
        elements,
        chunks,
        moments.stride(0),
        moments.stride(1),
        moments.stride(2),
        0 if dz is None else dz.stride(0),
        0 if dz is None else dz.stride(1),
        0 if dz is None else dz.stride(2),
        0 if dkl is None else dkl.stride(0),
        0 if sample_ids is None else sample_ids.stride(0),
        1.0 / elements,
        HAS_DZ=dz is not None,
        HAS_DKL=dkl is not None,
        HAS_IDS=sample_ids is not None,
        HAS_SEED_AT=seed_at is not None,
        CHANNELS=channels,
        CHUNK=CHUNK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
