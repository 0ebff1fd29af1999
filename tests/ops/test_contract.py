"""What every op does alike, whatever it computes: checkpoints, derivatives it does not have, negation, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from vitok import InputError, _native, ops

needs_native = pytest.mark.skipif(_native.library() is None, reason=f"no native library: {_native.reason()}")


class Case(NamedTuple):
    """`call(x, impl)` with one differentiable tensor of `shape`."""

    call: Callable[[Tensor, str], Any]
    shape: tuple[int, ...]


def tubelet_target() -> Tensor:
    return torch.randint(0, 256, (1, 2, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def matrix(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(4))


CASES = {
    "tubelet_embed": Case(
        lambda x, impl: ops.tubelet_embed(x, matrix(5, 96).to(x.dtype), tubelet=(2, 4), impl=impl), (1, 2, 8, 8, 3)
    ),
    "tubelet_gather": Case(lambda x, impl: ops.tubelet_gather(x, tubelet=(2, 4), impl=impl), (1, 2, 8, 8, 3)),
    "tubelet_unembed": Case(
        lambda x, impl: ops.tubelet_unembed(x, matrix(96, 5), tubelet=(2, 4), size=(2, 8, 8), impl=impl), (1, 4, 5)
    ),
    "tubelet_scatter": Case(
        lambda x, impl: ops.tubelet_scatter(x, tubelet=(2, 4), size=(2, 8, 8), impl=impl), (1, 4, 96)
    ),
    "norm": Case(lambda x, impl: ops.norm(x, torch.ones(9), kind="rms", eps=1e-6, impl=impl), (2, 3, 9)),
    "add_norm": Case(lambda x, impl: ops.add_norm(x, x.detach(), None, kind="layer", eps=1e-6, impl=impl), (2, 3, 9)),
    "qk_norm_rope": Case(
        lambda x, impl: ops.qk_norm_rope(x, torch.ones(8), torch.ones(8), table=matrix(2, 20).view(2, 5, 4), impl=impl),
        (1, 5, 3, 2, 8),
    ),
    "attention": Case(lambda x, impl: ops.attention(x, impl=impl), (1, 5, 3, 2, 8)),
    "gated_mlp_act": Case(lambda x, impl: ops.gated_mlp_act(x, impl=impl), (2, 3, 8)),
    "gaussian_bottleneck": Case(lambda x, impl: ops.gaussian_bottleneck(x, matrix(6, 5), seed=1, impl=impl), (2, 3, 5)),
    "gaussian_sample": Case(lambda x, impl: ops.gaussian_sample(x, seed=1, impl=impl), (2, 3, 6)),
    "pixel_loss": Case(
        lambda x, impl: ops.pixel_loss(x, tubelet_target(), tubelet=(2, 4), kind="l2", impl=impl), (1, 4, 96)
    ),
}  # fmt: skip
every_op = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def gradient(call: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(first(call(leaf)).square().sum(), leaf)[0]


@needs_native
@every_op
def test_activation_checkpointing(case):
    """What the backward pass saved may be unpacked once only."""
    x = torch.randn(case.shape)
    plain = gradient(lambda x: case.call(x, "native"), x)
    again = gradient(lambda x: checkpoint(lambda x: case.call(x, "native"), x, use_reentrant=False), x)
    assert again.equal(plain)


@needs_native
@every_op
def test_a_gradient_of_a_gradient_is_refused_rather_than_wrong(case):
    x = torch.randn(case.shape).requires_grad_()
    out = first(case.call(x, "native"))
    with pytest.raises(RuntimeError, match="reference"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


@every_op
def test_the_reference_has_a_gradient_of_a_gradient(case):
    x = torch.randn(case.shape, dtype=torch.float64).requires_grad_()
    out = first(case.call(x, "reference")).square().sum()
    (once,) = torch.autograd.grad(out, x, create_graph=True)
    (twice,) = torch.autograd.grad(once.sum(), x)
    assert twice.isfinite().all() and twice.abs().sum() > 0


@needs_native
@every_op
def test_forward_mode_is_refused_rather_than_lost(case):
    x = torch.randn(case.shape)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="reference"):
        case.call(forward_ad.make_dual(x, torch.ones_like(x)), "native")


@needs_native
@every_op
def test_lazily_negated_tensors(case):
    x = torch.randn(case.shape)
    negated = torch._neg_view(-x)
    assert negated.is_neg()
    assert first(case.call(negated, "native")).equal(first(case.call(x, "native")))
    assert gradient(lambda x: case.call(torch._neg_view(-x), "native"), x).equal(
        gradient(lambda x: case.call(x, "native"), x)
    )


TOKENS = matrix(4, 5)[None]
FLOAT8 = torch.zeros(1, 5, 3, 2, 8).to(torch.float8_e5m2)
PIXELS = torch.zeros(1, 1, 8, 8, 3)
BAD = {
    "gather to int": (lambda: ops.tubelet_gather(PIXELS, tubelet=(1, 4), dtype=torch.int32), "dtype", "int32"),
    "gather to bytes": (lambda: ops.tubelet_gather(PIXELS, tubelet=(1, 4), dtype=torch.uint8), "dtype", "uint8"),
    "short tubelet": (lambda: ops.tubelet_gather(PIXELS, tubelet=(1,)), "tubelet", "(1,)"),
    "long tubelet": (lambda: ops.tubelet_gather(PIXELS, tubelet=(1, 2, 3)), "tubelet", "(1, 2, 3)"),
    "huge tubelet": (lambda: ops.tubelet_gather(PIXELS, tubelet=(2**62, 256)), "tubelet", "2^28"),
    "a number for a tubelet": (lambda: ops.tubelet_embed(PIXELS, matrix(5, 48), tubelet=4), "tubelet", "4"),
    "half a pixel": (lambda: ops.pixel_loss(matrix(1, 48)[None], PIXELS, tubelet=(1.0, 4.0)), "tubelet", "1.0"),
    "unembed, float tubelet": (
        lambda: ops.tubelet_unembed(TOKENS, matrix(48, 5), tubelet=(1.0, 4), size=(1, 8, 8)), "tubelet", "1.0"
    ),
    "float size": (
        lambda: ops.tubelet_scatter(matrix(4, 48)[None], tubelet=(1, 4), size=(1.0, 8.0, 8.0)), "size", "1.0"
    ),
    "a number for a size": (lambda: ops.tubelet_scatter(matrix(4, 48)[None], tubelet=(1, 4), size=8), "size", "8"),
    "attention in float8": (lambda: ops.attention(FLOAT8), "qkv", "float8_e5m2"),
    "gate in float8": (lambda: ops.gated_mlp_act(FLOAT8), "gate_up", "float8_e5m2"),
    "sample in float8": (lambda: ops.gaussian_sample(FLOAT8[0, :, :, 0]), "moments", "float8_e5m2"),
    "bottleneck in float8": (
        lambda: ops.gaussian_bottleneck(FLOAT8[0, :, :, 0], matrix(6, 8), seed=0), "tokens", "float8_e5m2"
    ),
    "bottleneck of integers": (
        lambda: ops.gaussian_bottleneck(torch.ones(1, 2, 5, dtype=torch.int64), matrix(6, 5), seed=0), "tokens", "int64"
    ),
    "bottleneck of odd rows": (lambda: ops.gaussian_bottleneck(TOKENS, matrix(7, 5), seed=0), "weight", "[7, 5]"),
    "bottleneck of no tokens": (
        lambda: ops.gaussian_bottleneck(torch.ones(1, 0, 5), matrix(6, 5), seed=0), "tokens", "[1, 0, 5]"
    ),
    "bottleneck, integer weight": (
        lambda: ops.gaussian_bottleneck(matrix(3, 5)[None], matrix(6, 5).long(), seed=0), "weight", "int64"
    ),
    "embed, integer bias": (
        lambda: ops.tubelet_embed(PIXELS, matrix(5, 48), torch.ones(5).int(), tubelet=(1, 4)), "bias", "int32"
    ),
    "unembed, integer bias": (
        lambda: ops.tubelet_unembed(TOKENS, matrix(48, 5), torch.ones(3).int(), tubelet=(1, 4), size=(1, 8, 8)),
        "bias", "int32",
    ),
    "half a seed": (lambda: ops.gaussian_sample(matrix(3, 6)[None], seed=1.5), "seed", "1.5"),
    "no seed": (lambda: ops.gaussian_bottleneck(matrix(3, 5)[None], matrix(6, 5), seed=None), "seed", "None"),
    "half an element": (lambda: ops.normal_noise(0, torch.arange(2), 1.5), "elements", "1.5"),
    "too many elements": (lambda: ops.normal_noise(0, torch.arange(2), 2**63), "elements", str(2**63)),
    "negative eps": (lambda: ops.qk_norm_rope(FLOAT8.float(), eps=-1.0), "eps", "-1.0"),
    "eps that is no number": (lambda: ops.attention(FLOAT8.float(), eps=math.nan), "eps", "nan"),
    "eps of text": (lambda: ops.norm(matrix(2, 3), None, kind="rms", eps="a"), "eps", "'a'"),
    "a list for a gate": (lambda: ops.gated_mlp_act(matrix(2, 4), gate=[]), "gate", "[]"),
    "a list for an impl": (lambda: ops.gated_mlp_act(matrix(2, 4), impl=[]), "implementation", "[]"),
    "two weight dtypes": (
        lambda: ops.attention(FLOAT8.float(), torch.ones(8), torch.ones(8).bfloat16()), "k_weight", "bfloat16"
    ),
    "a rounded table": (
        lambda: ops.attention(FLOAT8.float(), None, None, torch.ones(2, 5, 4).bfloat16()), "table", "bfloat16"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_arguments_are_named(case, one_sentence):
    call, *parts = case
    with pytest.raises(InputError) as error:
        call()
    one_sentence(error.value, *parts)


@needs_native
@pytest.mark.parametrize("impl", ["native", "reference"])
def test_attention_keeps_its_dtype_under_autocast(impl):
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.attention(torch.randn(1, 5, 3, 2, 8), impl=impl).dtype == torch.float32


def test_what_needs_a_gpu_is_not_called_usable_without_one():
    for choice in ops.choices():
        if choice.implementation in ("triton", "sdpa:cudnn", "sdpa:efficient") and not torch.cuda.is_available():
            assert not choice.usable and choice.reason
