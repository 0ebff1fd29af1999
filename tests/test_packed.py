"""encode_packed and decode_packed: pictures and clips of any sizes in one pass, each as if it were alone."""

from __future__ import annotations

import pytest
import torch

import vitok
from vitok import _native
from vitok.ops import _triton

IMPLEMENTATIONS = [
    "reference",
    "sdpa",
    pytest.param("native", marks=pytest.mark.skipif(_native.library() is None, reason=_native.reason() or "there")),
    pytest.param("triton", marks=pytest.mark.skipif(bool(_triton.MISSING), reason=_triton.MISSING or "there")),
]


@pytest.fixture
def items(pixels):
    """Two sizes of pictures, a batch of two, one in the other layout, a clip, and a picture of one tubelet."""
    return [
        pixels(1, 24, 40, 3),
        pixels(2, 3, 17, 9),
        pixels(1, 5, 16, 24, 3),
        (pixels(1, 3, 2, 8, 8).float() / 127.5 - 1),
        pixels(1, 1, 1, 3),
    ]


def sizes_of(items):
    clips = [vitok.model.as_clip(x)[0] for x in items]
    return [tuple(c.shape[1:4]) if x.dim() == 5 else tuple(c.shape[2:4]) for x, c in zip(items, clips, strict=True)]


def close(actual, expected):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("preset", ["paper", "author-v1", "v2"])
def test_equals_one_by_one(tiny, items, preset):
    model = tiny("S-S/2x8" if preset != "v2" else "B-B/2x8", preset=preset)
    with torch.no_grad():
        posteriors = model.encode_packed(items)
        alone = [model.encode(x) for x in items]
        for together, single in zip(posteriors, alone, strict=True):
            close(together.mean, single.mean)
            close(together.sample(seed=3), single.sample(seed=3))
        latents = [posterior.mode() for posterior in alone]
        decoded = model.decode_packed(latents, sizes=sizes_of(items))
        for pixels, z, size in zip(decoded, latents, sizes_of(items), strict=True):
            close(pixels, model.decode(z, size=size))
        for pixels, z in zip(model.decode_packed(latents), latents, strict=True):
            close(pixels, model.decode(z))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_on_every_implementation(tiny, items, prefer, impl):
    model = tiny("S-S/2x8", encoder_depth=1, decoder_depth=1)
    with torch.no_grad():
        alone = [model.encode(x).mode() for x in items]
        expected = [model.decode(z) for z in alone]
        with prefer(impl):
            for together, single in zip(model.encode_packed(items), alone, strict=True):
                close(together.mode(), single)
            for together, single in zip(model.decode_packed(alone), expected, strict=True):
                close(together, single)


def test_in_bfloat16_as_near_to_float64_as_one_by_one(tiny, items, judge):
    model = tiny("S-S/2x8").bfloat16()
    exact = tiny("S-S/2x8").bfloat16().double()
    with torch.no_grad():
        for together, x in zip(model.encode_packed(items), items, strict=True):
            x = x.double() if x.is_floating_point() else x
            judge(together.mean, model.encode(x).mean, exact.encode(x).mean)


def test_gradients_are_the_sum_of_those_one_by_one(tiny, items):
    model = tiny("S-S/2x8")

    def gradients(posteriors, decode):
        decoded = decode([posterior.mode() for posterior in posteriors])
        loss = sum(x.square().mean() for x in decoded) + sum(posterior.kl().sum() for posterior in posteriors)
        return torch.autograd.grad(loss, list(model.parameters()))

    together = gradients(model.encode_packed(items), model.decode_packed)
    alone = gradients([model.encode(x) for x in items], lambda latents: [model.decode(z) for z in latents])
    for actual, expected in zip(together, alone, strict=True):
        close(actual, expected)


def test_neighbours_do_not_matter(tiny, items, pixels):
    model = tiny("S-S/2x8")
    with torch.no_grad():
        first = model.encode_packed(items)
        second = model.encode_packed([items[0], *(pixels(*x.shape, seed=9) for x in items[1:])])
    assert first[0].mean.equal(second[0].mean) and not first[1].mean.equal(second[1].mean)


def test_one_pass_of_the_blocks(tiny, items):
    model = tiny("S-S/2x8")
    shapes = []
    model.encoder.stack.blocks[0].register_forward_hook(lambda module, args, out: shapes.append(args[0].shape))
    with torch.no_grad():
        model.encode_packed(items)
    tokens = sum(
        x.shape[0] * torch.Size(model.config.grid(*vitok.model.as_clip(x)[0].shape[1:4])).numel() for x in items
    )
    assert shapes == [(1, tokens, 48)]


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda m, x: m.encode_packed([]), ("items", "at least one", "none")),
        (lambda m, x: m.encode_packed(x), ("items", "list", "[1, 16, 16, 3]")),
        (lambda m, x: m.encode_packed([x, x[0]]), ("item 1", "4 dimensions", "[16, 16, 3]")),
        (lambda m, x: m.encode_packed([x, x.float()]), ("item 1", "[-1, 1]", "uint8")),
        (lambda m, x: m.decode_packed([]), ("latents", "at least one", "none")),
        (lambda m, x: m.decode_packed([torch.ones(1, 4, 2, 2), torch.ones(1, 5, 2, 2)]), ("latents 1", "[1, 5, 2, 2]")),
        (lambda m, x: m.decode_packed([torch.ones(1, 4, 2, 2)], sizes=[(99, 9)]), ("latents 0", "(99, 9)")),
        (lambda m, x: m.decode_packed([torch.ones(1, 4, 2, 2)], sizes=[]), ("sizes", "1", "0")),
    ],
)
def test_bad_input(tiny, pixels, call, parts, one_sentence):
    with pytest.raises(vitok.InputError) as error:
        call(tiny(), pixels(1, 16, 16, 3) | 128)
    one_sentence(error.value, *parts)
