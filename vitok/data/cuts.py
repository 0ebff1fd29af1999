"""Where one shot of a film ends and the next begins."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from PIL import Image
from torch import Tensor

SIDE = 32
DIFFERENCE = 16.0
"""Grey levels, the least mean change of a reduced frame at a cut."""
OUTSTANDING = 2.0
"""Times the change before and the one after, which tells a cut from fast motion and from a flash."""


def find_cuts(frames: Iterable[Tensor]) -> list[int]:
    """The numbers, from 0, of the frames that are the last of their shot, the film's last frame excepted.

    `frames` are uint8 [H, W, 3]. Each is averaged to 32 x 32 pixels; a cut is where the mean absolute difference of two
    of these is at least 16 of 255 and more than twice that of the pairs before and after. Fades are not found.
    """
    previous, changes = None, [0.0]
    for frame in frames:
        reduced = Image.fromarray(frame.numpy()).resize((SIDE, SIDE), Image.Resampling.BOX)
        current = np.asarray(reduced, dtype=np.float32)
        if previous is not None:
            changes.append(float(np.abs(current - previous).mean()))
        previous = current
    changes.append(0.0)
    return [
        i - 1
        for i in range(1, len(changes) - 1)
        if changes[i] >= DIFFERENCE and changes[i] > OUTSTANDING * max(changes[i - 1], changes[i + 1])
    ]
