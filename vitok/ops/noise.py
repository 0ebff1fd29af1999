"""Normal noise that depends on (seed, sample id, element) and on nothing else, with the same bits everywhere.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a 128-bit counter and a
64-bit key into four 32-bit words. Key: the seed. Counter: (element // 4, sample id), 64 bits each; words 0, 1 and 2, 3
become two Box-Muller pairs, which are elements 4n .. 4n+3. So a sample's noise is the same in any batch and any order.

The transform of words to normals is made of integer operations, fp32 additions and multiplications rounded one by one,
and a correctly rounded square root, in a fixed order: the reference here, csrc/common/noise.h (C++ and CUDA) and
kernels/noise.py (Triton) give the same bits. Against exact Box-Muller a value is off by at most 4e-7 of itself.
"""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

from vitok import _native
from vitok.errors import InputError
from vitok.ops import _triton
from vitok.ops._library import define, kernels
from vitok.ops._registry import Implementation, Op
from vitok.ops._tensors import address, is_integer

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

# Polynomials, highest power first: -2 ln(1 - d) / d on (0, 1/2], sin x / x and cos x in x^2 for |x| <= pi / 4.
_LOG = tuple(
    map(
        float.fromhex,
        ("0x1.6a0b00p1", "-0x1.a39118p1", "0x1.3549d4p1", "-0x1.72156ep-2", "0x1.0df4d8p-1",
         "0x1.f3144cp-2", "0x1.55a382p-1", "0x1.fffec0p-1", "0x1p1"),
    )
)  # fmt: skip
_SIN = tuple(map(float.fromhex, ("-0x1.995408p-13", "0x1.110778p-7", "-0x1.555546p-3", "0x1p0")))
_COS = tuple(map(float.fromhex, ("0x1.99e910p-16", "-0x1.6c0c2ap-10", "0x1.55554ap-5", "-0x1p-1", "0x1p0")))
_TWO_LN_2 = float.fromhex("0x1.62e430p0")
_PI_2_32 = float.fromhex("0x1.921fb6p-31")  # pi / 2^32


def normal_noise(seed: int | Tensor, sample_ids: Tensor, elements: int, *, impl: str = "auto") -> Tensor:
    """Standard normal noise.

    Args:
        seed: 0 <= seed < 2^64, or an int64 tensor of one element on the device of `sample_ids`, whose 64 bits are taken
            as they are. A number is a constant to torch.compile and to a CUDA graph; a tensor is read by the kernel.
        sample_ids: int64 [B].
        elements: how many numbers a sample gets.
        impl: "auto", "native", "triton" or "reference"; the bits are the same.

    Returns: float32 [B, elements] on the device of `sample_ids`. Raises InputError for other arguments.

    >>> normal_noise(0, torch.tensor([3]), 4).equal(normal_noise(0, torch.tensor([1, 2, 3]), 9)[2:, :4])
    True
    """
    number, seed_at = check_keys(seed, sample_ids, sample_ids.shape[0] if sample_ids.dim() else 0, sample_ids.device)
    if not is_integer(elements, 0) or sample_ids.shape[0] * elements >= 2**60:
        raise InputError(f"elements must be an integer of at least 0, fewer than 2^60 in all, got {elements!r}")
    result: Tensor = _OP(impl, sample_ids, number, seed_at, elements)
    return result


def check_keys(
    seed: int | Tensor, sample_ids: Tensor | None, batch: int, device: torch.device
) -> tuple[int, Tensor | None]:
    """The seed as (signed 64-bit number, None) or (0, tensor); InputError for keys that cannot name noise."""
    if sample_ids is not None:
        if sample_ids.shape != (batch,) or sample_ids.dtype != torch.int64:
            wanted = "[B]" if batch == 0 else f"[{batch}]"
            raise InputError(f"sample_ids must be int64 {wanted}, got {sample_ids.dtype} {list(sample_ids.shape)}")
        if sample_ids.device != device:
            raise InputError(f"sample_ids must be on {device}, got {sample_ids.device}")
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != device:
            raise InputError(
                f"a seed tensor must be one int64 on {device}, got {seed.dtype} {list(seed.shape)} on {seed.device}"
            )
        return 0, seed
    if not is_integer(seed, 0) or seed >= 2**64:
        raise InputError(f"seed must be an integer of at least 0 and less than 2^64, got {seed!r}")
    return (seed if seed < 2**63 else seed - 2**64), None


def native_keys(seed: int, seed_at: Tensor | None, sample_ids: Tensor | None) -> tuple[int, int, int, int]:
    """NoiseKeys of csrc/common/noise.h. Whoever calls a kernel with them holds the tensors until it has run."""
    return (
        seed % 2**64,
        address(seed_at),
        address(sample_ids),
        0 if sample_ids is None else sample_ids.stride(0),
    )


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int] | tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox 4x32. `counter`: four int64 tensors, broadcast together, `key`: two ints, all below 2^32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b for a, b < 2^32. int64 products wrap, so b goes in two 16-bit pieces."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high << 16) | (low & 0xFFFF)) & _MASK


def box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two int64 tensors of words below 2^32 -> two float32 tensors of normals."""
    # u = (word + 1/2) / 2^32 and -ln u = k ln 2 - ln(1 - d), 0 < d <= 1/2: above 1/2, d = 1 - u straight from the
    # word's complement, which keeps all digits of a small d; below, u = 2^-k (1 - d). Nothing cancels.
    upper = radius_word >= 2**31
    f = torch.where(upper, _MASK - radius_word, radius_word).float() + 0.5
    bits = f.view(torch.int32)
    mantissa = ((bits & 0x7FFFFF) | 0x3F000000).view(torch.float32)
    d = torch.where(upper, f * 2.0**-32, 1.0 - mantissa)
    k = torch.where(upper, 0, 158 - (bits >> 23)).float()
    # By way of float64, which makes it correctly rounded; torch's float32 square root on the CPU is not always.
    radius = (k * _TWO_LN_2 + d * _horner(_LOG, d)).double().sqrt().float()
    # The angle to the nearest quarter turn, in integers.
    shifted = (angle_word + 2**29) & _MASK
    quarter = shifted >> 30
    x = (2 * (shifted & (2**30 - 1)) - (2**30 - 1)).float() * _PI_2_32
    z = x * x
    sine, cosine = x * _horner(_SIN, z), _horner(_COS, z)
    odd = (quarter & 1) == 1
    first, second = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    first = torch.where(((quarter + 1) & 2) == 2, -first, first)
    second = torch.where((quarter & 2) == 2, -second, second)
    return radius * first, radius * second


def _horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    first, *rest = coefficients
    return reduce(lambda y, c: y * x + c, rest, torch.full_like(x, first))


def reference(sample_ids: Tensor, seed: int, seed_at: Tensor | None, elements: int) -> Tensor:
    block = torch.arange(math.ceil(elements / 4), device=sample_ids.device)
    ids = sample_ids[:, None]
    counter = (block & _MASK, block >> 32, ids & _MASK, (ids >> 32) & _MASK)
    key = (seed & _MASK, (seed >> 32) & _MASK)
    if seed_at is not None:
        seed_at = seed_at.reshape(())
        words = philox(counter, (seed_at & _MASK, (seed_at >> 32) & _MASK))
    else:
        words = philox(counter, key)
    return torch.stack((*box_muller(*words[:2]), *box_muller(*words[2:])), -1).flatten(1)[:, :elements].contiguous()


def _empty(impl: str, sample_ids: Tensor, seed: int, seed_at: Tensor | None, elements: int) -> Tensor:
    return sample_ids.new_empty((sample_ids.shape[0], elements), dtype=torch.float32)


def _noise(impl: str, sample_ids: Tensor, seed: int, seed_at: Tensor | None, elements: int) -> Tensor:
    if impl == "triton":
        from vitok.kernels import noise as kernel

        return kernel.normal_noise(sample_ids, seed, seed_at, elements)
    out = _empty(impl, sample_ids, seed, seed_at, elements)
    _native.run(
        "normal_noise", sample_ids,
        *native_keys(seed, seed_at, sample_ids), len(sample_ids), elements, out.data_ptr(),
    )  # fmt: skip
    return out


_NOISE = define(
    "normal_noise(str impl, Tensor sample_ids, SymInt seed, Tensor? seed_at, SymInt elements) -> Tensor", _noise, _empty
)


def _native_refuses(sample_ids: Tensor, *_: object) -> str:
    return _native.refuses(sample_ids.new_empty(0, dtype=torch.float32))


def _triton_refuses(sample_ids: Tensor, *_: object) -> str:
    return _triton.refuses(sample_ids)


_OP = Op(
    "normal_noise",
    *kernels(_NOISE, _native_refuses, _triton_refuses),
    Implementation("reference", reference),
)
