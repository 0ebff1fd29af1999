"""Cuts, and what is none."""

from __future__ import annotations

import numpy as np
import torch

from vitok.data.cuts import find_cuts


def frames(*levels: float) -> list[torch.Tensor]:
    return [torch.full((40, 60, 3), int(level), dtype=torch.uint8) for level in levels]


def test_cuts_are_the_last_frames_of_their_shots():
    assert find_cuts(frames(10, 11, 12, 90, 91, 92, 30, 31)) == [2, 5]


def test_what_is_no_cut():
    assert find_cuts(frames()) == find_cuts(frames(7)) == find_cuts(frames(7, 7, 7)) == []
    assert find_cuts(frames(*range(0, 250, 25))) == [], "fast, but as fast before and after"
    assert find_cuts(frames(50, 50, 200, 50, 50)) == [], "a flash"
    assert find_cuts(frames(50, 50, 60, 60)) == [], "a small change"


def test_two_frames_of_different_shots():
    assert find_cuts(frames(10, 200)) == [0]


def test_noise_and_motion_are_no_cuts():
    rng = np.random.default_rng(0)
    scene = rng.integers(0, 256, (64, 200, 3), dtype=np.uint8)
    noise = [torch.from_numpy(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(6)]
    pan = [torch.from_numpy(scene[:, 4 * i : 4 * i + 64].copy()) for i in range(20)]
    assert find_cuts(noise) == find_cuts(pan) == []
