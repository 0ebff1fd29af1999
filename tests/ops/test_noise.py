"""Philox against its published answers, and the normal noise made of it against the definition and the distribution."""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitok import InputError, _native
from vitok.ops import _triton, normal_noise
from vitok.ops.noise import box_muller, philox

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
TRITON = _triton.MISSING or ("" if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1" else "no GPU")
needs_native = pytest.mark.skipif(_native.library() is None, reason=f"no native library: {_native.reason()}")
needs_triton = pytest.mark.skipif(bool(TRITON), reason=TRITON or "triton is there")
impls = pytest.mark.parametrize(
    "impl", ["reference", pytest.param("native", marks=needs_native), pytest.param("triton", marks=needs_triton)]
)

ONES = 0xFFFFFFFF
# Keys and lengths on both sides of every word, vector group (16 to 64), work item (4096) and Triton program (1024).
BITS = [
    (0, [0], 1),
    (7, [0, 2**40, 3], 63),
    (2**64 - 1, [-1, -(2**63), 2**63 - 1], 65),
    (2**32, [2**32, 1, 2**31], 1027),
    (0x243F6A8885A308D3, [5], 4100),
]


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


@needs_native
@pytest.mark.parametrize(("seed", "ids", "elements"), BITS, ids=str)
def test_native_has_the_bits_of_the_reference_at_every_level(isa, seed, ids, elements):
    wanted = normal_noise(seed, torch.tensor(ids), elements, impl="reference")
    assert torch.equal(normal_noise(seed, torch.tensor(ids), elements, impl="native"), wanted)


@needs_triton
@pytest.mark.parametrize(("seed", "ids", "elements"), BITS, ids=str)
def test_triton_has_the_bits_of_the_reference(seed, ids, elements):
    ids = torch.tensor(ids, device=DEVICES[-1])
    noise = [normal_noise(seed, ids, elements, impl=impl) for impl in ("triton", "reference")]
    assert torch.equal(*noise)


@pytest.mark.skipif(DEVICES == ["cpu"], reason="no GPU")
@pytest.mark.parametrize(("seed", "ids", "elements"), BITS, ids=str)
def test_a_gpu_has_the_bits_of_the_cpu(seed, ids, elements):
    wanted = normal_noise(seed, torch.tensor(ids), elements)
    for impl in ("native", "triton", "reference"):
        assert torch.equal(normal_noise(seed, torch.tensor(ids, device="cuda"), elements, impl=impl).cpu(), wanted)


@impls
def test_a_seed_in_memory_is_the_same_seed(impl):
    ids = torch.tensor([4, 9])[::1]
    for seed in (0, 2**31, 2**63 - 1, 2**63, 2**64 - 1):
        held = torch.tensor(seed - (2**64 if seed >= 2**63 else 0))
        assert torch.equal(normal_noise(held, ids, 10, impl=impl), normal_noise(seed, ids, 10, impl="reference"))
    strided = torch.tensor([4, 0, 9, 0])[::2]
    assert torch.equal(normal_noise(1, strided, 10, impl=impl), normal_noise(1, ids, 10, impl=impl))


def exact_box_muller(radius_word, angle_word):
    """float64, from the nearer end of (0, 1) and the nearest quarter turn."""
    u, rest = (radius_word + 0.5) / 2**32, (ONES - radius_word + 0.5) / 2**32
    radius = torch.sqrt(-2 * torch.where(u < 0.5, u.log(), torch.log1p(-rest)))
    quarter = (angle_word + 2**29) >> 30
    x = (angle_word - (quarter << 30) + 0.5) * (2 * math.pi / 2**32)
    turns = torch.stack((x.cos(), -x.sin(), -x.cos(), x.sin(), x.cos(), -x.sin()), -1)
    first = turns.gather(-1, (quarter % 4)[:, None])[:, 0]
    second = turns.gather(-1, ((quarter % 4 + 3) % 4)[:, None])[:, 0]
    return radius * first, radius * second


def test_normals_are_those_of_box_muller():
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(2**32, (2, 200_000), generator=generator)
    small = (2 ** (32 * torch.rand(50_000, generator=generator, dtype=torch.float64))).long().clamp(0, ONES)
    edges = torch.cat([2**29 * i + torch.arange(-50, 50) for i in range(9)]).clamp(0, ONES)
    radius_words = torch.cat((words[0], small, ONES - small, edges, words[0][: len(edges)]))
    angle_words = torch.cat((words[1], small, ONES - small, words[1][: len(edges)], edges))
    for actual, exact in zip(
        box_muller(radius_words, angle_words), exact_box_muller(radius_words, angle_words), strict=True
    ):
        error = (actual.double() - exact).abs()
        assert error.max() < 2e-6 and (error / exact.abs()).max() < 4e-7
    largest, _ = box_muller(torch.tensor([0]), torch.tensor([0]))
    assert 6.75 < largest.item() < 6.77


def test_a_sample_does_not_know_its_batch():
    together = normal_noise(7, torch.tensor([5, 2**40, 0, 3]), 103)
    for row, sample in enumerate([5, 2**40, 0, 3]):
        assert torch.equal(normal_noise(7, torch.tensor([sample]), 103)[0], together[row])
    assert torch.equal(normal_noise(7, torch.tensor([5]), 50)[0], together[0, :50]), "nor how long it is"
    assert len(together.flatten().unique()) == together.numel()
    assert not torch.equal(normal_noise(8, torch.tensor([5]), 103)[0], together[0])
    assert not torch.equal(normal_noise(7 + 2**32, torch.tensor([5]), 103)[0], together[0])


@pytest.mark.parametrize("impl", ["reference", pytest.param("native", marks=needs_native)])
def test_is_standard_normal(impl):
    noise = normal_noise(1, torch.arange(64), 4096, impl=impl).double()
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


@impls
def test_no_elements_and_no_samples(impl):
    assert normal_noise(0, torch.arange(3), 0, impl=impl).shape == (3, 0)
    assert normal_noise(0, torch.arange(0), 5, impl=impl).shape == (0, 5)


@pytest.mark.parametrize("ids", [torch.zeros(2), torch.zeros(2, 2, dtype=torch.int64), torch.tensor(3)])
def test_sample_ids_that_are_none(ids, one_sentence):
    with pytest.raises(InputError) as error:
        normal_noise(0, ids, 4)
    one_sentence(error.value, "sample_ids")
