"""PSNR and SSIM of uint8 pictures, data range 255."""

from __future__ import annotations

import torch
from torch import Tensor

from vitok.errors import InputError


def to_uint8(pixels: Tensor) -> Tensor:
    """Model output in [-1, 1], any shape, clamped and rounded to uint8 0..255."""
    return pixels.detach().float().clamp(-1, 1).add_(1).mul_(127.5).round_().to(torch.uint8)


def from_uint8(pixels: Tensor) -> Tensor:
    """uint8 0..255 of any shape as float32 in [-1, 1], as a model sees it."""
    return pixels.float() * (2 / 255) - 1


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 tensors of one shape; infinite when they are equal."""
    _check(a, b)
    pieces = zip(a.flatten().split(2**22), b.flatten().split(2**22), strict=True)  # a frame of video is large
    squares = sum(int((x.int() - y.int()).square_().sum()) for x, y in pieces)
    return float(10 * torch.log10(255.0**2 / torch.tensor(squares / a.numel(), dtype=torch.float64)))


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity of two uint8 pictures [H, W, 3], or the mean over frames [T, H, W, 3].

    Wang et al., IEEE TIP 13(4), 2004: Gaussian window 11 x 11 with sigma 1.5, K1 0.01, K2 0.03, valid positions only,
    mean over colours. Sides shorter than 11 use a window of that length.
    """
    _check(a, b)
    frames = zip(a.reshape(-1, *a.shape[-3:]), b.reshape(-1, *b.shape[-3:]), strict=True)
    planes = [_ssim_plane(x[..., colour].double(), y[..., colour].double()) for x, y in frames for colour in range(3)]
    return sum(planes) / len(planes)


def _ssim_plane(x: Tensor, y: Tensor) -> float:
    """SSIM of two float64 planes [H, W]; one plane at a time and by shifted sums, because a frame of video is large."""

    def blur(t: Tensor) -> Tensor:
        for dim in (0, 1):
            taps = min(11, t.shape[dim])
            window = torch.exp(-((torch.arange(taps, dtype=torch.float64) - (taps - 1) / 2) ** 2) / (2 * 1.5**2))
            length = t.shape[dim] - taps + 1
            total = t.new_zeros(length, t.shape[1]) if dim == 0 else t.new_zeros(t.shape[0], length)
            for i, tap in enumerate((window / window.sum()).tolist()):
                total.add_(t.narrow(dim, i, length), alpha=tap)
            t = total
        return t

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    cov = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    return float((likeness / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


def _check(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.dtype != torch.uint8 or b.dtype != torch.uint8:
        raise InputError(
            f"expected two uint8 tensors of one shape, got {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
        )
