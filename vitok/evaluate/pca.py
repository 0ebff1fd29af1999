"""Principal components of tubelets: the best linear tokenizer of a patch, a baseline and a place to start from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vitok.errors import InputError
from vitok.ops import tubelet_gather, tubelet_unembed

PCA_CROPS = 840
"""Crops of 256 x 256 pixels that a baseline is fitted on."""


@dataclass(frozen=True)
class PatchPCA:
    """`mean` [n], orthonormal rows `components` [k, n], their `variances` [k]; n = q * p * p * 3, pixels in [-1, 1]."""

    tubelet: tuple[int, int]
    mean: Tensor
    components: Tensor
    variances: Tensor

    def reconstruct(self, pixels: Tensor, channels: int) -> Tensor:
        """Pixels [B, T, H, W, 3] through the first `channels` components and back: [B, 3, T, H, W], not clamped."""
        rows = tubelet_gather(pixels, tubelet=self.tubelet)
        basis = self.components[:channels]
        codes = (rows - self.mean) @ basis.T
        return tubelet_unembed(
            codes, basis.T, self.mean, tubelet=self.tubelet, size=(pixels.shape[1], pixels.shape[2], pixels.shape[3])
        )


def fit_pca(batches: Iterable[Tensor], tubelet: tuple[int, int], components: int) -> PatchPCA:
    """Fit on batches of uint8 pixels [B, T, H, W, 3]; sums in float64.

    Raises InputError unless there are more tubelets than components.
    """
    elements = tubelet[0] * tubelet[1] ** 2 * 3
    total, outer, rows_seen = torch.zeros(elements).double(), torch.zeros(elements, elements).double(), 0
    for pixels in batches:
        rows = tubelet_gather(pixels, tubelet=tubelet).flatten(0, 1).double()
        total, outer, rows_seen = total + rows.sum(0), outer + rows.T @ rows, rows_seen + len(rows)
    if rows_seen <= components:
        raise InputError(f"{rows_seen} tubelets are too few to fit {components} principal components")
    mean = total / rows_seen
    variances, vectors = torch.linalg.eigh(outer / rows_seen - torch.outer(mean, mean))
    order = variances.argsort(descending=True)[:components]
    return PatchPCA(tubelet, mean.float(), vectors.T[order].float().contiguous(), variances[order].clamp(min=0).float())
