"""gaussian_bottleneck: every implementation against float64, its gradients, and what its noise may depend on."""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitok import InputError, _native
from vitok.bottlenecks import GaussianPosterior
from vitok.ops import _triton, gaussian_bottleneck, gaussian_sample, normal_noise
from vitok.ops._registry import ImplementationError

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
TRITON = _triton.MISSING or ("" if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1" else "no GPU")
needs_native = pytest.mark.skipif(_native.library() is None, reason=f"no native library: {_native.reason()}")
needs_triton = pytest.mark.skipif(bool(TRITON), reason=TRITON or "triton is there")
NATIVE, TRITON_IMPL = pytest.param("native", marks=needs_native), pytest.param("triton", marks=needs_triton)
impls = pytest.mark.parametrize("impl", ["reference", NATIVE, TRITON_IMPL])
# [B, L, c]: one element, a chunk of 1024 elements less and more one token, widths of no vector, several chunks
SHAPES = [(1, 1, 1), (2, 3, 5), (3, 64, 16), (2, 63, 16), (2, 65, 16), (2, 300, 7), (1, 9, 257), (2, 130, 32)]

LAYOUTS = {
    "packed": lambda x: x,
    "rows_apart": lambda x: torch.nn.functional.pad(x, (2, 5))[..., 2:-5],
    "channels_first": lambda x: x.mT.contiguous().mT,
    "every_second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "one_token": lambda x: x[:, :1].expand(-1, 5, -1),
    "one_sample": lambda x: x[:1].expand(3, -1, -1),
}


def random_moments(shape, dtype, device="cpu"):
    """Log-variances near the prior and down to the clamp; large ones, which drown a KL, are tested apart."""
    batch, tokens, channels = shape
    moments = torch.randn(batch, tokens, 2 * channels, device=device)
    logvar = moments[..., channels:].reshape(-1).clone()
    for i, value in enumerate((-30.0, 4.0, 1e-3, 0.5, -0.5, -40.0, 2.0, -12.0)):
        logvar[3 * i + 1 : 3 * i + 2] = value
    moments[..., channels:] = logvar.view(batch, tokens, channels)
    return moments.to(dtype)


def run(moments, impl, layout=lambda x: x, dz=None, dkl=None, **keys):
    """(z, kl, gradient of the moments) of random incoming gradients."""
    leaf = moments.detach().clone().requires_grad_()
    z, kl = gaussian_sample(layout(leaf), impl=impl, **({"seed": 3} | keys))
    generator = torch.Generator().manual_seed(1)
    dz = torch.randn(z.shape, generator=generator).to(moments.dtype).to(z) if dz is None else dz.to(z)
    dkl = 100 * torch.randn(kl.shape, generator=generator).to(kl) if dkl is None else dkl.to(kl)
    (gradient,) = torch.autograd.grad((z, kl), leaf, (dz, dkl))
    return z.detach(), kl.detach(), gradient


def compare(judge, moments, impl, **options):
    results = (
        run(moments, impl, **options),
        run(moments, "reference", **options),
        run(moments.double(), "reference", **options),
    )
    for actual, baseline, oracle in zip(*results, strict=True):
        judge(actual, baseline, oracle)
    assert results[0][0].is_contiguous() and results[0][1].dtype == torch.float32
    return results[0]


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native(judge, isa, dtype, shape):
    compare(judge, random_moments(shape, dtype), "native")


@needs_native
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_float64(shape):
    moments = random_moments(shape, torch.float64)
    for actual, expected in zip(run(moments, "native"), run(moments, "reference"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES if DEVICES[1:] else [(1, 1, 1), (2, 3, 5), (1, 65, 16), (1, 5, 257)], ids=str)
def test_triton(judge, dtype, shape):
    compare(judge, random_moments(shape, dtype, DEVICES[-1]), "triton")


@pytest.mark.skipif(DEVICES == ["cpu"], reason="no GPU")
@pytest.mark.parametrize("impl", ["native", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_a_gpu(judge, impl, dtype, shape):
    compare(judge, random_moments(shape, dtype, "cuda"), impl)


@pytest.mark.parametrize("impl", [NATIVE, TRITON_IMPL])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [5, 16])
def test_layouts(judge, impl, layout, channels):
    compare(judge, random_moments((3, 5, channels), torch.float32), impl, layout=LAYOUTS[layout])


@pytest.mark.parametrize("impl", [NATIVE, TRITON_IMPL])
@pytest.mark.parametrize("layout", [*LAYOUTS, "constant"])
def test_layouts_of_the_incoming_gradients(judge, impl, layout):
    dz = torch.ones(()).expand(3, 5, 16) if layout == "constant" else LAYOUTS[layout](torch.randn(3, 5, 16))
    before = dz.clone()
    compare(judge, random_moments((3, 5, 16), torch.float32), impl, dz=dz, dkl=torch.tensor(7.0).expand(3))
    assert torch.equal(dz, before)


@impls
def test_gradient_of_one_output_alone(impl):
    moments = random_moments((2, 5, 16), torch.float32).requires_grad_()
    z, kl = gaussian_sample(moments, seed=3, impl=impl)
    (of_z,) = torch.autograd.grad(z.sum(), moments, retain_graph=True)
    (of_kl,) = torch.autograd.grad(kl.sum(), moments, retain_graph=True)
    (of_both,) = torch.autograd.grad(z.sum() + kl.sum(), moments)
    torch.testing.assert_close(of_z + of_kl, of_both)
    _, kl_alone = gaussian_sample(moments, sample=False, impl=impl)
    torch.testing.assert_close(torch.autograd.grad(kl_alone.sum(), moments)[0], of_kl)
    assert torch.equal(kl_alone, kl)


@impls
def test_no_gradient_where_the_clamp_is_at_work(impl):
    logvar = torch.tensor([-31.0, -30.0, -29.0, 0.0, 19.0, 20.0, 21.0, 1e30])
    moments = torch.stack((torch.zeros(8), logvar), -1).view(1, 8, 2).requires_grad_()
    z, kl = gaussian_sample(moments, seed=0, impl=impl)
    (gradient,) = torch.autograd.grad((z, kl), moments, (torch.ones_like(z), torch.ones_like(kl)))
    assert (gradient[0, :, 1] != 0).tolist() == [False, True, True, True, True, True, False, False]


@pytest.mark.parametrize("impl", ["reference", NATIVE])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(impl, layout):
    moments = (2 * torch.randn(3, 4, 6, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda m: gaussian_sample(LAYOUTS[layout](m), seed=5, impl=impl), moments, fast_mode=True
    )


@impls
@pytest.mark.parametrize("logvar", [8.0, 12.0, 20.0, 30.0])
def test_large_variances(impl, logvar):
    """exp(v) is the square of exp(v / 2), which doubles a rounding error; more digits than these nobody needs."""
    moments = torch.tensor([1.0, logvar]).expand(1, 40, 2)
    results = run(moments, impl), run(moments.double(), "reference")
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=1e-6)


@impls
@pytest.mark.parametrize("channels", [3, 16])
def test_noise_is_the_noise_of_the_sample(impl, channels):
    ids = torch.tensor([5, 2**40, -3])
    moments = torch.zeros(3, 40, 2 * channels)
    z, kl = gaussian_sample(moments, seed=2**63 + 7, sample_ids=ids, impl=impl)
    assert torch.equal(z.flatten(1), normal_noise(2**63 + 7, ids, 40 * channels)) and kl.tolist() == [0.0] * 3
    default, _ = gaussian_sample(moments, seed=2**63 + 7, impl=impl)
    assert torch.equal(default.flatten(1), normal_noise(2**63 + 7, torch.arange(3), 40 * channels))
    as_tensor, _ = gaussian_sample(moments, seed=torch.tensor([7 - 2**63]), sample_ids=ids, impl=impl)
    assert torch.equal(as_tensor, z)


@impls
def test_a_sample_does_not_know_its_batch(impl):
    moments = random_moments((3, 5, 16), torch.float32)
    together = gaussian_sample(moments, seed=1, impl=impl)
    for i in range(3):
        alone = gaussian_sample(moments[i : i + 1], seed=1, sample_ids=torch.tensor([i]), impl=impl)
        assert torch.equal(alone[0][0], together[0][i]) and torch.equal(alone[1][0], together[1][i])


@impls
def test_kl_near_the_prior_is_not_lost(impl):
    for logvar in (1e-3, -1e-3, 0.4999, 0.5001, -0.5001, 3.0):
        moments = torch.tensor([0.0, logvar]).expand(1, 40, 2)
        _, kl = gaussian_sample(moments, sample=False, impl=impl)
        v = torch.tensor(logvar).item()
        exact = 0.5 * (math.expm1(v) - v)
        assert kl.item() == pytest.approx(exact, rel=2e-4 if impl == "reference" else 5e-6)


@needs_native
def test_bitwise_the_same_whatever_the_threads_and_the_run():
    moments = random_moments((5, 700, 16), torch.bfloat16)
    first = run(moments, "native")
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3, 4) * 3:
            torch.set_num_threads(n)
            assert all(map(torch.equal, run(moments, "native"), first))
    finally:
        torch.set_num_threads(threads)


@impls
def test_nobody_writes_into_inputs(impl):
    moments = random_moments((2, 5, 16), torch.float32)
    before = moments.clone()
    run(moments, impl)
    gaussian_sample(moments, seed=0, impl=impl)
    assert torch.equal(moments, before)


@impls
def test_no_samples(impl):
    moments = torch.empty(0, 4, 6, requires_grad=True)
    z, kl = gaussian_sample(moments, seed=0, impl=impl)
    assert z.shape == (0, 4, 3) and kl.shape == (0,)
    (z.sum() + kl.sum()).backward()
    assert moments.grad.shape == moments.shape


@impls
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_bottleneck_is_linear_and_sample(impl, dtype):
    tokens, weight, bias = torch.randn(2, 9, 32).to(dtype), torch.randn(8, 32), torch.randn(8)
    bias[5] = -50
    leaves = [x.requires_grad_() for x in (tokens, weight, bias)]
    z, mean, logvar, kl = gaussian_bottleneck(*leaves, seed=4, impl=impl)
    moments = torch.nn.functional.linear(tokens, weight.to(dtype), bias.to(dtype))
    assert torch.equal(mean, moments[..., :4]) and torch.equal(logvar, moments[..., 4:].clamp(-30, 20))
    assert z.dtype == dtype and kl.dtype == torch.float32
    expected = gaussian_sample(moments, seed=4, impl=impl)
    assert torch.equal(z, expected[0]) and torch.equal(kl, expected[1])
    (z.sum() + logvar.sum() + kl.sum()).backward()
    assert all(x.grad is not None and x.grad.dtype == x.dtype and x.grad.any() for x in leaves)
    mode = gaussian_bottleneck(*leaves, seed=4, sample=False, impl=impl)
    assert torch.equal(mode[0], mean) and torch.equal(mode[3], kl)


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 3), tokens=st.integers(1, 90), channels=st.integers(1, 40), seed=st.integers(0, 2**64 - 1))
def test_z_undoes_to_the_noise(batch, tokens, channels, seed):
    generator = torch.Generator().manual_seed(seed % 1000)
    moments = torch.randn(batch, tokens, 2 * channels, generator=generator, dtype=torch.float64)
    z, kl = gaussian_sample(moments, seed=seed)
    mean, logvar = moments.chunk(2, -1)
    noise = normal_noise(seed, torch.arange(batch), tokens * channels).view(mean.shape)
    torch.testing.assert_close((z - mean) * (-0.5 * logvar).exp(), noise.double(), rtol=1e-9, atol=1e-9)
    assert (kl >= 0).all()


@needs_native
@pytest.mark.parametrize("sample", [True, False])
def test_opcheck(sample):
    moments, seed_at = torch.randn(2, 5, 6), torch.tensor(3)
    ids = torch.arange(2)
    torch.library.opcheck(torch.ops.vitok.gaussian_sample_forward, ("native", moments, 3, None, ids, sample))
    turned = moments.mT.contiguous().mT
    torch.library.opcheck(torch.ops.vitok.gaussian_sample_forward, ("native", turned, 0, seed_at, None, sample))
    dz = torch.randn(2, 5, 3) if sample else None
    torch.library.opcheck(
        torch.ops.vitok.gaussian_sample_backward, ("native", moments, dz, torch.randn(2), 0, seed_at, ids)
    )


def test_compiles_whole_with_one_graph_for_many_sizes_and_seeds():
    torch.compiler.reset()
    weight, graphs = torch.randn(12, 20, requires_grad=True), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def loss(tokens, seed):
        z, _, logvar, kl = gaussian_bottleneck(tokens, weight, seed=seed)
        return z.square().mean() + kl.mean() + logvar.mean()

    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=True)
    for i, (batch, tokens) in enumerate([(2, 7), (3, 11), (4, 31)]):  # the reference pads 4n elements apart
        x, seed = torch.randn(batch, tokens, 20), torch.tensor(i)
        torch.testing.assert_close(compiled(x, seed), loss(x, seed))
    assert len(graphs) == 1


def test_a_compiled_training_step():
    torch.compiler.reset()

    def step(moments, seed):
        posterior = GaussianPosterior.from_moments(moments, (3, 4))
        return posterior.sample(seed).square().mean() + posterior.kl().mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    gradients = []
    for f in (step, compiled):
        moments = random_moments((2, 12, 4), torch.float32).requires_grad_()
        torch.manual_seed(0)
        with torch.no_grad():
            moments.copy_(torch.randn(moments.shape))
        f(moments, torch.tensor(5)).backward()
        gradients.append(moments.grad)
    torch.testing.assert_close(*gradients)


def test_posterior_samples_and_tells_kl_in_one_call(monkeypatch):
    from vitok import ops

    calls = []
    original = ops.gaussian_sample
    monkeypatch.setattr(ops, "gaussian_sample", lambda *a, **k: calls.append(1) or original(*a, **k))
    moments = torch.randn(2, 6, 8, requires_grad=True)
    posterior = GaussianPosterior.from_moments(moments, (2, 3))
    z = posterior.sample(seed=1)
    kl = posterior.kl()
    assert len(calls) == 1 and z.shape == posterior.mean.shape == (2, 4, 2, 3)
    (z.square().mean() + kl.mean()).backward()
    with torch.no_grad():
        later = GaussianPosterior.from_moments(moments, (2, 3))
        later.sample(seed=1)
    assert not later._kl.requires_grad and later.kl().requires_grad, "a KL without history does not stand in"
    torch.testing.assert_close(later.kl(), kl)


@pytest.mark.parametrize(
    ("moments", "keys", "words"),
    [
        (torch.zeros(2, 4), {}, "moments"),
        (torch.zeros(2, 4, 5), {}, "moments"),
        (torch.zeros(2, 0, 4), {}, "moments"),
        (torch.zeros(2, 4, 0), {}, "moments"),
        (torch.zeros(2, 4, 4, dtype=torch.int64), {}, "moments"),
        (torch.zeros(2, 4, 4), {"seed": -1}, "seed"),
        (torch.zeros(2, 4, 4), {"seed": torch.zeros(2, dtype=torch.int64)}, "seed"),
        (torch.zeros(2, 4, 4), {"seed": torch.zeros(())}, "seed"),
        (torch.zeros(2, 4, 4), {"seed": torch.zeros((), dtype=torch.int64, device="meta")}, "seed"),
        (torch.zeros(2, 4, 4), {"sample_ids": torch.arange(3)}, "sample_ids"),
        (torch.zeros(2, 4, 4), {"sample_ids": torch.arange(2).int()}, "sample_ids"),
        (torch.zeros(2, 4, 4), {"sample_ids": torch.arange(2, device="meta")}, "sample_ids"),
    ],
)
def test_bad_arguments(moments, keys, words, one_sentence):
    with pytest.raises(InputError) as error:
        gaussian_sample(moments, **keys)
    one_sentence(error.value, words)


@pytest.mark.parametrize(
    ("tokens", "weight", "bias", "words"),
    [
        (torch.zeros(2, 4), torch.zeros(4, 4), None, "tokens"),
        (torch.zeros(2, 3, 4), torch.zeros(4, 5), None, "weight"),
        (torch.zeros(2, 3, 4), torch.zeros(4, 4), torch.zeros(3), "bias"),
        (torch.zeros(2, 3, 4), torch.zeros(3, 4), None, "weight must be [2c, width]"),
        (torch.zeros(2, 3, 4), torch.zeros(4, 4, device="meta"), None, "weight"),
    ],
)
def test_bad_matrices(tokens, weight, bias, words, one_sentence):
    with pytest.raises(InputError) as error:
        gaussian_bottleneck(tokens, weight, bias, seed=0)
    one_sentence(error.value, words)


@needs_triton
def test_triton_does_not_take_float64(one_sentence):
    with pytest.raises(ImplementationError) as error:
        gaussian_sample(torch.zeros(1, 2, 4, dtype=torch.float64), impl="triton")
    one_sentence(error.value, "triton", "float32")


@pytest.mark.skipif(_native.library() is not None, reason="the native library is there")
def test_native_by_name_says_why_it_is_absent(one_sentence):
    with pytest.raises(ImplementationError) as error:
        gaussian_sample(torch.zeros(1, 2, 4), impl="native")
    one_sentence(error.value, "gaussian_bottleneck", "native")


@needs_native
def test_kernels_refuse_arguments_that_cannot_be():
    library = _native.library()
    good = {
        "moments": 1, "dtype": "float32", "sizes": (1, 2, 3), "strides": (12, 6, 1),
        "seed": 0, "seed_at": 0, "sample_ids": 0, "stride_id": 0, "z": 0, "kl": 1, "partials": 1,
    }  # fmt: skip
    for bad in ({"dtype": "uint8"}, {"sizes": (1, 0, 3)}, {"sizes": (2**40, 2**20, 2**20)}, {"moments": 0}, {"kl": 0}):
        with pytest.raises(ValueError, match="gaussian_sample_forward"):
            library.gaussian_sample_forward_cpu(**(good | bad))


@pytest.mark.skipif(_native.library() is None, reason="no native library")
@pytest.mark.parametrize("kernel", ["gaussian_sample_forward", "gaussian_sample_backward"])
def test_negative_strides_are_refused(kernel):
    """They lead to memory before the tensor."""
    at = torch.zeros(64).data_ptr()
    moments = {"moments": at, "dtype": "float32", "sizes": (1, 2, 3), "strides": (12, -6, 1)}
    keys = {"seed": 0, "seed_at": 0, "sample_ids": 0, "stride_id": 1}
    rest = {"z": at, "kl": at, "partials": at}
    if kernel == "gaussian_sample_backward":
        rest = {"dz": at, "dz_strides": (6, 3, 1), "dkl": at, "dkl_stride": 1, "dmoments": at}
    with pytest.raises(ValueError, match="strides must not be negative"):
        getattr(_native.library(), f"{kernel}_cpu")(**moments, **keys, **rest)
