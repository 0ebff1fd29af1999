"""PSNR by hand and SSIM against a slow, separate implementation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vitok import InputError
from vitok.evaluate.metrics import psnr, ssim, to_uint8


def test_psnr_by_hand():
    a = torch.zeros(2, 2, 3, dtype=torch.uint8)
    b = a.clone()
    b[0, 0, 0] = 12  # mean squared error 144 / 12 = 12
    assert psnr(a, b) == pytest.approx(10 * math.log10(255**2 / 12), abs=1e-9)
    assert psnr(b, a) == psnr(a, b)
    assert psnr(a, torch.full_like(a, 255)) == pytest.approx(0.0, abs=1e-9)
    assert psnr(a, a) == math.inf


def slow_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Window by window, from the definitions of mean, variance and covariance under Gaussian weights."""
    height, width, _ = a.shape
    rows, columns = min(11, height), min(11, width)
    y, x = np.mgrid[:rows, :columns]
    weights = np.exp(-((y - (rows - 1) / 2) ** 2 + (x - (columns - 1) / 2) ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for c in range(3):
        for top in range(height - rows + 1):
            for left in range(width - columns + 1):
                u, v = (i[top : top + rows, left : left + columns, c].astype(np.float64) for i in (a, b))
                mu, mv = (weights * u).sum(), (weights * v).sum()
                vu, vv = (weights * (u - mu) ** 2).sum(), (weights * (v - mv) ** 2).sum()
                cov = (weights * (u - mu) * (v - mv)).sum()
                c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                values.append((2 * mu * mv + c1) * (2 * cov + c2) / ((mu**2 + mv**2 + c1) * (vu + vv + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize("size", [(14, 13), (11, 11), (5, 20), (1, 1), (1, 30)])
@pytest.mark.parametrize("noise", [0, 5, 60])
def test_ssim_against_the_definition(size, noise):
    rng = np.random.default_rng(noise)
    a = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
    b = (a + rng.normal(0, noise, a.shape)).clip(0, 255).astype(np.uint8) if noise else a
    actual = ssim(torch.from_numpy(a), torch.from_numpy(b))
    assert actual == pytest.approx(slow_ssim(a, b), abs=1e-9)
    if noise == 0:
        assert actual == pytest.approx(1.0, abs=1e-12)


def test_ssim_of_a_clip_is_the_mean_of_its_frames(pixels):
    a, b = pixels(3, 12, 15, 3), pixels(3, 12, 15, 3, seed=1)
    assert ssim(a, b) == pytest.approx(sum(ssim(x, y) for x, y in zip(a, b, strict=True)) / 3, abs=1e-12)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_unlike_tensors(metric, pixels, one_sentence):
    for a, b in [(pixels(8, 8, 3), pixels(8, 9, 3)), (pixels(8, 8, 3), pixels(8, 8, 3).float())]:
        with pytest.raises(InputError) as error:
            metric(a, b)
        one_sentence(error.value, "two uint8 tensors of one shape")


def test_to_uint8_undoes_the_normalisation_and_clamps():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() * (2 / 255) - 1), levels)
    assert to_uint8(torch.tensor([-1.7, -1, 0.999, 1, 9])).tolist() == [0, 0, 255, 255, 255]
    assert to_uint8(torch.tensor([0.5], dtype=torch.bfloat16)).tolist() == [191]


@pytest.mark.parametrize("noise", [3, 40])
def test_ssim_against_scikit_image(noise):
    metrics = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(noise)
    a = rng.integers(0, 256, (40, 33, 3)).astype(np.uint8)
    b = (a + rng.normal(0, noise, a.shape)).clip(0, 255).astype(np.uint8)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    expected = metrics.structural_similarity(a, b, channel_axis=-1, **options)
    assert ssim(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, abs=1e-9)
    assert psnr(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(
        metrics.peak_signal_noise_ratio(a, b, data_range=255), abs=1e-9
    )
