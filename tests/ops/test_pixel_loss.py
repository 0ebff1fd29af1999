"""pixel_loss: every implementation against its formula in float64, the loss and its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitok import InputError, _native
from vitok.ops import _triton, pixel_loss, tubelet_gather
from vitok.ops._registry import ImplementationError

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
KINDS = ["l1", "l2", "charbonnier"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
TARGETS = [torch.uint8, *FLOATS]
needs_native = pytest.mark.skipif(_native.library() is None, reason=f"no native library: {_native.reason()}")
needs_triton = pytest.mark.skipif(bool(_triton.MISSING), reason=_triton.MISSING or "triton is there")
native = pytest.param("native", marks=needs_native)
fast_impls = pytest.mark.parametrize("impl", [native, pytest.param("triton", marks=needs_triton)])
impls = pytest.mark.parametrize("impl", ["reference", native, pytest.param("triton", marks=needs_triton)])
kinds = pytest.mark.parametrize("kind", KINDS)

# (q, p), (T, H, W): whole and cut tubelets, patch rows that are, exceed and fall short of the CPU's vectors (12 to 48
# elements), one pixel, a token row that is more than a Triton block (1024 elements).
CASES = [
    ((1, 16), (1, 32, 32)),
    ((1, 16), (1, 17, 33)),
    ((1, 8), (2, 8, 24)),
    ((4, 8), (5, 9, 20)),
    ((2, 3), (3, 7, 8)),
    ((1, 1), (1, 1, 1)),
    ((2, 1), (3, 2, 5)),
    ((1, 7), (1, 20, 13)),
]


def make(tubelet, size, dtype, target_dtype=torch.uint8, batch=2, device="cpu"):
    (q, p), (t, h, w) = tubelet, size
    tokens = math.ceil(t / q) * math.ceil(h / p) * math.ceil(w / p)
    prediction = torch.randn(batch, tokens, q * p * p * 3).to(device, dtype)
    if target_dtype == torch.uint8:
        return prediction, torch.randint(0, 256, (batch, t, h, w, 3), dtype=torch.uint8, device=device)
    return prediction, (2 * torch.rand(batch, t, h, w, 3) - 1).to(device, target_dtype)


def formula(prediction, target, tubelet, kind, eps=1e-3):
    """By way of the target's tubelets, in float64; what is not the clip's is told by the tubelets of a clip of ones."""
    rows = tubelet_gather(target, tubelet=tubelet, pad="zero", dtype=torch.float64, impl="reference")
    ones = torch.ones(target.shape, dtype=torch.float64, device=target.device)
    real = tubelet_gather(ones, tubelet=tubelet, pad="zero", dtype=torch.float64, impl="reference")
    d = prediction.double() - rows
    distance = {"l1": d.abs(), "l2": d**2, "charbonnier": (d**2 + eps**2).sqrt()}[kind]
    return (distance * real).sum((1, 2)) / real.sum((1, 2))


def with_gradient(function, prediction, seed):
    leaf = prediction.detach().requires_grad_()
    loss = function(leaf)
    return loss.detach(), torch.autograd.grad(loss, leaf, seed.to(loss.dtype))[0]


def check(judge, impl, tubelet, kind, prediction, target):
    """The loss and the gradient of one implementation, both judged."""
    seed = torch.linspace(0.5, 2, len(prediction), device=prediction.device)

    def run(impl):
        return with_gradient(lambda x: pixel_loss(x, target, tubelet=tubelet, kind=kind, impl=impl), prediction, seed)

    ours, eager = run(impl), run("reference")
    exact = with_gradient(lambda x: formula(x, target, tubelet, kind), prediction.double(), seed)
    for actual, baseline, oracle in zip(ours, eager, exact, strict=True):
        if actual.dtype == torch.float64:  # the oracle is no more exact than that
            torch.testing.assert_close(actual, oracle, rtol=1e-13, atol=0)
        else:
            judge(actual, baseline, oracle)


@kinds
def test_reference_is_the_formula(kind):
    for tubelet, size in CASES:
        for dtype, target_dtype in [(torch.float64, torch.uint8), (torch.float64, torch.float64)]:
            prediction, target = make(tubelet, size, dtype, target_dtype)
            got = pixel_loss(prediction, target, tubelet=tubelet, kind=kind, impl="reference")
            torch.testing.assert_close(got, formula(prediction, target, tubelet, kind), rtol=1e-12, atol=0)


@needs_native
@kinds
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_native_cpu_at_every_level(isa, dtype, kind, judge):
    for tubelet, size in CASES:
        check(judge, "native", tubelet, kind, *make(tubelet, size, dtype))


@needs_native
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("target_dtype", TARGETS)
def test_native_for_every_pair_of_types(device, dtype, target_dtype, judge):
    for tubelet, size in CASES[1:5]:
        check(judge, "native", tubelet, "l2", *make(tubelet, size, dtype, target_dtype, device=device))


@needs_triton
@kinds
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton(device, dtype, kind, judge):
    for tubelet, size in CASES if kind == "charbonnier" else CASES[3:5]:
        check(judge, "triton", tubelet, kind, *make(tubelet, size, dtype, device=device))
    check(judge, "triton", (1, 16), kind, *make((1, 16), (1, 16, 64), dtype, torch.float32, device=device))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@kinds
@fast_impls
def test_bfloat16_on_cuda(impl, kind, judge):
    for tubelet, size in CASES:
        check(judge, impl, tubelet, kind, *make(tubelet, size, torch.bfloat16, device="cuda"))


LAYOUTS = {
    "channels_first": lambda x: x.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1),
    "every_second_pixel": lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, ::2, ::2],
    "window": lambda x: torch.nn.functional.pad(x, (0, 0, 2, 3, 1, 4))[:, :, 1:-4, 2:-3],
    "turned": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "grey": lambda x: x[..., :1].expand_as(x),
    "still": lambda x: x[:, :1].expand_as(x),
    "one_for_all": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("impl", "target_dtype", "cases"),
    [
        pytest.param("native", torch.uint8, [((2, 8), (3, 17, 21)), ((1, 16), (2, 32, 48))], marks=needs_native),
        pytest.param("native", torch.float32, [((2, 8), (3, 17, 21)), ((1, 16), (2, 32, 48))], marks=needs_native),
        pytest.param("triton", torch.uint8, [((2, 8), (3, 9, 13))], marks=needs_triton),
    ],
)
def test_layouts_of_the_target(impl, target_dtype, cases, layout, device):
    for tubelet, size in cases:
        prediction, target = make(tubelet, size, torch.float32, target_dtype, device=device)
        target = LAYOUTS[layout](target)
        seed = torch.ones(2, device=device)

        def run(target, tubelet=tubelet, prediction=prediction, seed=seed):
            return with_gradient(
                lambda x: pixel_loss(x, target, tubelet=tubelet, kind="l2", impl=impl), prediction, seed
            )

        got, expected = run(target), run(target.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@needs_native
def test_patches_too_large_to_stage(judge):
    for layout in ("channels_first", "window"):
        prediction, target = make((2, 100), (3, 130, 105), torch.float32, batch=1)
        check(judge, "native", (2, 100), "l2", prediction, LAYOUTS[layout](target))
    prediction, target = make((1, 70), (1, 75, 70), torch.float64, torch.float64, batch=1)
    check(judge, "native", (1, 70), "l1", prediction, LAYOUTS["channels_first"](target))


@fast_impls
def test_layouts_of_the_prediction_and_of_the_incoming_gradient(impl):
    packed, target = make((1, 8), (1, 20, 24), torch.float32)
    seed = torch.tensor([2.0, 0.5])

    def run(prediction, seed):
        before = prediction.clone(), seed.clone()
        result = with_gradient(lambda x: pixel_loss(x, target, tubelet=(1, 8), impl=impl), prediction, seed)
        assert torch.equal(prediction, before[0]) and torch.equal(seed, before[1])
        assert result[1].is_contiguous()
        return result

    expected = run(packed, seed)
    for layout in (
        torch.cat((packed, packed), -1)[..., : packed.shape[-1]],
        torch.cat((packed, packed), 1)[:, : packed.shape[1]],
        packed.transpose(0, 1).contiguous().transpose(0, 1),
        packed.mT.contiguous().mT,
    ):
        got = run(layout, torch.stack((seed, seed), 1)[:, 0])
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    everywhere = packed[:1, :1].expand_as(packed)
    got, expected = run(everywhere, seed[:1].expand(2)), run(everywhere.contiguous(), seed[:1].repeat(2))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@impls
@kinds
def test_padding_has_no_part_and_no_gradient(impl, kind):
    prediction, target = make((2, 8), (3, 11, 13), torch.float32)
    ones = torch.ones(2, 3, 11, 13, 3)
    real = tubelet_gather(ones, tubelet=(2, 8), pad="zero", impl="reference").bool()
    wild = prediction.where(real, torch.tensor(1e30))
    wild[0, -1][~real[0, -1]] = math.nan

    def loss(x):
        return pixel_loss(x, target, tubelet=(2, 8), kind=kind, impl=impl)

    clean = with_gradient(loss, prediction, torch.ones(2))
    if impl == "reference":
        torch.testing.assert_close(loss(wild), clean[0])
        return
    got = with_gradient(loss, wild, torch.ones(2))
    assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))
    assert not got[1][~real].any() and got[1][real].all()


@impls
def test_known_values(impl):
    target = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1, 1).expand(2, 1, 1, 1, 3)
    for kind, expected in [("l1", [1.5, 0.5]), ("l2", [2.25, 0.25]), ("charbonnier", [2.5, (0.25 + 4) ** 0.5])]:
        x = torch.full((2, 1, 3), 0.5)
        loss = pixel_loss(x, target, tubelet=(1, 1), kind=kind, eps=2.0, impl=impl)
        torch.testing.assert_close(loss, torch.tensor(expected))
    same = torch.full((2, 1, 3), 1.0, requires_grad=True)
    pixel_loss(same, target[1:].expand(2, -1, -1, -1, -1), tubelet=(1, 1), kind="l1", impl=impl).sum().backward()
    assert not same.grad.any()


@kinds
@pytest.mark.parametrize("impl", ["reference", native])
@pytest.mark.parametrize("target_dtype", [torch.uint8, torch.float64])
def test_gradcheck(impl, kind, target_dtype):
    prediction, target = make((2, 3), (3, 4, 5), torch.float64, target_dtype)
    assert torch.autograd.gradcheck(
        lambda x: pixel_loss(x, target, tubelet=(2, 3), kind=kind, eps=0.1, impl=impl),
        prediction.requires_grad_(),
        fast_mode=True,
    )


@impls
def test_no_samples(impl):
    prediction = torch.ones(0, 4, 48, requires_grad=True)
    loss = pixel_loss(prediction, torch.ones(0, 1, 8, 8, 3), tubelet=(1, 4), impl=impl)
    loss.sum().backward()
    assert loss.shape == (0,) and prediction.grad.shape == prediction.shape


@needs_native
@kinds
def test_same_bits_from_run_to_run_and_for_any_number_of_threads(kind):
    prediction, target = make((1, 8), (2, 40, 64), torch.bfloat16, batch=4)
    threads, results = torch.get_num_threads(), []
    try:
        for run in range(10):
            torch.set_num_threads(1 + run % 3)
            results.append(
                with_gradient(
                    lambda x: pixel_loss(x, target, tubelet=(1, 8), kind=kind, impl="native"), prediction, torch.ones(4)
                )
            )
    finally:
        torch.set_num_threads(threads)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


@needs_native
@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(1, 20)),
    q=st.integers(1, 3),
    p=st.integers(1, 9),
    kind=st.sampled_from(["l1", "l2"]),
)
def test_a_clip_is_at_no_distance_from_its_own_tubelets_and_a_sample_stands_for_itself(size, q, p, kind):
    prediction, target = make((q, p), size, torch.float32, torch.float32, batch=3)
    own = tubelet_gather(target, tubelet=(q, p), pad="edge", impl="reference")
    assert not pixel_loss(own, target, tubelet=(q, p), kind=kind, impl="native").any()
    together = pixel_loss(prediction, target, tubelet=(q, p), kind=kind, impl="native")
    alone = pixel_loss(prediction[1:2], target[1:2], tubelet=(q, p), kind=kind, impl="native")
    assert torch.equal(together[1:2], alone)


@fast_impls
def test_opcheck(impl):
    prediction, target = make((1, 4), (2, 6, 9), torch.float32)
    for given_target in (target, LAYOUTS["channels_first"](target)):
        arguments = (prediction, given_target, 1, 4, "charbonnier", 1e-3)
        torch.library.opcheck(torch.ops.vitok.pixel_loss_forward, (impl, *arguments))
        torch.library.opcheck(torch.ops.vitok.pixel_loss_backward, (impl, torch.ones(2), *arguments))


@pytest.mark.parametrize("backend", ["count", "aot_eager"])
def test_compiles_whole_with_one_graph_for_many_sizes(backend):
    torch.compiler.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def loss(prediction, target):
        return pixel_loss(prediction, target, tubelet=(1, 4), kind="l2").mean()

    compiled = torch.compile(loss, fullgraph=True, backend=count if backend == "count" else backend, dynamic=True)
    for batch, height, width in [(2, 13, 18), (3, 9, 22), (5, 30, 34)]:  # no two sizes alike, or they are taken for one
        prediction, target = make((1, 4), (7, height, width), torch.float32, batch=batch)
        prediction.requires_grad_()
        compiled(prediction, target).backward()
        torch.testing.assert_close(prediction.grad, torch.autograd.grad(loss(prediction, target), prediction)[0])
    assert len(graphs) <= 1


@fast_impls
def test_the_backward_pass_keeps_its_inputs_alone(impl):
    prediction, target = make((1, 4), (1, 8, 8), torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        pixel_loss(prediction.requires_grad_(), target, tubelet=(1, 4), impl=impl)
    assert [x.data_ptr() for x in kept] == [prediction.data_ptr(), target.data_ptr()]


@pytest.mark.skipif(_native.library() is not None, reason="the native library is there")
def test_native_by_name_says_why_it_is_absent(one_sentence):
    with pytest.raises(ImplementationError) as error:
        pixel_loss(*make((1, 4), (1, 8, 8), torch.float32), tubelet=(1, 4), impl="native")
    one_sentence(error.value, "'native'", _native.reason())


@pytest.mark.parametrize(
    ("impl", "pair", "p", "reason"),
    [
        pytest.param("native", (torch.float32, torch.float64), 4, "compare torch.float32 with", marks=needs_native),
        pytest.param("native", (torch.float64, torch.float32), 4, "compare torch.float64 with", marks=needs_native),
        pytest.param("native", (torch.float32, torch.uint8), 257, "at most 256 pixels a side", marks=needs_native),
        pytest.param("triton", (torch.float64, torch.uint8), 4, "computes in float32", marks=needs_triton),
    ],
)
def test_by_name_never_falls_back_and_auto_does(impl, pair, p, reason, one_sentence):
    prediction, target = make((1, p), (1, 8, 8), *pair)
    with pytest.raises(ImplementationError) as error:
        pixel_loss(prediction, target, tubelet=(1, p), impl=impl)
    one_sentence(error.value, repr(impl), reason)
    torch.testing.assert_close(
        pixel_loss(prediction, target, tubelet=(1, p)),
        pixel_loss(prediction, target, tubelet=(1, p), impl="reference"),
    )


CLIP = torch.zeros(2, 1, 8, 8, 3)
PREDICTION = torch.zeros(2, 4, 48)


@pytest.mark.parametrize(
    ("prediction", "target", "options", "message"),
    [
        (PREDICTION, CLIP[0], {}, "target must be [B, T, H, W, 3], got [1, 8, 8, 3]"),
        (PREDICTION, CLIP.movedim(-1, 1), {}, "target must be [B, T, H, W, 3], got [2, 3, 1, 8, 8]"),
        (PREDICTION, CLIP[:, :, :0], {}, "at least one frame, row and column, got [2, 1, 0, 8, 3]"),
        (PREDICTION, CLIP.int(), {}, "target must be uint8 or floating point, got torch.int32"),
        (PREDICTION, CLIP.clone().requires_grad_(), {}, "target must not require a gradient"),
        (PREDICTION, CLIP[:1], {}, "prediction must be [1, 4, 48]"),
        (PREDICTION[:, :3], CLIP, {}, "prediction must be [2, 4, 48] for a target [2, 1, 8, 8, 3] in tubelets (1, 4)"),
        (PREDICTION[..., :47], CLIP, {}, "got [2, 4, 47]"),
        (PREDICTION[0], CLIP, {}, "got [4, 48]"),
        (PREDICTION.int(), CLIP, {}, "prediction must be float32, bfloat16, float16 or float64, got torch.int32"),
        (PREDICTION.to("meta"), CLIP, {}, "target must be on the prediction's device meta, got cpu"),
        (PREDICTION, CLIP, {"kind": "huber"}, "one of l1, l2, charbonnier, got 'huber'"),
        (PREDICTION, CLIP, {"eps": 0.0}, "eps must be positive, got 0"),
        (PREDICTION, CLIP, {"eps": math.nan}, "eps must be a finite number of at least 0, got nan"),
        (PREDICTION, CLIP, {"tubelet": (0, 4)}, "tubelet must be (frames, pixels), integers of at least 1, got (0, 4)"),
        (PREDICTION, CLIP, {"impl": "cuda"}, "no implementation 'cuda'; it has native, triton, reference"),
    ],
)
def test_bad_arguments(prediction, target, options, message, one_sentence):
    with pytest.raises(InputError) as error:
        pixel_loss(prediction, target, **({"tubelet": (1, 4)} | options))
    one_sentence(error.value, message)


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": 0}, "prediction and target must not be null"),
        ({"partial": 0}, "partial and loss must not be null"),
        ({"sizes": (2, 2**40, 2**10, 2**10)}, "cover more than 2.58 elements"),
        ({"strides": (2**61, 0, 0, 0, 0)}, "strides reach beyond 2.60 elements"),
        ({"strides": (1, 1, 1, -1, 1)}, "strides must not be negative"),
        ({"target_dtype": "float64"}, "a float64 target goes with a float64 prediction only"),
        ({"dtype": "uint8"}, "must be a float type"),
        ({"p": 257}, "p must be from 1 to 256"),
        ({"kind": 3}, "kind must be 0, 1 or 2"),
    ],
)
def test_the_kernel_refuses_what_would_leave_memory(change, message):
    partial, loss = torch.ones(2, 4), torch.ones(2)
    arguments = {
        "prediction": PREDICTION.data_ptr(), "dtype": "float32", "prediction_strides": (192, 48),
        "target": CLIP.data_ptr(), "target_dtype": "float32", "sizes": (2, 1, 8, 8), "strides": CLIP.stride(),
        "q": 1, "p": 4, "kind": 0, "eps": 1e-3, "scale": 1.0, "shift": 0.0,
        "partial": partial.data_ptr(), "loss": loss.data_ptr(),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        _native.library().pixel_loss_forward_cpu(**(arguments | change))
