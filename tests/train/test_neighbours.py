"""A decoder fitted by least squares to what its heads see of neighbours."""

from __future__ import annotations

import pytest
import torch

import vitok
from vitok import InputError
from vitok.evaluate.pca import fit_pca
from vitok.train.init import init_from_pca
from vitok.train.local_pca import count_components, fit_local_pca, init_from_local_pca, matching
from vitok.train.neighbours import fit_neighbours

MODEL = {"pixel_bias": "element", "qk_norm": True, "channels": 6,
         "encoder_width": 64, "encoder_heads": 2, "encoder_depth": 3,
         "decoder_width": 128, "decoder_heads": 2, "decoder_depth": 4}  # fmt: skip


def waves(count, seed, pace=0.5):
    """uint8 pictures [B, 1, 24, 24, 3], smooth, so that a patch says much about the next."""
    generator = torch.Generator().manual_seed(seed)
    speed, phase, colour = (torch.randn(n, count, 1, 1, 3, generator=generator) for n in (2, 1, 1))
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    pictures = torch.sin(pace * (speed[0] * y[..., None] + speed[1] * x[..., None]) + 3 * phase[0]) * colour[0]
    return (127.5 + 50 * pictures).round().clamp(0, 255).to(torch.uint8).unsqueeze(1)


def apart(count, seed, pace=0.5):
    """The same, of patches that know nothing of each other."""
    patches = waves(36 * count, seed, pace)[:, 0, :4, :4]
    return patches.view(count, 6, 6, 4, 4, 3).transpose(2, 3).reshape(count, 1, 24, 24, 3)


def started(pictures, bases, **fields):
    """A model that starts from PCA, and the PCA."""
    linear = {"norm": "rms"} if bases > 1 else {"final_norm": False}
    model = vitok.create_model("S-S/4", **(MODEL | linear | fields)).eval()
    if bases == 1:
        pca = fit_pca([pictures], (1, 4), 48)
        init_from_pca(model, pca, beta=1e-6)
        return model, pca
    local = fit_local_pca(
        lambda _: pictures, 1, (1, 4), count_components(model.config, bases), bases, model.config.channels - 1
    )
    init_from_local_pca(model, local, beta=1e-6)
    return model, local.pca


def classes(pca, bases=1):
    return matching(128, len(pca.components), bases)


def error(model, pictures):
    """Mean squared error, the geometric mean over pictures: pictures weigh by one over their errors in the fit."""
    with torch.no_grad():
        decoded = model.decode(model.encode(pictures, layout="channels_last").mode(), size=(1, 24, 24))
    return (decoded.movedim(1, -1) - (pictures.float() * (2 / 255) - 1)).square().flatten(1).mean(1).log().mean().exp()


@pytest.mark.parametrize("bases", [1, 2])
def test_smooth_pictures_gain_from_neighbours(bases):
    model, pca = started(waves(200, seed=0), bases)
    before, unseen = {key: value.clone() for key, value in model.state_dict().items()}, waves(50, seed=9)
    error_before = error(model, unseen)
    fit_neighbours(model, pca, [waves(100, seed=1), waves(100, seed=2)], classes(pca, bases), skip=bases - 1)
    assert error(model, unseen) < 0.85 * error_before
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    blocks = {".".join(key.split(".")[:4]) for key in moved}
    assert blocks == {f"decoder.stack.blocks.{number}" for number in range(bases - 1, 4)}


def test_batches_of_several_sizes():
    """As a mixture of pictures and clips gives them."""
    model, pca = started(waves(200, seed=0), 1)
    unseen = waves(50, seed=9)
    error_before = error(model, unseen)
    fit_neighbours(model, pca, [waves(100, seed=1)[:, :, :16, :20], waves(100, seed=2)], classes(pca))
    assert error(model, unseen) < 0.85 * error_before


def two_kinds(count, seed):
    """Smooth pictures under fine checkerboards, and patches that know nothing of each other under fine stripes."""
    y, x = torch.meshgrid(torch.arange(24), torch.arange(24), indexing="ij")
    checkerboard, stripes = ((-1.0) ** n.unsqueeze(-1) for n in (x + y, x))
    signs = torch.randint(2, (2, count, 1, 6, 6, 3), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    signs = 70 * signs.repeat_interleave(4, 3).repeat_interleave(4, 4)
    smooth, rough = waves(count, seed, 0.2), apart(count, seed, 0.2)
    pictures = torch.cat((smooth + signs[0] * checkerboard, rough + signs[1] * stripes))
    return pictures.round().clamp(0, 255).to(torch.uint8)


def test_classes_have_maps_of_their_own():
    errors = []
    for bases in (1, 2):
        model, pca = started(two_kinds(100, seed=0), 2, channels=8)
        fit_neighbours(model, pca, [two_kinds(200, seed=1)], classes(pca, bases), skip=1)
        errors.append(error(model, two_kinds(50, seed=9)))
    assert errors[1] < 0.97 * errors[0]


def test_patches_apart_lose_nothing():
    model, pca = started(apart(200, seed=0), 1)
    unseen = apart(50, seed=9)
    error_before = error(model, unseen)
    fit_neighbours(model, pca, [apart(1000, seed=1)], classes(pca))
    assert 0.9 * error_before < error(model, unseen) < 1.02 * error_before


@pytest.mark.parametrize("fields", [{"block": "parallel"}, {"qk_norm": False}, {"rope": "1d"}])
def test_models_whose_heads_do_not_look_at_neighbours(fields, one_sentence):
    model, pca = started(waves(20, seed=0), 1, **fields)
    with pytest.raises(InputError) as found:
        fit_neighbours(model, pca, [waves(8, seed=1)], classes(pca))
    one_sentence(found.value, "needs block 'serial', qk_norm true and rope '2d' or '3d', got")
