"""Principal components of tubelets: a known subspace, the optimum among linear tokenizers, and too little data."""

from __future__ import annotations

import pytest
import torch

from vitok import InputError
from vitok.evaluate.pca import fit_pca


def clips_in_a_subspace(rank, q=2, p=4, count=40):
    """uint8 clips of one tubelet each around a mean, plus `rank` patterns of known and falling strength."""
    elements = q * p * p * 3
    basis = torch.linalg.qr(torch.randn(elements, rank, dtype=torch.float64)).Q
    strengths = torch.tensor([200.0 / 2**i for i in range(rank)], dtype=torch.float64)
    codes = torch.randn(count, rank, dtype=torch.float64) * strengths
    tubelets = 127 + codes @ basis.T
    return tubelets.clamp(0, 255).round().to(torch.uint8).view(count, q, p, p, 3), basis


def test_finds_a_known_subspace():
    clips, basis = clips_in_a_subspace(rank=3, count=200)
    pca = fit_pca(clips.split(37), (2, 4), 5)
    assert pca.components.shape == (5, 96) and pca.mean.shape == (96,)
    torch.testing.assert_close(pca.components @ pca.components.T, torch.eye(5), rtol=0, atol=1e-5)
    overlap = torch.linalg.svdvals(pca.components[:3].double() @ basis)
    assert overlap.min() > 0.999, "the first three span the patterns"
    assert (pca.variances[:-1] >= pca.variances[1:]).all() and pca.variances[3] < 0.02 * pca.variances[2]


def test_equals_the_covariance_of_all_rows_at_once(pixels):
    clips = pixels(30, 2, 4, 4, 3)
    rows = clips.double().flatten(1) * 2 / 255 - 1
    values, vectors = torch.linalg.eigh(torch.cov(rows.T, correction=0))
    pca = fit_pca(clips.split(7), (2, 4), 6)
    torch.testing.assert_close(pca.mean.double(), rows.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pca.variances.double(), values.flip(0)[:6], rtol=1e-5, atol=1e-6)
    along = (pca.components.double() * vectors.flip(1)[:, :6].T).sum(1).abs()
    torch.testing.assert_close(along, torch.ones(6).double(), rtol=0, atol=1e-5)


def test_reconstruction_is_the_projection_and_gets_better_with_channels(pixels):
    clips = pixels(60, 1, 4, 4, 3)
    pca = fit_pca([clips], (1, 4), 48)
    images = clips.float() * (2 / 255) - 1
    errors = [(pca.reconstruct(clips, k).movedim(1, -1) - images).square().mean().item() for k in (1, 8, 24, 48)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-9
    lost = pca.variances[8:].sum() / 48
    assert errors[1] == pytest.approx(lost.item(), rel=1e-4), "what is lost is the variance left out"


def test_odd_sizes_are_padded_and_cropped(pixels):
    pca = fit_pca([pixels(60, 1, 4, 4, 3)], (1, 4), 48)
    clip = pixels(1, 1, 7, 9, 3)
    back = pca.reconstruct(clip, 48)
    torch.testing.assert_close(back.movedim(1, -1), clip.float() * (2 / 255) - 1, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [0, 6])
def test_too_few_tubelets(pixels, count, one_sentence):
    with pytest.raises(InputError) as error:
        fit_pca(pixels(count, 1, 4, 4, 3).split(2) if count else [], (1, 4), 6)
    one_sentence(error.value, f"{count} tubelets are too few to fit 6 principal components")
