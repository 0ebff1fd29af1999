"""Frechet distances against closed forms and scipy, moments in parts, and the inception score by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vitok import InputError
from vitok.evaluate.frechet import Moments, frechet_distance, inception_score


def moments(features):
    found = Moments()
    found.add(features)
    return found


def gaussian(mean, covariance, count=2):
    return Moments(count, torch.as_tensor(mean).double(), torch.as_tensor(covariance).double() * (count - 1))


def test_moments_are_those_of_numpy_whatever_the_batches_and_processes():
    x = torch.randn(101, 7) * 3 + 1000
    whole = moments(x)
    np.testing.assert_allclose(whole.mean, x.double().mean(0), rtol=1e-14)
    np.testing.assert_allclose(whole.scatter / 100, np.cov(x.double().numpy().T), rtol=1e-9)
    parts = [Moments() for _ in range(4)]
    for i, batch in enumerate(x.split(9)):
        parts[i % 3].add(batch)  # the last stays empty
    merged = Moments.merged(parts)
    assert merged.count == 101
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(merged.scatter, whole.scatter, rtol=1e-11, atol=1e-9)


def test_equal_moments_have_no_distance_even_when_singular():
    for count in (500, 5):
        found = moments(torch.randn(count, 20))
        assert frechet_distance(found, found) < 1e-12


def test_diagonal_covariances():
    a, b = torch.rand(6).double() + 0.1, torch.rand(6).double() + 0.1
    b[2] = 0  # singular
    mean = torch.arange(6.0).double()
    expected = ((mean**2).sum() + (a.sqrt() - b.sqrt()).square().sum()).item()
    assert frechet_distance(gaussian(mean, a.diag()), gaussian(0 * mean, b.diag())) == pytest.approx(
        expected, rel=1e-12
    )


def test_commuting_covariances():
    basis = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64)).Q
    a, b = torch.rand(2, 9, dtype=torch.float64)
    pair = [gaussian(torch.zeros(9), basis @ x.diag() @ basis.T) for x in (a, b)]
    assert frechet_distance(*pair) == pytest.approx((a.sqrt() - b.sqrt()).square().sum().item(), rel=1e-11)


def test_covariances_that_share_no_direction():
    a, b = (torch.zeros(4, 4).double() for _ in range(2))
    a[0, 0], b[1, 1] = 4.0, 9.0
    assert frechet_distance(gaussian(torch.zeros(4), a), gaussian(torch.zeros(4), b)) == pytest.approx(13, rel=1e-14)


@pytest.mark.parametrize("count", [200, 8])
def test_against_scipy(count):
    linalg = pytest.importorskip("scipy.linalg")
    x, y = torch.randn(count, 12).double(), torch.randn(count + 3, 12).double() @ torch.randn(12, 12).double() + 1
    a, b = np.cov(x.numpy().T), np.cov(y.numpy().T)
    root = linalg.sqrtm(a @ b).real.trace()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + np.trace(a) + np.trace(b) - 2 * root
    # scipy's root of a singular matrix is the less exact of the two
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected, rel=1e-9 if count > 12 else 1e-4)


def test_what_has_no_distance(one_sentence):
    two, one = moments(torch.randn(2, 3)), moments(torch.randn(1, 3))
    for call, words in (
        (lambda: frechet_distance(two, one), "at least 2 samples, got 1"),
        (lambda: frechet_distance(two, Moments()), "at least 2 samples, got 0"),
        (lambda: frechet_distance(two, moments(torch.randn(4, 5))), "of 3 and of 5 numbers"),
        (lambda: Moments.merged([two, moments(torch.randn(4, 5))]), "of 5 and of 3 numbers"),
        (lambda: two.add(torch.full((2, 3), math.nan)), "finite"),
        (lambda: inception_score(torch.randn(9, 4)), "10 splits"),
    ):
        with pytest.raises(InputError) as error:
            call()
        one_sentence(error.value, words)


def test_inception_score_by_hand():
    sure = 200 * torch.eye(4).repeat(5, 1)
    assert inception_score(sure, splits=1) == pytest.approx((4.0, 0.0))  # every picture is sure, all classes alike
    assert inception_score(torch.zeros(20, 4)) == pytest.approx((1.0, 0.0))
    logits = torch.randn(30, 5, dtype=torch.float64)
    p = logits.softmax(1)
    mean, deviation = inception_score(logits, splits=1)
    assert deviation == 0.0
    assert mean == pytest.approx((p * (p / p.mean(0)).log()).sum(1).mean().exp().item(), rel=1e-12)
    order = np.random.RandomState(2020).permutation(30)
    scores = [inception_score(logits[part], splits=1)[0] for part in np.split(order, 3)]
    assert inception_score(logits, splits=3) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)
