"""Distances of distributions from sums that can be added up: the Frechet distance and the inception score."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from vitok.errors import InputError

SPLITS = 10
SHUFFLE_SEED = 2020  # of the inception score, as torch-fidelity has it


@dataclass
class Moments:
    """Count, mean [d] and scatter [d, d] (the sum of outer products of deviations) of features, in float64 on the CPU.

    Features come in any number of batches, in any order and in several processes: `Moments.merged` gives the moments of
    all of them, but for rounding in float64 (Chan, Golub and LeVeque, "Updating formulae", 1979).
    """

    count: int = 0
    mean: Tensor | None = None
    scatter: Tensor | None = None

    def add(self, features: Tensor) -> None:
        """Take in features [n, d] of any floating dtype and device."""
        if features.dim() != 2 or not features.isfinite().all():
            raise InputError(f"features must be finite and of shape [n, d], got {list(features.shape)}")
        if len(features) == 0:
            return
        rows = features.detach().double().cpu()
        mean = rows.mean(0)
        deviations = rows - mean
        both = Moments.merged([self, Moments(len(rows), mean, deviations.T @ deviations)])
        self.count, self.mean, self.scatter = both.count, both.mean, both.scatter

    @staticmethod
    def merged(parts: Iterable[Moments]) -> Moments:
        """The moments of all features of `parts`, which stay as they are."""
        total = Moments()
        for part in parts:
            if part.mean is None or part.scatter is None:
                continue
            if total.mean is None or total.scatter is None:
                total = Moments(part.count, part.mean, part.scatter)
                continue
            if part.mean.shape != total.mean.shape:
                raise InputError(f"features of {len(part.mean)} and of {len(total.mean)} numbers cannot be merged")
            count, step = total.count + part.count, part.mean - total.mean
            scatter = total.scatter + part.scatter + torch.outer(step, step) * (total.count * part.count / count)
            total = Moments(count, total.mean + step * (part.count / count), scatter)
        return total

    def factor(self) -> Tensor:
        """A [d, r] of full rank with A A^T the covariance (divided by count - 1), r its numerical rank."""
        if self.scatter is None or self.count < 2:
            raise InputError(f"a covariance needs at least 2 samples, got {self.count}")
        values, vectors = torch.linalg.eigh(self.scatter / (self.count - 1))
        kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        return vectors[:, kept] * values[kept].sqrt()


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), the squared 2-Wasserstein distance of two Gaussians.

    Dowson and Landau, J. Multivariate Analysis 12, 1982; as "FID" Heusel et al., arXiv:1706.08500. With C = A A^T the
    last trace is the sum of the singular values of A_a^T A_b, which needs neither a matrix square root nor an offset on
    the diagonal and holds for singular covariances, such as those of fewer samples than features.

    Raises InputError for fewer than 2 samples and features of unlike length.
    """
    factors = a.factor(), b.factor()
    assert a.mean is not None and b.mean is not None  # as factor() has seen
    if a.mean.shape != b.mean.shape:
        raise InputError(f"features of {len(a.mean)} and of {len(b.mean)} numbers have no distance")
    cross = torch.linalg.svdvals(factors[0].T @ factors[1]).sum()
    traces = sum(factor.square().sum() for factor in factors)
    return max(0.0, float((a.mean - b.mean).square().sum() + traces - 2 * cross))


def inception_score(logits: Tensor, splits: int = SPLITS) -> tuple[float, float]:
    """Mean and standard deviation over `splits` of exp(mean KL(p(y|x) || p(y))), from logits [n, classes].

    Salimans et al., arXiv:1606.03498. As in torch-fidelity the rows are shuffled with a fixed seed and split evenly in
    that order, p(y) is that of the split, and the deviation is the population's. Raises InputError for n < splits.
    """
    if logits.dim() != 2 or len(logits) < splits or splits < 1:
        raise InputError(f"an inception score of {splits} splits needs as many samples, got {list(logits.shape)}")
    order = np.random.RandomState(SHUFFLE_SEED).permutation(len(logits))
    log_p = logits.detach().cpu().double()[torch.from_numpy(order)].log_softmax(1)
    bounds = [i * len(log_p) // splits for i in range(splits + 1)]
    scores = []
    for first, last in pairwise(bounds):
        part = log_p[first:last]
        marginal = part.logsumexp(0) - np.log(len(part))
        scores.append((part.exp() * (part - marginal)).sum(1).mean().exp())
    return float(torch.stack(scores).mean()), float(torch.stack(scores).std(correction=0))
