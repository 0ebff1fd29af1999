"""Reconstruction quality on a folder of pictures or clips: short side to a size, centre crop, uint8, scores of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from vitok.errors import InputError
from vitok.evaluate.features import AT_ONCE, Comparison, Distance
from vitok.evaluate.metrics import from_uint8, psnr, ssim, to_uint8
from vitok.io import ClipReader
from vitok.io.files import Entry, find_inputs
from vitok.io.images import read_image, resize_and_crop

CHUNK = 8  # frames of a clip held at their own size


@dataclass(frozen=True)
class Score:
    """One picture or clip: PSNR in dB, SSIM and distances by name, or the error that stands for them.

    Of a clip each is the mean over its frames. `index` is its place in the order of files.
    """

    path: Path
    psnr: float = 0.0
    ssim: float = 0.0
    error: InputError | None = None
    index: int = 0
    distances: Mapping[str, float] = field(default_factory=dict)


@torch.no_grad()
def score_folder(
    folder: str | Path,
    size: int,
    reconstruct: Callable[[Tensor], Tensor],
    *,
    batch: int = 1,
    frames: int | None = None,
    distances: Mapping[str, Distance] | None = None,
    comparisons: Sequence[Comparison] = (),
    device: torch.device | str = "cpu",
    rank: int = 0,
    world: int = 1,
) -> Iterator[Score]:
    """Score every picture below `folder`, or with `frames` the first so many frames of every clip, in order.

    Args:
        size: short side and centre crop, pixels.
        reconstruct: maps uint8 [B, size, size, 3] to floats [B, 3, size, size] in [-1, 1], of clips uint8
            [B, frames, size, size, 3] to [B, 3, frames, size, size].
        batch: pictures or clips at a time; the scores are the same but for what `reconstruct` and the networks round.
        distances: see `vitok.evaluate.features`; they work on `device`.
        comparisons: are given every reconstruction with its original.
        rank, world: score only batches `rank`, `rank + world` and so on of those that one process makes;
            `merge_scores` and `Comparison.merge` put the parts together.
    """
    for group in _batches(folder, size, batch, frames, rank, world):
        good = [(score, pixels) for score, pixels in group if pixels is not None]
        measured: Iterator[Score] = iter(())
        if good:
            scores, originals = zip(*good, strict=True)
            before = torch.stack(originals)
            after = to_uint8(reconstruct(before)).movedim(1, -1).cpu()
            if frames is None:
                before, after = before[:, None], after[:, None]
            for comparison in comparisons:
                comparison.add([score.index for score in scores], before, after)
            measured = _measure(scores, before, after, distances or {}, device)
        yield from (next(measured) if pixels is not None else score for score, pixels in group)


def merge_scores(parts: Iterable[Iterable[Score]]) -> list[Score]:
    """The scores of several slices of a folder, each made with its `rank`, in the order of files."""
    return sorted((score for part in parts for score in part), key=lambda score: score.index)


def _batches(
    folder: str | Path, size: int, batch: int, frames: int | None, rank: int, world: int
) -> Iterator[list[tuple[Score, Tensor | None]]]:
    """Files in order, `batch` at a time, with their pixels; None where a score has an error."""
    entries = find_inputs([folder], kinds=("image",) if frames is None else ("clip",))
    # Whole batches are shared out: what a model rounds depends on the pictures that it is given at once.
    for start in range(rank * batch, len(entries), world * batch):
        group: list[tuple[Score, Tensor | None]] = []
        for index, entry in enumerate(entries[start : start + batch], start):
            try:
                group.append((Score(entry.path, index=index), _read(entry, size, frames)))
            except InputError as error:
                group.append((Score(entry.path, error=error, index=index), None))
        yield group


def _measure(
    scores: Sequence[Score],
    before: Tensor,
    after: Tensor,
    distances: Mapping[str, Distance],
    device: torch.device | str,
) -> Iterator[Score]:
    """The scores filled in from uint8 [B, T, H, W, 3] of originals and reconstructions."""
    far: dict[str, list[Tensor]] = {name: [] for name in distances}
    for parts in zip(*(x.flatten(0, 1).split(AT_ONCE) for x in (before, after)), strict=True) if distances else ():
        pair = [from_uint8(part.to(device).movedim(-1, 1)) for part in parts]
        for name, distance in distances.items():
            far[name].append(distance(*pair).double().cpu())
    means = {name: torch.cat(values).view(after.shape[:2]).mean(1).tolist() for name, values in far.items()}
    for i, score in enumerate(scores):
        yield replace(
            score,
            psnr=fmean(psnr(x, y) for x, y in zip(after[i], before[i], strict=True)),
            ssim=ssim(after[i], before[i]),
            distances={name: values[i] for name, values in means.items()},
        )


def _read(entry: Entry, size: int, frames: int | None) -> Tensor:
    """uint8 [size, size, 3], or the first frames of a clip [frames, size, size, 3]."""
    if entry.error:
        raise entry.error
    if frames is None:
        return resize_and_crop(read_image(entry.path).pixels, size)
    parts: list[Tensor] = []
    with ClipReader(entry.path) as reader:
        for chunk in reader.chunks(min(frames, CHUNK)):
            parts.append(resize_and_crop(chunk, size))
            if sum(map(len, parts)) >= frames:
                return torch.cat(parts)[:frames]
    raise InputError(f"{entry.path} has {sum(map(len, parts))} frames, fewer than the {frames} that are scored")
