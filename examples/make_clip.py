"""Make clips/coffee_pan.mp4: a slow pan and zoom over photos/coffee.jpg, 48 frames of 320 x 240 at 24 a second.

Run it from anywhere with vitok and its extra `video` installed: python examples/make_clip.py
"""

from fractions import Fraction
from math import cos, pi
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vitok.io import ClipWriter

HERE = Path(__file__).parent
FRAMES, WIDTH, HEIGHT = 48, 320, 240
# (left, top, width) of the camera's view in the photograph, at 4:3
START, END = (0.0, 0.0, 454.0), (166.0, 60.0, 330.0)


def main() -> None:
    photo = Image.open(HERE / "photos" / "coffee.jpg")
    with ClipWriter(HERE / "clips" / "coffee_pan.mp4", fps=Fraction(24)) as clip:
        for number in range(FRAMES):
            done = (1 - cos(pi * number / (FRAMES - 1))) / 2  # starts and stops softly
            left, top, width = ((1 - done) * a + done * b for a, b in zip(START, END, strict=True))
            view = (left, top, left + width, top + width * HEIGHT / WIDTH)
            frame = photo.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=view)
            clip.write(torch.from_numpy(np.array(frame))[None])


if __name__ == "__main__":
    main()
