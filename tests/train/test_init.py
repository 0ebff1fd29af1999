"""Starting as the best linear tokenizer, exactly."""

from __future__ import annotations

import math

import pytest
import torch

import vitok
from vitok import InputError, ops
from vitok.bottlenecks import GaussianPosterior
from vitok.evaluate.pca import fit_pca
from vitok.positions import coordinates, rope_table
from vitok.train.init import IN_TIME, NEIGHBOURS, init_from_pca

LINEAR = {"final_norm": False, "pixel_bias": "element"}


@pytest.fixture
def make():
    """A fresh model, as a training run starts with: random matrices, zero biases."""

    def make(name="S-S/4", **fields):
        sizes = {"channels": 6, "encoder_width": 48, "encoder_heads": 2, "encoder_depth": 2, "decoder_width": 72,
                 "decoder_heads": 3, "decoder_depth": 2} | LINEAR  # fmt: skip
        return vitok.create_model(name, **(sizes | fields)).eval()

    return make


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("S-S/4", {}),
        ("S-S/4", {"norm": "rms", "block": "parallel", "qk_norm": True, "layer_scale": 1.0}),
        ("S-S/4", {"proj_bias": True, "mlp_bias": True, "qkv_bias": True}),
        ("S-S/4", {"encoder_width": 24, "encoder_heads": 1}),
        ("S-S/2x4", {}),
    ],
)
def test_equals_pca_to_rounding(make, pixels, name, fields):
    model = make(name, **fields)
    q = model.config.temporal_patch
    pca = fit_pca([pixels(80, q, 4, 4, 3)], model.config.tubelet, 48)
    init_from_pca(model, pca, beta=1e-6)
    clip = pixels(2, q, 9, 14, 3, seed=1)
    posterior = model.encode(clip, layout="channels_last")
    reconstruction = model.decode(posterior.mode(), size=tuple(clip.shape[1:4]))
    torch.testing.assert_close(reconstruction, pca.reconstruct(clip, 6), rtol=0, atol=2e-5)
    assert reconstruction.std() > 0.05


def test_latents_have_unit_variance(make, pixels):
    model, clips = make(), pixels(500, 1, 4, 4, 3)
    init_from_pca(model, fit_pca([clips], (1, 4), 48), beta=1e-6)
    latents = model.encode(clips, layout="channels_last").mean.movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(latents.mean(0), torch.zeros(6), rtol=0, atol=1e-3)
    torch.testing.assert_close(latents.var(0), torch.ones(6), rtol=0, atol=1e-2)


@pytest.mark.parametrize("beta", [1e-4, 1e-2])
def test_posteriors_have_the_best_variance(make, pixels, beta):
    """Of all that a factor makes of them, at the mean squared error + beta KL of pictures."""
    model, clips = make(), pixels(64, 1, 4, 4, 3)
    init_from_pca(model, fit_pca([pixels(500, 1, 4, 4, 3)], (1, 4), 48), beta)

    def loss(factor):
        with torch.no_grad():
            posterior = model.encode(clips, layout="channels_last")
            noisy = GaussianPosterior(posterior.mean, posterior.logvar + math.log(factor))
            spread = [model.decode(noisy.sample(seed)) - model.decode(noisy.mode()) for seed in range(32)]
        return torch.stack(spread).square().mean() + beta * noisy.kl().mean()

    best = loss(1)
    assert best < loss(0.5)
    assert best < loss(2)
    init_from_pca(model, fit_pca([pixels(80, 1, 4, 4, 3)], (1, 4), 48), beta=0)
    assert (model.encode(clips, layout="channels_last").logvar == -30).all(), "no noise where the KL has no weight"


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize(("name", "grid"), [("S-S/4", (1, 5, 5)), ("S-S/2x4", (3, 5, 5))])
def test_heads_look_at_one_neighbour_each(make, pixels, norm, name, grid):
    model = make(
        name, norm=norm, qk_norm=True, encoder_width=192, encoder_heads=4, decoder_width=256, decoder_heads=4,
        decoder_depth=3,
    )  # fmt: skip
    (q, p), (t, h, w) = model.config.tubelet, grid
    clip = pixels(2, q * t, p * h, p * w, 3)
    init_from_pca(model, fit_pca([pixels(400, q, 4, 4, 3)], (q, p), 48), beta=1e-6)
    middle = coordinates(grid).tolist().index([t // 2, h // 2, w // 2])
    latents = model.encode(clip, layout="channels_last").mode()
    for stack, tokens in (
        (model.encoder.stack, model.encoder.embed(clip)),
        (model.decoder.stack, model.decoder.from_latents(latents.flatten(2).transpose(1, 2))),
    ):
        seen = []
        for block in stack.blocks:  # none of them changes the tokens yet
            attention = block.attention
            qkv = attention.qkv(block.attention_norm(tokens)[0]).unflatten(-1, (3, attention.heads, -1))
            table = rope_table(coordinates(grid), grid, stack.stack.head_dim, "3d", 1e4)
            queries, keys, _ = ops.qk_norm_rope(qkv, attention.q_norm, attention.k_norm, table, eps=1e-5).unbind(2)
            scores = torch.einsum("bhd,blhd->bhl", queries[:, middle], keys) / stack.stack.head_dim**0.5
            weights, at = scores.softmax(-1).max(-1)
            assert weights.min() > 0.5
            assert (at == at[:1]).all(), "whatever the content"
            seen += (coordinates(grid)[at[0]] - coordinates(grid)[middle]).tolist()
        places = [list(place) for place in (NEIGHBOURS if t == 1 else IN_TIME)]
        assert seen == (places * 2)[: len(seen)]


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norms_hand_on_a_constant_and_do_not_divide_by_contrast(make, pixels, norm):
    model, clips = make(norm=norm), pixels(200, 1, 4, 4, 3)
    init_from_pca(model, fit_pca([clips], (1, 4), 48), beta=1e-6)
    tokens = model.encoder.embed(torch.stack([clips[0], 128 + (clips[0].int() - 128) // 2]).to(torch.uint8))
    full, half = model.encoder.stack.blocks[0].attention_norm(tokens)[0]
    torch.testing.assert_close(full[:, -1], torch.ones(1), rtol=0.1, atol=0)
    torch.testing.assert_close(half[:, -1], torch.ones(1), rtol=0.1, atol=0)
    ratio = (half[:, 1:-1].norm() / full[:, 1:-1].norm()).item()
    assert 0.4 < ratio < 0.7, "half the contrast is half as much of it behind the norm"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"final_norm": True}, "final_norm false"),
        ({"absolute": "sincos"}, "absolute 'none'"),
        ({"bottleneck": "layernorm"}, "the gaussian bottleneck"),
        ({"pixel_bias": "channel"}, "pixel_bias 'element'"),
        ({"channels": 48}, "as many components as `channels`, and widths above it"),
    ],
)
def test_models_that_cannot_be_linear(make, pixels, fields, message, one_sentence):
    pca = fit_pca([pixels(80, 1, 4, 4, 3)], (1, 4), 48)
    with pytest.raises(InputError) as error:
        init_from_pca(make(**fields), pca, beta=1e-6)
    one_sentence(error.value, message)
