"""Normal noise that depends on (seed, sample id, element) only: Philox 4x32-10 and Box-Muller, the bits of every other
implementation.

    words(block)    = philox(key = seed, counter = (block, sample id))
    out[b, 4n + i]  = i-th normal of words(n):  sqrt(-2 ln u) * (cos, sin)(2 pi v), two pairs

`noise_block` is what other kernels call. It consists of integer operations, fp32 additions and multiplications rounded
one by one and a correctly rounded square root, in the order of csrc/common/noise.h and vitok/ops/noise.py; a kernel
that calls it must be launched with enable_fp_fusion=False.

sample_ids  [B]            int64, any stride
seed_at     one element    int64, or absent
out         [B, elements]  float32, contiguous
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# A block is four elements: one thread stores 16 bytes. 4 warps make 1024 elements. Not measured yet.
BLOCKS = 256
NUM_WARPS = 4


@triton.jit
def philox_words(c0, c1, c2, c3, key0, key1):
    """Ten rounds of Philox 4x32 on uint32 blocks."""
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        low0 = c0 * 0xD2511F53
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low1 = c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ key0
        c1 = low1
        c2 = high0 ^ c3 ^ key1
        c3 = low0
        key0 = key0 + 0x9E3779B9
        key1 = key1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def normal_pair(radius_word, angle_word):
    """Two uint32 words -> two normals; why each step is as it is stands in csrc/common/noise.h."""
    upper = radius_word >= 0x80000000
    f = tl.where(upper, radius_word ^ 0xFFFFFFFF, radius_word).to(tl.int32).to(tl.float32) + 0.5
    bits = f.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    d = tl.where(upper, f * 2.3283064365386963e-10, 1.0 - mantissa)  # 2^-32
    k = tl.where(upper, 0, 158 - (bits >> 23)).to(tl.float32)
    y = d * 2.8284606933593750 + -3.2778654098510742
    y = y * d + 2.4163155555725098
    y = y * d + -0.36140987277030945
    y = y * d + 0.52725863456726074
    y = y * d + 0.48738211393356323
    y = y * d + 0.66726309061050415
    y = y * d + 0.99999046325683594
    y = y * d + 2.0
    radius = tl.sqrt_rn(k * 1.3862943649291992 + d * y)  # 2 ln 2

    shifted = angle_word + 0x20000000
    quarter = shifted >> 30
    rest = ((shifted & 0x3FFFFFFF) << 1).to(tl.int32) - 0x3FFFFFFF
    x = rest.to(tl.float32) * 7.3145905628047800e-10  # pi / 2^32
    z = x * x
    sine = z * -1.9518292218912393e-4 + 8.3321891725063324e-3
    sine = sine * z + -0.16666655242443085
    sine = x * (sine * z + 1.0)
    cosine = z * 2.4432563805021346e-5 + -1.3887310633435845e-3
    cosine = cosine * z + 4.1666645556688309e-2
    cosine = cosine * z + -0.5
    cosine = cosine * z + 1.0
    odd = (quarter & 1) == 1
    first = tl.where(odd, sine, cosine)
    second = tl.where(odd, cosine, sine)
    first = tl.where(((quarter + 1) & 2) == 2, -first, first)
    second = tl.where((quarter & 2) == 2, -second, second)
    return radius * first, radius * second


@triton.jit
def noise_block(key0, key1, sample, block):
    """Elements 4 * block .. 4 * block + 3 of one sample: [N] int64 blocks -> [4 N] normals in their order."""
    zero = (block * 0).to(tl.uint32)
    c0 = (block & 0xFFFFFFFF).to(tl.uint32)
    c1 = ((block >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c2 = zero + (sample & 0xFFFFFFFF).to(tl.uint32)
    c3 = zero + ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = philox_words(c0, c1, c2, c3, key0, key1)
    n0, n1 = normal_pair(w0, w1)
    n2, n3 = normal_pair(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def noise_keys(seed_low, seed_high, seed_at_ptr, HAS_SEED_AT: tl.constexpr):
    """The two key words, from the launch's numbers or from the tensor."""
    if HAS_SEED_AT:
        seed = tl.load(seed_at_ptr)
        key0 = (seed & 0xFFFFFFFF).to(tl.uint32)
        key1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    else:
        key0 = seed_low.to(tl.uint32)
        key1 = seed_high.to(tl.uint32)
    return key0, key1


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def normal_noise_forward_kernel(
    sample_ids_ptr,
    seed_at_ptr,
    out_ptr,
    seed_low,
    seed_high,
    elements,
    groups,
    sample_ids_stride,
    HAS_SEED_AT: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """out[b, e] for 4 * BLOCKS elements of one sample."""
    b = (tl.program_id(0) // groups).to(tl.int64)
    group = (tl.program_id(0) % groups).to(tl.int64)
    key0, key1 = noise_keys(seed_low, seed_high, seed_at_ptr, HAS_SEED_AT)
    sample = tl.load(sample_ids_ptr + b * sample_ids_stride)
    noise = noise_block(key0, key1, sample, group * BLOCKS + tl.arange(0, BLOCKS))  # [4 * BLOCKS]
    e = group * (4 * BLOCKS) + tl.arange(0, 4 * BLOCKS)
    tl.store(out_ptr + b * elements + e, noise, mask=e < elements)


def signed_words(seed: int) -> tuple[int, int]:
    """A seed's low and high 32 bits as signed numbers, which Triton passes as int32 whatever they are."""
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    return low - ((low >> 31) << 32), high - ((high >> 31) << 32)


def normal_noise(sample_ids: torch.Tensor, seed: int, seed_at: torch.Tensor | None, elements: int) -> torch.Tensor:
    """Launch the kernel: float32 [len(sample_ids), elements]. `seed_at`, when given, takes the place of `seed`."""
    out = torch.empty(sample_ids.shape[0], elements, dtype=torch.float32, device=sample_ids.device)
    if out.numel() == 0:
        return out
    groups = triton.cdiv(elements, 4 * BLOCKS)
    seed_low, seed_high = signed_words(seed)
    normal_noise_forward_kernel[(sample_ids.shape[0] * groups,)](
        sample_ids,
        sample_ids if seed_at is None else seed_at,
        out,
        seed_low,
        seed_high,
        elements,
        groups,
        sample_ids.stride(0),
        HAS_SEED_AT=seed_at is not None,
        BLOCKS=BLOCKS,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    return out
