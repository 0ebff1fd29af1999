"""Starting as the best linear tokenizer, exactly."""

from __future__ import annotations

import pytest
import torch

import vitok
from vitok import InputError
from vitok.evaluate.pca import fit_pca
from vitok.train.init import init_from_pca

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
    init_from_pca(model, pca)
    clip = pixels(2, q, 9, 14, 3, seed=1)
    posterior = model.encode(clip, layout="channels_last")
    reconstruction = model.decode(posterior.mode(), size=tuple(clip.shape[1:4]))
    torch.testing.assert_close(reconstruction, pca.reconstruct(clip, 6), rtol=0, atol=2e-5)
    assert reconstruction.std() > 0.05
    assert (posterior.logvar == -8).all(), "little noise to begin with"


def test_latents_have_unit_variance(make, pixels):
    model, clips = make(), pixels(500, 1, 4, 4, 3)
    init_from_pca(model, fit_pca([clips], (1, 4), 48))
    latents = model.encode(clips, layout="channels_last").mean.movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(latents.mean(0), torch.zeros(6), rtol=0, atol=1e-3)
    torch.testing.assert_close(latents.var(0), torch.ones(6), rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"final_norm": True}, "final_norm false"),
        ({"absolute": "sincos"}, "absolute 'none'"),
        ({"bottleneck": "layernorm"}, "the gaussian bottleneck"),
        ({"pixel_bias": "channel"}, "pixel_bias 'element'"),
        ({"channels": 49}, "widths and components of at least `channels`"),
    ],
)
def test_models_that_cannot_be_linear(make, pixels, fields, message, one_sentence):
    pca = fit_pca([pixels(80, 1, 4, 4, 3)], (1, 4), 48)
    with pytest.raises(InputError) as error:
        init_from_pca(make(**fields), pca)
    one_sentence(error.value, message)
