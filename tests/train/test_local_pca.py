"""Starting as several linear tokenizers, of which every tubelet takes the best, to rounding."""

from __future__ import annotations

import pytest
import torch

import vitok
from vitok import InputError
from vitok.evaluate.pca import fit_pca
from vitok.ops import tubelet_gather
from vitok.train.local_pca import count_components, fit_local_pca, init_from_local_pca

MODEL = {"norm": "rms", "final_norm": True, "pixel_bias": "element", "channels": 8,
         "encoder_width": 64, "encoder_heads": 2, "encoder_depth": 4,
         "decoder_width": 64, "decoder_heads": 2, "decoder_depth": 2}  # fmt: skip
BASES = 3


@pytest.fixture
def make():
    def make(**fields):
        return vitok.create_model("S-S/4", **(MODEL | fields)).eval()

    return make


@pytest.fixture
def kinds():
    """`kinds(count, seed, contrast)`: uint8 pictures [B, 1, 4, 4, 3], each from one of three subspaces of 6 dimensions,
    with a little noise."""
    spaces = torch.linalg.qr(torch.randn(BASES, 48, 6, generator=torch.Generator().manual_seed(0)))[0]

    def draw(count, seed=0, contrast=60):
        generator = torch.Generator().manual_seed(seed)
        space = spaces[torch.randint(BASES, (count,), generator=generator)]
        pictures = (space @ torch.randn(count, 6, 1, generator=generator))[..., 0] + 0.02 * torch.randn(count, 48)
        return (127.5 + contrast * pictures).round().clamp(0, 255).to(torch.uint8).view(count, 1, 4, 4, 3)

    return draw


@pytest.fixture
def local(make, kinds):
    components = count_components(make().config, BASES)
    return fit_local_pca(lambda number: kinds(500, number), 6, (1, 4), components, BASES, 6)


def reconstruct(model, clip):
    with torch.no_grad():
        return model.decode(model.encode(clip, layout="channels_last").mode(), size=tuple(clip.shape[1:4]))


def rows_of(clip):
    return tubelet_gather(clip, tubelet=(1, 4)).flatten(0, 1)


def through(local, clip):
    """Pictures of one tubelet through the basis that is best for each: rows [B, 48]."""
    z = (rows_of(clip) - local.pca.mean) @ local.pca.components.T
    codes, chosen = local.code(z)
    back = torch.stack([code @ local.bases[number] for code, number in zip(codes, chosen, strict=True)])
    return back @ local.pca.components + local.pca.mean


def test_finds_the_kinds(local, kinds):
    """And is far better than one basis of as many channels."""
    clip = kinds(1000, seed=9)
    one = fit_pca([kinds(500, number) for number in range(6)], (1, 4), 8).reconstruct(clip, 8)
    error_of_one = (one[:, :, 0].movedim(1, -1).flatten(1) - rows_of(clip)).square().mean()
    assert (through(local, clip) - rows_of(clip)).square().mean() < 0.05 * error_of_one
    counts = torch.bincount(local.choose(local.coordinates), minlength=BASES)
    assert counts.min() > 0.2 * len(local.coordinates)
    assert counts[0] == counts.max(), "the first basis, which needs no flag, is the one that most take"


def test_bases_are_orthonormal_and_the_first_comes_first(local):
    torch.testing.assert_close(local.bases @ local.bases.mT, torch.eye(6).expand(BASES, 6, 6), rtol=0, atol=1e-4)
    torch.testing.assert_close(local.bases[0], torch.eye(*local.bases.shape[1:]), rtol=0, atol=1e-4)
    k = len(local.pca.components)
    torch.testing.assert_close(local.pca.components @ local.pca.components.T, torch.eye(k), rtol=0, atol=1e-4)
    for basis in local.bases[1:]:  # aligned: the product is symmetric and has no negative eigenvalue
        product = basis @ local.bases[0].T
        torch.testing.assert_close(product, product.T, rtol=0, atol=1e-4)
        assert torch.linalg.eigvalsh(product).min() > -1e-4


@pytest.mark.parametrize("contrast", [60, 6])
def test_the_model_codes_by_the_best_basis(make, local, kinds, contrast):
    """Also where bases keep nearly the same, as of what is faint or smooth."""
    model, clip = make(), kinds(400, seed=9, contrast=contrast)
    init_from_local_pca(model, local, beta=1e-6)
    z = (rows_of(clip) - local.pca.mean) @ local.pca.components.T
    kept = torch.stack([(z @ basis.T).square().sum(1) for basis in local.bases]).sort(0).values
    clear = kept[-1] - kept[-2] > 0.001
    assert clear.float().mean() > 0.9
    expected = through(local, clip).view(400, 4, 4, 3)
    found = reconstruct(model, clip).movedim(1, -1).reshape(400, 4, 4, 3)
    torch.testing.assert_close(found[clear], expected[clear], rtol=0, atol=2e-3)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.5)  # between two bases: their mean, or nearly


def test_latents_are_coordinates_of_unit_variance_and_flags(make, local, kinds):
    model, clip = make(), kinds(2000, seed=9)
    init_from_local_pca(model, local, beta=1e-6)
    with torch.no_grad():
        posterior = model.encode(clip, layout="channels_last")
    latents = posterior.mode().movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(latents.square().mean(0).sqrt(), torch.ones(8), rtol=0.1, atol=0)
    flags = latents[:, 6:]
    values = flags.round(decimals=2).unique(dim=0, return_counts=True)[1].sort(descending=True).values
    assert values[:BASES].sum() > 0.95 * len(latents), "two flags take as many pairs of values as there are bases"
    assert posterior.logvar.max() < -5


def test_depends_on_nothing_but_the_tubelet_and_goes_through_a_file(make, local, kinds, tmp_path):
    model, clip = make(qk_norm=True), kinds(4, seed=9).view(2, 1, 8, 4, 3)
    init_from_local_pca(model, local, beta=1e-6)
    whole = reconstruct(model, clip)
    torch.testing.assert_close(reconstruct(model, clip[:, :, :4]), whole[:, :, :, :4], rtol=0, atol=1e-4)
    model.save(tmp_path / "model")
    assert torch.equal(reconstruct(vitok.load(tmp_path / "model"), clip), whole)


@pytest.mark.parametrize(
    "fields",
    [
        {"encoder_width": 16, "encoder_heads": 1, "channels": 12},
        {"decoder_width": 16, "decoder_heads": 1, "channels": 16},
        {"channels": 2},
        {"encoder_depth": 2},
    ],
)
def test_too_small_models_are_refused_before_anything_is_fitted(make, fields, one_sentence):
    with pytest.raises(InputError) as error:
        count_components(make(**fields).config, BASES)
    one_sentence(error.value, "hidden units and wider stacks, got")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm": "layer"}, "needs norm 'rms'"),
        ({"final_norm": False}, "needs final_norm True"),
        ({"block": "parallel"}, "needs block 'serial'"),
        ({"pixel_bias": "channel"}, "needs pixel_bias 'element'"),
        ({"encoder_depth": 2}, "needs an encoder of 3 blocks, 14 hidden units and wider stacks, got 2 blocks"),
        ({"encoder_hidden": 8}, "got 4 blocks, 8 and"),
        ({"channels": 2}, "3 bases of 2 channels"),
    ],
)
def test_models_that_cannot_hold_it(make, local, fields, message, one_sentence):
    with pytest.raises(InputError) as error:
        init_from_local_pca(make(**fields), local, beta=1e-6)
    one_sentence(error.value, message)
