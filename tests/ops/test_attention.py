"""attention against softmax(Q K' / sqrt(d)) V in float64, mask by mask and implementation by implementation."""

from __future__ import annotations

import importlib.machinery
import itertools
import math
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from vitok import InputError
from vitok.ops import attention
from vitok.ops import attention as public
from vitok.ops._registry import OPS, ImplementationError

op = sys.modules["vitok.ops.attention"]
adapters = sys.modules["vitok.ops._attention_adapters"]
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def needs(impl):
    """The name as a parameter, skipped with its reason where it cannot run."""
    missing = OPS["attention"].implementations[impl].missing
    if impl == "triton" and not torch.cuda.is_available():
        missing = missing or op._triton.refuses(torch.empty(0))
    return pytest.param(impl, marks=pytest.mark.skipif(bool(missing), reason=f"{impl}: {missing}"))


kernels = pytest.mark.parametrize("impl", [needs("native"), needs("triton")])
every = pytest.mark.parametrize("impl", ["reference", "sdpa", needs("native"), needs("triton")])

MASKS = {
    "full": {},
    "window": {"window": 5},
    "self": {"window": 0},
    "causal": {"causal_block": 1},
    "block_causal": {"causal_block": 6},
    "causal_window": {"causal_block": 4, "window": 9},
    "segments": {"cu_seqlens": (0.1, 0.1, 0.5, 0.9)},
    "segments_causal_window": {"cu_seqlens": (0.3, 0.7), "causal_block": 4, "window": 3},
}


def mask_of(name, tokens, dtype=torch.int64):
    """Keyword arguments of a mask; segments end at these shares of the length."""
    mask = dict(MASKS[name])
    if "cu_seqlens" in mask:
        mask["cu_seqlens"] = torch.tensor([0, *(int(share * tokens) for share in mask["cu_seqlens"]), tokens]).to(dtype)
    return mask


def visible(tokens, window=None, causal_block=None, cu_seqlens=None):
    """[L, L], one Python index at a time."""
    ends = [0, tokens] if cu_seqlens is None else cu_seqlens.tolist()
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for start, stop in itertools.pairwise(ends):
        for i in range(stop - start):
            for j in range(stop - start):
                near = window is None or abs(i - j) <= window
                mask[start + i, start + j] = near and (
                    causal_block is None or j < (i // causal_block + 1) * causal_block
                )
    return mask


def formula(qkv, **mask):
    keep = visible(qkv.shape[1], **mask)
    out = torch.empty_like(qkv[:, :, 0])
    for b in range(qkv.shape[0]):
        for head in range(qkv.shape[3]):
            q, k, v = qkv[b, :, :, head].unbind(1)
            scores = (q @ k.T / math.sqrt(q.shape[-1])).exp() * keep
            out[b, :, head] = scores / scores.sum(-1, keepdim=True) @ v
    return out


def rope(tokens, head_dim):
    angles = torch.randn(tokens, head_dim // 2)
    return torch.stack((angles.cos(), angles.sin()))


def results(impl, qkv, weights, table, seed, mask, dtype=None):
    """Output and every gradient, tensors first widened to `dtype` if given."""
    cast = [None if x is None else x.to(dtype or x.dtype) for x in (qkv, *weights)]
    leaves = [None if x is None else x.clone().requires_grad_() for x in cast]
    out = attention(*leaves, table, impl=impl, **mask)
    out.backward(seed.to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves if x is not None)]


def compare(impl, qkv, weights, table, mask, judge, seed=None):
    seed = torch.randn_like(qkv[:, :, 0]) if seed is None else seed
    arguments = (qkv, weights, table, seed, mask)
    ours, baseline = (results(i, *arguments) for i in (impl, "reference"))
    oracle = results("reference", *arguments, dtype=torch.float64)
    # The gradient of a score is p (grad . v - grad . out). A blocked kernel rounds the two products apart, where the
    # eager softmax subtracts equal numbers: with all weight on one key the difference is exactly 0 there and a rounding
    # of the products here. So the products' own rounding is part of the floor: times the keys, and with norms their
    # weights, by which keys are larger and through which a query's gradient goes back.
    products = (seed.double()[:, :, None] * qkv.double()[:, :, 2:]).abs().sum(-1).max()
    cancelled = torch.finfo(torch.float32 if qkv.dtype != torch.float64 else qkv.dtype).eps * products
    cancelled = cancelled * qkv[:, :, :2].double().abs().max() * qkv.shape[-1] ** -0.5
    for weight in weights:
        if weight is not None:
            cancelled = cancelled * weight.double().abs().max().clamp(min=1)
    judge(ours[0], baseline[0], oracle[0])
    judge(ours[1], baseline[1], oracle[1], floor=cancelled.item())
    rows = qkv.shape[0] * qkv.shape[1] * qkv.shape[3]
    for actual, theirs, exact in zip(ours[2:], baseline[2:], oracle[2:], strict=True):
        floor = 2 * math.sqrt(rows) * torch.finfo(qkv.dtype).eps * exact.abs().max()
        floor += cancelled
        assert actual.dtype == theirs.dtype and actual.shape == theirs.shape
        assert (actual - exact).abs().max() <= 2 * (theirs - exact).abs().max() + floor


@pytest.mark.parametrize("impl", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("head_dim", [8, 64, 72, 80, 96, 128])
@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_formula(impl, head_dim, tokens):
    qkv = torch.randn(2, tokens, 3, 2, head_dim, dtype=torch.float64)
    torch.testing.assert_close(attention(qkv, impl=impl), formula(qkv), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", ["auto", "sdpa", "sdpa:math", "reference"])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("tokens", [1, 5, 24])
def test_masks_by_hand(impl, name, tokens):
    mask = mask_of(name, tokens)
    qkv = torch.randn(1, tokens, 3, 2, 8, dtype=torch.float64)
    torch.testing.assert_close(attention(qkv, impl=impl, **mask), formula(qkv, **mask), rtol=1e-11, atol=1e-11)


def test_norm_and_rotation_come_first():
    from vitok.ops import qk_norm_rope

    qkv, table = torch.randn(2, 6, 3, 2, 16, dtype=torch.float64), rope(6, 16)
    weights = [torch.randn(16, dtype=torch.float64) for _ in range(2)]
    for impl in ("reference", "sdpa"):
        for some in ((*weights, table), (None, None, table), (*weights, None)):
            expected = formula(qk_norm_rope(qkv, *some, eps=1e-3))
            torch.testing.assert_close(attention(qkv, *some, eps=1e-3, impl=impl), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [15, 64, 130])
def test_fused_is_as_near_as_the_plain_composition(dtype, tokens, judge):
    qkv = (2 * torch.randn(2, tokens, 3, 2, 72)).to(dtype)
    judge(attention(qkv, impl="sdpa"), attention(qkv, impl="reference"), formula(qkv.double()))


# Tile edges are 64 and 128 tokens in 16-bit types, 32 in float32.
CASES = [
    (8, 1, "full"), (64, 31, "causal"), (72, 33, "window"), (72, 64, "full"), (80, 65, "segments"),
    (96, 63, "block_causal"), (128, 32, "full"), (64, 129, "segments_causal_window"), (72, 130, "causal_window"),
    (24, 40, "self"), (104, 9, "full"),
]  # fmt: skip


@kernels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "tokens", "name"), CASES)
def test_kernels(impl, device, dtype, head_dim, tokens, name, judge):
    """Forward and backward, plain where the mask is full and with norm and rotation elsewhere."""
    if impl == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter's product of bfloat16 is wrong")
    if impl == "native" and device == "cuda":
        pytest.skip("no native attention on CUDA")
    with torch.device(device):
        qkv = torch.randn(1, tokens, 3, 1, head_dim).to(dtype)
        rotate = name != "full"
        weights = [torch.randn(head_dim) if rotate else None for _ in range(2)]
        compare(impl, qkv, weights, rope(tokens, head_dim) if rotate else None, mask_of(name, tokens), judge)


@kernels
@pytest.mark.parametrize("some", ["rope", "norm", "bfloat16_weights"])
def test_norm_or_rotation_alone(impl, some, judge):
    weights = [torch.randn(72) if some != "rope" else None for _ in range(2)]
    if some == "bfloat16_weights":
        weights = [w.bfloat16() for w in weights]
    qkv = torch.randn(1, 20, 3, 2, 72, dtype=torch.float16)
    compare(impl, qkv, weights, rope(20, 72) if some == "rope" else None, {}, judge)


LAYOUTS = {
    "packed": lambda x: x,
    "heads_first": lambda x: x.permute(0, 3, 2, 1, 4).contiguous().permute(0, 3, 2, 1, 4),
    "every_second_token": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "odd_strides": lambda x: F.pad(x, (1, 2))[..., 1:-2],
    "one_token": lambda x: x[:, :1].expand_as(x),
    "one_sample": lambda x: x[:1].expand_as(x),
    "channels_apart": lambda x: x.mT.contiguous().mT,
}


@kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(impl, layout):
    """The same numbers whatever the strides of qkv and of the incoming gradient; neither is written to."""
    values, table = torch.randn(2, 6, 3, 2, 8), rope(6, 8)
    weight, leaf = torch.randn(8), values.clone().requires_grad_()
    qkv = LAYOUTS[layout](leaf)
    seed = LAYOUTS[layout](torch.randn(2, 6, 1, 2, 8))[:, :, 0]
    kept = seed.clone()
    out = attention(qkv, weight, weight, table, impl=impl)
    out.backward(seed)
    plain = values.clone().requires_grad_()
    copy = LAYOUTS[layout](plain).contiguous()
    expected = attention(copy, weight, weight, table, impl=impl)
    expected.backward(seed.contiguous())
    assert torch.equal(out, expected) and torch.equal(leaf.grad, plain.grad)
    assert torch.equal(seed, kept) and torch.equal(leaf, values)


@kernels
def test_broadcast_gradient(impl, judge):
    qkv = torch.randn(2, 6, 3, 2, 16)
    compare(impl, qkv, [None, None], None, {}, judge, seed=torch.ones(()).expand(2, 6, 2, 16))


@kernels
def test_backward_twice_gives_the_same_bits(impl):
    qkv, table, weights = torch.randn(1, 40, 3, 2, 16), rope(40, 16), [torch.randn(16) for _ in range(2)]
    seed, mask = torch.randn(1, 40, 2, 16), mask_of("segments_causal_window", 40)
    first = results(impl, qkv, weights, table, seed, mask)
    for _ in range(2 if impl == "triton" else 9):
        assert all(map(torch.equal, first, results(impl, qkv, weights, table, seed, mask)))


@every
@pytest.mark.parametrize("shape", [(0, 4, 3, 2, 16), (2, 0, 3, 2, 16)])
def test_empty(impl, shape):
    qkv = torch.randn(shape, requires_grad=True)
    weights = [torch.randn(16, requires_grad=True) for _ in range(2)]
    out = attention(qkv, *weights, rope(shape[1], 16), impl=impl, causal_block=2)
    assert out.shape == (*shape[:2], 2, 16)
    out.sum().backward()
    assert qkv.grad.shape == shape and not any(w.grad.any() for w in weights)


@every
def test_large_scores_stay_finite(impl):
    qkv = 300 * torch.ones(1, 5, 3, 1, 8)
    for mask in ({}, {"window": 1}):
        torch.testing.assert_close(attention(qkv, impl=impl, **mask), qkv[:, :, 0])
    low = torch.stack((100 * torch.ones(1, 40, 2, 16), -100 * torch.ones(1, 40, 2, 16), torch.randn(1, 40, 2, 16)), 2)
    torch.testing.assert_close(attention(low, impl=impl), low[:, :, 2].mean(1, keepdim=True).expand(1, 40, 2, 16))


@kernels
@pytest.mark.parametrize("name", ["full", "segments_causal_window"])
def test_lse(impl, name):
    qkv, mask = torch.randn(1, 33, 3, 2, 16), mask_of(name, 33)
    q, k, _ = qkv.double().unbind(2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 4
    expected = scores.masked_fill(~visible(33, **mask), -torch.inf).logsumexp(-1)
    numbers = (mask.get("window", -1), mask.get("causal_block", 0))
    out, lse = op._FORWARD(impl, qkv, None, None, None, mask.get("cu_seqlens"), 1e-6, *numbers)
    torch.testing.assert_close(lse, expected.float(), rtol=0, atol=2e-6)
    assert out.is_contiguous() and lse.is_contiguous()


@kernels
def test_wrong_segments_stay_inside(impl):
    """As on a GPU, where the values are not looked at: some numbers, of this shape, and no crash."""
    qkv = torch.randn(1, 40, 3, 1, 16)
    for ends in ([7, 3, 900], [-(2**31), 2**31 - 1, 5], [0, 0, 0], [40, 40], [2**40, -(2**50), 17]):
        cu_seqlens = torch.tensor(ends)
        out, lse = op._FORWARD(impl, qkv, None, None, None, cu_seqlens, 1e-6, -1, 0)
        gradients = op._BACKWARD(impl, out, out, lse, qkv, None, None, None, cu_seqlens, 1e-6, -1, 0)
        assert out.isfinite().all() and gradients[0].shape == qkv.shape


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_gradients(impl):
    qkv = torch.randn(1, 4, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: attention(x, impl=impl), qkv)


@pytest.mark.parametrize("impl", ["reference", needs("native")])
@pytest.mark.parametrize("name", ["full", "segments_causal_window"])
def test_gradients_of_everything(impl, name):
    qkv = torch.randn(1, 6, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    table, mask = rope(6, 8), mask_of(name, 6)
    assert torch.autograd.gradcheck(
        lambda x, q, k: attention(x, q, k, table, impl=impl, **mask), (qkv, *weights), fast_mode=True
    )


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_strided_projection(impl):
    qkv = torch.randn(2, 6, 3, 24, 4)[:, :, :, ::2].transpose(3, 4)
    torch.testing.assert_close(attention(qkv, impl=impl), attention(qkv.contiguous(), impl=impl))


@kernels
def test_operators_keep_their_word(impl):
    qkv, weight, table = torch.randn(1, 9, 3, 1, 16), torch.randn(16), rope(9, 16)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for weights, cu_seqlens in (((weight, weight), None), ((None, None), torch.tensor([0, 4, 9]))):
        arguments = (qkv, *weights, table, cu_seqlens, 1e-6, 3, 2)
        torch.library.opcheck(torch.ops.vitok.attention_forward.default, (impl, *arguments), test_utils=tests)
        out, lse = op._FORWARD(impl, *arguments)
        torch.library.opcheck(
            torch.ops.vitok.attention_backward.default, (impl, out, out, lse, *arguments), test_utils=tests
        )


@pytest.mark.parametrize("impl", ["sdpa", needs("native"), needs("triton")])
def test_compiles_whole_and_once(impl):
    table, weights = rope(12, 16), [torch.randn(16) for _ in range(2)]

    def loss(qkv):
        return attention(qkv, *weights, table, causal_block=6, impl=impl).square().sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (4, 5):  # unlike any other size, which the compiler would take for the same number
        qkv = torch.randn(batch, 12, 3, 1, 16, requires_grad=True)
        with torch._dynamo.config.patch(error_on_recompile=batch == 5):
            compiled(qkv).backward()
        expected = qkv.detach().clone().requires_grad_()
        loss(expected).backward()
        torch.testing.assert_close(qkv.grad, expected.grad)


@kernels
def test_without_gradients_nothing_is_kept(impl):
    qkv = torch.randn(1, 5, 3, 1, 16, requires_grad=True)
    with torch.no_grad():
        assert attention(qkv, impl=impl).grad_fn is None
    assert attention(qkv.detach(), impl=impl).grad_fn is None
    assert attention(qkv, impl=impl).requires_grad


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(0, 7), min_size=1, max_size=5), st.integers(0, 9), st.integers(1, 9))
def test_segments_are_separate_sequences(seed, lengths, window, causal_block):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(1, sum(lengths), 3, 2, 8, dtype=torch.float64, generator=generator)
    mask = {"window": window, "causal_block": causal_block}
    parts = [attention(part, impl="reference", **mask) for part in qkv.split(lengths, 1)]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    for impl in ("reference", "sdpa"):
        together = attention(qkv, impl=impl, cu_seqlens=ends.int(), **mask)
        torch.testing.assert_close(together, torch.cat(parts, 1), rtol=1e-11, atol=1e-11)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(0, 2**70))
def test_masks_as_long_as_the_sequence_are_none(seed, tokens, beyond):
    qkv = torch.randn(1, tokens, 3, 2, 8, generator=torch.Generator().manual_seed(seed))
    full = attention(qkv, impl="reference")
    for impl in ("reference", "sdpa"):
        for mask in ({"window": tokens - 1 + beyond}, {"causal_block": tokens + beyond}):
            torch.testing.assert_close(attention(qkv, impl=impl, **mask), full)


ONES = torch.ones(1, 4, 3, 2, 8)


@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (2, 5, 2, 4, 8)])
def test_bad_shapes(shape, one_sentence):
    with pytest.raises(InputError) as error:
        attention(torch.ones(shape))
    one_sentence(error.value, "qkv must be [B, L, 3, heads, head_dim]", str(list(shape)))


@pytest.mark.parametrize(
    ("qkv", "options", "message"),
    [
        (ONES.long(), {}, "qkv must be float32, bfloat16, float16 or float64, got torch.int64"),
        (ONES[..., :0], {}, "at least one head and channel, got [1, 4, 3, 2, 0]"),
        (ONES, {"q_weight": torch.ones(8)}, "q_weight and k_weight must be given both or neither, got one"),
        (ONES, {"q_weight": torch.ones(8), "k_weight": torch.ones(4)}, "k_weight must be [8] for this qkv, got [4]"),
        (ONES, {"table": torch.ones(2, 4, 8)}, "table must be float32 or float64 [2, 4, 4] for this qkv, got"),
        (ONES[..., :7], {"table": torch.ones(2, 4, 3)}, "even head_dim to be rotated by a table, got 7"),
        (ONES, {"window": -1}, "window must be an integer of at least 0 or None, got -1"),
        (ONES, {"window": 1.5}, "window must be an integer of at least 0 or None, got 1.5"),
        (ONES, {"causal_block": 0}, "causal_block must be an integer of at least 1 or None, got 0"),
        (ONES, {"causal_block": True}, "causal_block must be an integer of at least 1 or None, got True"),
        (ONES, {"cu_seqlens": torch.tensor([0.0, 4.0])}, "cu_seqlens must be int32 or int64 [segments + 1], got"),
        (ONES, {"cu_seqlens": torch.tensor([0])}, "cu_seqlens must be int32 or int64 [segments + 1], got"),
        (ONES, {"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens must rise from 0 to the length 4, got [0, 3]"),
        (ONES, {"cu_seqlens": torch.tensor([0, 3, 2, 4])}, "cu_seqlens must rise from 0 to the length 4"),
        (ONES, {"cu_seqlens": torch.arange(1, 400)}, "got [1, 2, 3, 4, '...', 397, 398, 399]"),
        (ONES.repeat(2, 1, 1, 1, 1), {"cu_seqlens": torch.tensor([0, 4])}, "a batch of 1"),
        (ONES, {"cu_seqlens": torch.empty(2, dtype=torch.int32, device="meta")}, "on qkv's device cpu, got meta"),
        (ONES, {"impl": "flash"}, "attention has no implementation 'flash'; it has native, triton, sdpa"),
        (ONES, {"impl": "sdpa:cudnn"}, "'sdpa:cudnn' cannot be used: torch has cudnn attention on CUDA only"),
    ],
)
def test_bad_arguments(qkv, options, message, one_sentence):
    with pytest.raises(InputError) as error:
        attention(qkv, **options)
    one_sentence(error.value, message)


def test_refusals_say_why(one_sentence):
    long = torch.ones(1, 1, 1, 1, 1).expand(1, 4097, 3, 1, 8)
    cases = [
        ("sdpa", long, {"window": 3}, "4097 x 4097 matrix"),
        ("sdpa:flash", ONES, {"window": 1}, "takes no mask other than causal"),
    ]
    if not OPS["attention"].implementations["triton"].missing:
        cases += [
            ("triton", ONES[..., :6], {}, "head_dim must be a multiple of 8 up to 256, got 6"),
            ("triton", ONES.double(), {}, "qkv is torch.float64"),
        ]
    for impl, qkv, options, reason in cases:
        with pytest.raises(ImplementationError) as error:
            attention(qkv, impl=impl, **options)
        one_sentence(error.value, repr(impl), reason)
    assert attention(long[:, :8], window=3, impl="auto").shape == (1, 8, 1, 8)
    on_gpu = types.SimpleNamespace(is_cuda=True)
    assert op._native_refuses(on_gpu) == (
        "the native library has no CUDA attention: triton, sdpa, flash_attn and xformers serve it"
    )


def test_long_sequences_of_short_segments_need_no_large_matrix():
    lengths = [4000, 1000]
    qkv = torch.randn(1, 1, 3, 1, 8).expand(1, 5000, 3, 1, 8)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    out = attention(qkv, cu_seqlens=ends, impl="sdpa")
    torch.testing.assert_close(out, qkv[:, :, 2], rtol=0, atol=1e-4)


def masked_sdpa(q, k, v, keep):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep).transpose(1, 2)


def window_mask(tokens, causal, window_size, unlimited):
    left, right = (tokens if side == unlimited else side for side in window_size)
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    return (j >= i - left) & (j <= i + (0 if causal else right))


def fake_flash_attn(monkeypatch, version):
    """A stand-in with the public signatures of one version of flash-attn, computing with SDPA."""
    unlimited = None if version == 4 else -1

    def func(q, k, v, softmax_scale=None, causal=False, window_size=(unlimited, unlimited), deterministic=False):
        assert q.dim() == 4 and softmax_scale is None and isinstance(causal, bool)
        out = masked_sdpa(q, k, v, window_mask(q.shape[1], causal, window_size, unlimited))
        return (out, None) if version == 4 else out

    def varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale=None, causal=False, window_size=(unlimited, unlimited), deterministic=False,
    ):  # fmt: skip
        assert q.dim() == 3 and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert max_seqlen_q >= cu_seqlens_q.diff().max() and max_seqlen_k >= cu_seqlens_k.diff().max()
        keep = window_mask(len(q), causal, window_size, unlimited) & visible(len(q), cu_seqlens=cu_seqlens_q)
        out = masked_sdpa(q[None], k[None], v[None], keep)[0]
        return (out, None) if version == 4 else out

    names = {2: ["flash_attn"], 3: ["flash_attn_interface"], 4: ["flash_attn", "flash_attn.cute"]}[version]
    for name in names:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    module.flash_attn_func, module.flash_attn_varlen_func = func, varlen


def fake_xformers(monkeypatch):
    ops, fmha, masks = (types.ModuleType(f"xformers.ops{rest}") for rest in ("", ".fmha", ".fmha.attn_bias"))

    class BlockDiagonalMask:
        def __init__(self, lengths, causal=False):
            assert all(n > 0 for n in lengths)
            self.lengths, self.causal = lengths, causal

        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None):
            return cls(q_seqlen)

        def make_causal(self):
            return BlockDiagonalMask(self.lengths, True)

        def keep(self, tokens):
            ends = torch.tensor([0, *self.lengths]).cumsum(0)
            return visible(tokens, causal_block=1 if self.causal else None, cu_seqlens=ends)

    class LowerTriangularMask:
        def keep(self, tokens):
            return visible(tokens, causal_block=1)

    class LocalAttentionFromBottomRightMask:
        def __init__(self, window_left, window_right):
            self.sides = window_left, window_right

        def keep(self, tokens):
            return window_mask(tokens, False, self.sides, None)

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
        assert query.dim() == 4
        return masked_sdpa(query, key, value, None if attn_bias is None else attn_bias.keep(query.shape[1]))

    for made in (BlockDiagonalMask, LowerTriangularMask, LocalAttentionFromBottomRightMask):
        setattr(masks, made.__name__, made)
    ops.memory_efficient_attention = memory_efficient_attention
    modules = {"xformers": types.ModuleType("xformers"), ops.__name__: ops, fmha.__name__: fmha, masks.__name__: masks}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


ADAPTERS = {
    "flash_attn": {"full", "window", "self", "causal", "segments"},
    "xformers": {"full", "window", "self", "causal", "segments"},
}


@pytest.mark.parametrize("library", ["flash_attn 2", "flash_attn 3", "flash_attn 4", "xformers"])
@pytest.mark.parametrize("name", MASKS)
def test_adapters_call_as_their_library_documents(library, name, monkeypatch):
    impl, _, version = library.partition(" ")
    for module in ("flash_attn", "flash_attn.cute", "flash_attn_interface", "xformers"):
        monkeypatch.setitem(sys.modules, module, None)
    if version:
        fake_flash_attn(monkeypatch, int(version))
    else:
        fake_xformers(monkeypatch)
    qkv, table, weight = torch.randn(1, 20, 3, 2, 16), rope(20, 16), torch.randn(16)
    mask = mask_of(name, 20)
    numbers = (mask.get("cu_seqlens"), 1e-6, mask.get("window", -1), mask.get("causal_block", 0))
    implementation = OPS["attention"].implementations[impl]
    on_gpu = types.SimpleNamespace(is_cuda=True, dtype=torch.float16, shape=qkv.shape)
    reason = implementation.refuses(on_gpu, weight, weight, table, *numbers)
    assert bool(reason) == (name not in ADAPTERS[impl]), reason
    assert "CUDA tensors" in implementation.refuses(qkv, weight, weight, table, *numbers)
    if not reason:
        ours = implementation.run(qkv, weight, weight, table, *numbers)
        torch.testing.assert_close(ours, attention(qkv, weight, weight, table, impl="reference", **mask))


def test_causal_windows_of_adapters(monkeypatch):
    qkv = torch.randn(1, 20, 3, 2, 16)
    expected = attention(qkv, window=4, causal_block=1, impl="reference")
    for version in (2, 3, 4, None):
        with monkeypatch.context() as patch:
            for module in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
                patch.setitem(sys.modules, module, None)
            fake_flash_attn(patch, version) if version else fake_xformers(patch)
            run = OPS["attention"].implementations["flash_attn" if version else "xformers"].run
            torch.testing.assert_close(run(qkv, None, None, None, None, 1e-6, 4, 1), expected)


def test_optional_libraries_are_not_imported(python):
    code = "import sys, vitok; print([m for m in ('flash_attn', 'xformers', 'triton') if m in sys.modules])"
    assert python(code, TRITON_INTERPRET="0") == "[]"


def test_the_public_name_is_the_function():
    assert public is attention and callable(attention)
