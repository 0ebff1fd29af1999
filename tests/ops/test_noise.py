"""Philox against its published answers, and the normal noise made of it against the definition and the distribution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitok import InputError
from vitok.ops import normal_noise
from vitok.ops.noise import philox

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers(counter, key, answer):
    """The vectors that Random123, the authors' own code, is tested with."""
    words = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(word.item() for word in words) == answer


def philox_in_python(counter: list[int], key: list[int]) -> list[int]:
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            second >> 32 ^ counter[1] ^ key[0], second & ONES, first >> 32 ^ counter[3] ^ key[1], first & ONES,
        ]  # fmt: skip
        key = [(key[0] + 0x9E3779B9) & ONES, (key[1] + 0xBB67AE85) & ONES]
    return counter


word = st.integers(0, ONES)


@settings(max_examples=30, deadline=None)
@given(st.lists(word, min_size=4, max_size=4), st.lists(word, min_size=2, max_size=2))
def test_equals_integers_of_any_size(counter, key):
    words = philox(tuple(torch.tensor([c]) for c in counter), tuple(key))
    assert [w.item() for w in words] == philox_in_python(counter, key)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**63 - 1), st.integers(1, 9))
def test_follows_the_definition(seed, sample, elements):
    noise = normal_noise(seed, torch.tensor([sample]), elements)
    assert noise.shape == (1, elements) and noise.dtype == torch.float32
    for element in range(elements):
        words = philox_in_python([element // 4, 0, sample & ONES, sample >> 32], [seed & ONES, seed >> 32])
        u, v = ((w + 0.5) / 2**32 for w in words[element % 4 // 2 * 2 :][:2])
        pair = math.cos(2 * math.pi * v), math.sin(2 * math.pi * v)
        expected = math.sqrt(-2 * math.log(u)) * pair[element % 2]
        assert noise[0, element].item() == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_a_sample_does_not_know_its_batch():
    together = normal_noise(7, torch.tensor([5, 2**40, 0, 3]), 103)
    for row, sample in enumerate([5, 2**40, 0, 3]):
        assert torch.equal(normal_noise(7, torch.tensor([sample]), 103)[0], together[row])
    assert torch.equal(normal_noise(7, torch.tensor([5]), 50)[0], together[0, :50]), "nor how long it is"
    assert len(together.flatten().unique()) == together.numel()
    assert not torch.equal(normal_noise(8, torch.tensor([5]), 103)[0], together[0])
    assert not torch.equal(normal_noise(7 + 2**32, torch.tensor([5]), 103)[0], together[0])


def test_is_standard_normal():
    noise = normal_noise(1, torch.arange(64), 4096).double()
    n = noise.numel()
    assert abs(noise.mean()) < 4 / math.sqrt(n)
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((noise**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((noise**4).mean() - 3) < 4 * math.sqrt(96 / n)
    normal = torch.distributions.Normal(0.0, 1.0)
    ordered = noise.flatten().sort().values
    ranks = torch.arange(1, n + 1) / n
    assert (normal.cdf(ordered) - ranks).abs().max() < 1.95 / math.sqrt(n), (
        "Kolmogorov and Smirnov, at one in a thousand"
    )
    for shift in (1, 2, 3, 4):
        assert abs((noise[:, shift:] * noise[:, :-shift]).mean()) < 4 / math.sqrt(n), "neighbours are independent"
    assert abs((noise[1:] * noise[:-1]).mean()) < 4 / math.sqrt(n), "samples are independent"


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_out_of_range(seed, one_sentence):
    with pytest.raises(InputError) as error:
        normal_noise(seed, torch.arange(2), 4)
    one_sentence(error.value, "seed", str(seed))


def test_no_elements_and_no_samples():
    assert normal_noise(0, torch.arange(3), 0).shape == (3, 0)
    assert normal_noise(0, torch.arange(0), 5).shape == (0, 5)
