"""pixel_loss: how far a prediction still in patch layout is from its clip, sample by sample.

The prediction is compared where it lies, so the predicted clip and its permutation never exist, nor does a float copy
of a uint8 target. Both are read once forward and once backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitok import _native
from vitok.errors import InputError
from vitok.ops import _triton
from vitok.ops._library import define, differentiable_once, kernels
from vitok.ops._registry import Implementation, Op
from vitok.ops._tensors import check_eps, check_float, compute_dtype, neighbouring
from vitok.ops._tubelet import check_tubelet
from vitok.ops.tubelet_embed import SOURCE_DTYPES, UINT8_SCALE, UINT8_SHIFT

KINDS = ("l1", "l2", "charbonnier")


def pixel_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    tubelet: tuple[int, int],
    kind: str = "l1",
    eps: float = 1e-3,
    impl: str = "auto",
) -> Tensor:
    """The mean over a clip's elements of a distance between prediction and target.

    Args:
        prediction: [B, L, q * p * p * 3] with L = ceil(T/q) * ceil(H/p) * ceil(W/p), floating point: tubelets in
            row-major (t, y, x) order, elements in (frame, row, column, colour) order. Samples and tokens may be any
            distance apart; elements that do not neighbour are copied first.
        target: [B, T, H, W, 3], any strides. uint8 0..255, mapped to [-1, 1], or float, taken as it is. It gets no
            gradient.
        tubelet: (q, p).
        kind: with d = prediction - target: "l1" is |d|, "l2" d^2, "charbonnier" sqrt(d^2 + eps^2) (Charbonnier et al.,
            ICIP 1994).
        eps: of "charbonnier", in units of [-1, 1].
        impl: "auto", "native", "triton" or "reference".

    Returns: [B] in float32, or float64 for a float64 prediction; each the mean over the T * H * W * 3 elements of the
    clip: what the tubelets hold beyond it does not count. Differentiable in the prediction. Raises InputError for wrong
    shapes, dtypes and arguments.

    >>> pixel_loss(torch.zeros(2, 4, 768), torch.full((2, 1, 32, 30, 3), 255, dtype=torch.uint8), tubelet=(1, 16))
    tensor([1., 1.])
    """
    check_tubelet(tubelet)
    q, p = tubelet
    if target.dim() != 5 or target.shape[-1] != 3:
        raise InputError(f"target must be [B, T, H, W, 3], got {list(target.shape)}")
    if 0 in target.shape[1:]:
        raise InputError(f"target must have at least one frame, row and column, got {list(target.shape)}")
    if target.dtype not in SOURCE_DTYPES:
        raise InputError(f"target must be uint8 or floating point, got {target.dtype}")
    check_float("prediction", prediction)
    batch, frames, height, width, _ = target.shape
    wanted = (batch, -(-frames // q) * -(-height // p) * -(-width // p), q * p * p * 3)
    if tuple(prediction.shape) != wanted:
        raise InputError(
            f"prediction must be {list(wanted)} for a target {list(target.shape)} in tubelets {tubelet}, "
            f"got {list(prediction.shape)}"
        )
    if prediction.device != target.device:
        raise InputError(f"target must be on the prediction's device {prediction.device}, got {target.device}")
    if target.requires_grad:
        raise InputError("target must not require a gradient, for it gets none; detach it")
    if kind not in KINDS:
        raise InputError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    check_eps(eps)
    if eps == 0:
        raise InputError("eps must be positive, got 0")
    return _OP(impl, prediction, target, q, p, kind, float(eps))


def reference(prediction: Tensor, target: Tensor, q: int, p: int, kind: str, eps: float) -> Tensor:
    """Eager composition; float64 when the prediction is."""
    batch, frames, height, width, colours = target.shape
    compute = compute_dtype(prediction)
    t, h, w = -(-frames // q), -(-height // p), -(-width // p)
    tubelets = prediction.reshape(batch, t, h, w, q, p, p, colours).permute(0, 1, 4, 2, 5, 3, 6, 7)
    clip = tubelets.reshape(batch, t * q, h * p, w * p, colours)[:, :frames, :height, :width].to(compute)
    if target.dtype == torch.uint8:
        d = clip - (target.to(compute) * UINT8_SCALE + UINT8_SHIFT)
    else:
        d = clip - target.to(compute)
    if kind == "l1":
        distance = d.abs()
    elif kind == "l2":
        distance = d.square()
    else:
        distance = (d.square() + eps * eps).sqrt()
    return distance.mean((1, 2, 3, 4))


def _empty_forward(impl: str, prediction: Tensor, target: Tensor, q: int, p: int, kind: str, eps: float) -> Tensor:
    return prediction.new_empty(prediction.shape[0], dtype=compute_dtype(prediction))


def _forward(impl: str, prediction: Tensor, target: Tensor, q: int, p: int, kind: str, eps: float) -> Tensor:
    loss = _empty_forward(impl, prediction, target, q, p, kind, eps)
    if loss.numel() == 0:
        return loss
    prediction = neighbouring(prediction)
    scale, shift = (UINT8_SCALE, UINT8_SHIFT) if target.dtype == torch.uint8 else (1.0, 0.0)
    if impl == "triton":
        from vitok.kernels import pixel_loss as kernel

        kernel.pixel_loss_forward(prediction, target, loss, q, p, kind, eps, scale, shift)
        return loss
    partial_sums = prediction.new_empty(prediction.shape[:2], dtype=loss.dtype)
    _native.run(
        "pixel_loss_forward", prediction,
        prediction.data_ptr(), _native.DTYPE[prediction.dtype], prediction.stride()[:2],
        target.data_ptr(), _native.DTYPE[target.dtype], target.shape[:4], target.stride(),
        q, p, KINDS.index(kind), eps, scale, shift, partial_sums.data_ptr(), loss.data_ptr(),
    )  # fmt: skip
    return loss


def _empty_backward(
    impl: str, grad: Tensor, prediction: Tensor, target: Tensor, q: int, p: int, kind: str, eps: float
) -> Tensor:
    return prediction.new_empty(prediction.shape)


def _backward(
    impl: str, grad: Tensor, prediction: Tensor, target: Tensor, q: int, p: int, kind: str, eps: float
) -> Tensor:
    grad_prediction = _empty_backward(impl, grad, prediction, target, q, p, kind, eps)
    if grad_prediction.numel() == 0:
        return grad_prediction
    prediction = neighbouring(prediction)
    scale, shift = (UINT8_SCALE, UINT8_SHIFT) if target.dtype == torch.uint8 else (1.0, 0.0)
    if impl == "triton":
        from vitok.kernels import pixel_loss as kernel

        kernel.pixel_loss_backward(grad, prediction, target, grad_prediction, q, p, kind, eps, scale, shift)
        return grad_prediction
    _native.run(
        "pixel_loss_backward", prediction,
        prediction.data_ptr(), _native.DTYPE[prediction.dtype], prediction.stride()[:2],
        target.data_ptr(), _native.DTYPE[target.dtype], target.shape[:4], target.stride(),
        q, p, KINDS.index(kind), eps, scale, shift, grad.data_ptr(), grad.stride(0), grad_prediction.data_ptr(),
    )  # fmt: skip
    return grad_prediction


_ARGUMENTS = "Tensor prediction, Tensor target, int q, int p, str kind, float eps"
_FORWARD = define(f"pixel_loss_forward(str impl, {_ARGUMENTS}) -> Tensor", _forward, _empty_forward)
_BACKWARD = define(f"pixel_loss_backward(str impl, Tensor grad, {_ARGUMENTS}) -> Tensor", _backward, _empty_backward)


class _PixelLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, impl, prediction, target, *options):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(prediction, target)
        ctx.impl, ctx.options = impl, options
        return _FORWARD(impl, prediction, target, *options)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        prediction, target = ctx.saved_tensors
        gradient = _BACKWARD(ctx.impl, grad, prediction, target, *ctx.options)
        return None, gradient, None, None, None, None, None


def _run(impl: str, prediction: Tensor, target: Tensor, q: int, p: int, kind: str, eps: float) -> Tensor:
    if prediction.requires_grad and torch.is_grad_enabled():
        return _PixelLoss.apply(impl, prediction, target, q, p, kind, eps)
    return _FORWARD(impl, prediction, target, q, p, kind, eps)


def _native_refuses(prediction: Tensor, target: Tensor, q: int, p: int, kind: str, eps: float) -> str:
    if target.dtype != torch.uint8 and (prediction.dtype == torch.float64) != (target.dtype == torch.float64):
        return f"it does not compare {prediction.dtype} with {target.dtype}"
    if p > 256:
        return f"patches have at most 256 pixels a side, got {p}"
    return _native.refuses(prediction, target)


def _triton_refuses(prediction: Tensor, target: Tensor, q: int, p: int, kind: str, eps: float) -> str:
    return _triton.refuses(prediction, target.dtype)


_OP = Op(
    "pixel_loss",
    *kernels(_run, _native_refuses, _triton_refuses),
    Implementation("reference", reference),
)
