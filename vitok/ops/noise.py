"""Normal noise that depends on (seed, sample id, element) and on nothing else.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a 128-bit counter and a
64-bit key into four 32-bit words. Key: the seed. Counter: (element // 4, sample id), 64 bits each; words 0, 1 and 2, 3
become two Box-Muller pairs, which are elements 4n .. 4n+3. So a sample's noise is the same in any batch, in any order,
on any device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vitok.errors import InputError

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
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


def normal_noise(seed: int, sample_ids: Tensor, elements: int) -> Tensor:
    """Standard normal noise, float32 [len(sample_ids), elements], on the device of `sample_ids` (int64 [B]).

    Raises InputError unless 0 <= seed < 2^64.
    """
    if not 0 <= seed < 2**64:
        raise InputError(f"seed must be at least 0 and less than 2^64, got {seed}")
    block = torch.arange(math.ceil(elements / 4), device=sample_ids.device)
    ids = sample_ids[:, None]
    counter = (block & _MASK, block >> 32, ids & _MASK, (ids >> 32) & _MASK)
    words = philox(counter, (seed & _MASK, (seed >> 32) & _MASK))
    # (word + 1/2) / 2^32 lies in (0, 1), so the logarithm below is finite
    u0, u1, u2, u3 = ((word.double() + 0.5) * 2.0**-32 for word in words)
    radius = torch.sqrt(-2.0 * torch.log(torch.stack((u0, u2), -1)))
    angle = 2.0 * math.pi * torch.stack((u1, u3), -1)
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), -1)
    return pairs.flatten(1)[:, :elements].float()


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b for a, b < 2^32. int64 products wrap, so b goes in two 16-bit pieces."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high << 16) | (low & 0xFFFF)) & _MASK
