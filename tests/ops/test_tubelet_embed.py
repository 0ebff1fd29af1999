"""tubelet_embed: the reference against indexing by hand, the gathers against the reference bit for bit."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitok import InputError, _native
from vitok.ops import _triton, tubelet_embed, tubelet_gather, tubelet_scatter, tubelet_unembed
from vitok.ops._registry import ImplementationError

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
IMPLS = ["reference", "native"]
SOURCES = [torch.uint8, torch.float32, torch.bfloat16, torch.float16]
TARGETS = [torch.float32, torch.bfloat16, torch.float16]
needs_native = pytest.mark.skipif(_native.library() is None, reason=f"no native library: {_native.reason()}")
no_triton = _triton.MISSING or _triton.refuses(torch.empty(0, device=DEVICES[-1]))
needs_triton = pytest.mark.skipif(bool(no_triton), reason=no_triton or "Triton is there")
NATIVE, TRITON = pytest.param("native", marks=needs_native), pytest.param("triton", marks=needs_triton)
impls = pytest.mark.parametrize("impl", ["reference", NATIVE])
kernels = pytest.mark.parametrize("impl", [NATIVE, TRITON])

LAYOUTS = {
    "channels_last": lambda x: x,
    "channels_first": lambda x: x.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1),
    "every_second_pixel": lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, ::2, ::2],
    "window": lambda x: torch.nn.functional.pad(x, (0, 0, 2, 3, 1, 4))[:, :, 1:-4, 2:-3],
    "turned": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "still": lambda x: x[:, :1].expand(-1, 3, -1, -1, -1),
}


def random_pixels(dtype=torch.uint8, shape=(2, 3, 13, 18, 3)):
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=dtype)
    return (2 * torch.rand(shape, dtype=torch.float64) - 1).to(dtype)


def by_hand(pixels, q, p, pad):
    """One Python index at a time, float64."""
    batch, frames, height, width, _ = pixels.shape
    grid = [math.ceil(n / step) for n, step in zip((frames, height, width), (q, p, p), strict=True)]
    values = pixels.double() * 2 / 255 - 1 if pixels.dtype == torch.uint8 else pixels.double()
    out = torch.zeros(batch, math.prod(grid), q * p * p * 3, dtype=torch.float64)
    for row, (lt, ly, lx) in enumerate(itertools.product(*map(range, grid))):
        for element, (i, j, k) in enumerate(itertools.product(range(q), range(p), range(p))):
            t, y, x = lt * q + i, ly * p + j, lx * p + k
            if pad == "edge" or (t < frames and y < height and x < width):
                at = values[:, min(t, frames - 1), min(y, height - 1), min(x, width - 1)]
                out[:, row, 3 * element : 3 * element + 3] = at
    return out


@impls
@pytest.mark.parametrize("pad", ["edge", "zero"])
@pytest.mark.parametrize(
    ("q", "p", "size"), [(1, 4, (1, 8, 8)), (2, 4, (3, 5, 9)), (4, 3, (1, 1, 1)), (1, 1, (2, 3, 2))]
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_gather_by_hand(impl, pad, q, p, size, dtype):
    pixels = random_pixels(dtype, (2, *size, 3))
    rows = tubelet_gather(pixels, tubelet=(q, p), pad=pad, impl=impl)
    torch.testing.assert_close(rows.double(), by_hand(pixels, q, p, pad), rtol=0, atol=2e-7)


@needs_native
@pytest.mark.parametrize("pad", ["edge", "zero"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("source", "target"), [*itertools.product(SOURCES, TARGETS), (torch.float64, torch.float64)], ids=str
)
def test_native_equals_reference_bit_for_bit(source, target, layout, pad):
    pixels = LAYOUTS[layout](random_pixels(source))
    for tubelet in [(1, 16), (2, 4), (1, 3)]:
        native, reference = (
            tubelet_gather(pixels, tubelet=tubelet, pad=pad, dtype=target, impl=i) for i in IMPLS[::-1]
        )
        assert native.dtype == reference.dtype == target and native.is_contiguous()
        assert torch.equal(native, reference)


@impls
def test_uint8_equals_its_float_image(impl):
    pixels = random_pixels()
    rows = tubelet_gather(pixels, tubelet=(2, 8), impl=impl)
    assert torch.equal(rows, tubelet_gather(pixels.float() * (2 / 255) - 1, tubelet=(2, 8), impl=impl))
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2, 1).expand(1, 1, 1, 2, 3)
    assert tubelet_gather(ends, tubelet=(1, 1), impl=impl).flatten().tolist() == [-1] * 3 + [1] * 3


def test_float64_throughout():
    pixels = random_pixels()
    rows = tubelet_gather(pixels, tubelet=(2, 8), dtype=torch.float64)
    torch.testing.assert_close(rows, by_hand(pixels, 2, 8, "edge"), rtol=0, atol=1e-15)


@impls
def test_padding(impl):
    pixels = random_pixels(shape=(1, 1, 3, 3, 3))
    edge, zero = (
        tubelet_gather(pixels, tubelet=(2, 4), pad=pad, impl=impl).view(2, 4, 4, 3) for pad in ("edge", "zero")
    )
    assert (
        torch.equal(edge[1], edge[0])
        and torch.equal(edge[:, 3], edge[:, 2])
        and torch.equal(edge[:, :, 3], edge[:, :, 2])
    )
    assert torch.equal(zero[0, :3, :3], edge[0, :3, :3])
    assert not zero[1].any() and not zero[:, 3].any() and not zero[:, :, 3].any()


@pytest.mark.parametrize("pad", ["edge", "zero"])
@pytest.mark.parametrize("layout", LAYOUTS)
@impls
def test_gradients(impl, pad, layout):
    pixels = random_pixels(torch.float64, (2, 3, 5, 4, 3)).requires_grad_()
    weight = torch.randn(2, 2 * 9 * 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def embed(pixels, weight, bias):
        return tubelet_embed(LAYOUTS[layout](pixels), weight, bias, tubelet=(2, 3), pad=pad, impl=impl)

    assert torch.autograd.gradcheck(embed, (pixels, weight, bias), fast_mode=True)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_native_gradient_equals_reference(dtype):
    pixels = random_pixels(dtype, (2, 3, 5, 4, 3))
    gradients = []
    for impl in IMPLS:
        leaf = pixels.clone().requires_grad_()
        rows = tubelet_gather(leaf, tubelet=(2, 4), impl=impl)
        seed = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
        (rows * seed).sum().backward()
        gradients.append(leaf.grad)
    # sums of up to eight replicated elements, in another order
    torch.testing.assert_close(*gradients, rtol=4 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)


@needs_native
def test_gradient_does_not_write_into_the_incoming_one():
    leaf = random_pixels(torch.float32, (1, 1, 3, 3, 3)).requires_grad_()
    rows = tubelet_gather(leaf, tubelet=(1, 4), impl="native")
    gradient = torch.ones_like(rows)
    rows.backward(gradient)
    assert torch.equal(gradient, torch.ones_like(rows))
    assert leaf.grad[0, 0, 2, 2].tolist() == [4.0] * 3 and leaf.grad[0, 0, 0, 0].tolist() == [1.0] * 3


@needs_triton
@pytest.mark.parametrize("device", DEVICES[-1:])
@pytest.mark.parametrize("pad", ["edge", "zero"])
@pytest.mark.parametrize("layout", ["channels_last", "channels_first", "every_second_pixel", "still"])
@pytest.mark.parametrize(
    ("source", "target"),
    [(torch.uint8, torch.float16), (torch.uint8, torch.float32), (torch.float32, torch.float16)],
    ids=str,
)
def test_triton_gather_equals_reference_bit_for_bit(source, target, layout, pad, device):
    for q, p, size in [(1, 8, (2, 8, 16)), (2, 3, (3, 7, 8)), (1, 1, (1, 1, 1)), (1, 16, (1, 17, 33))]:
        pixels = LAYOUTS[layout](random_pixels(source, (1, *size, 3)).to(device))
        ours, reference = (
            tubelet_gather(pixels, tubelet=(q, p), pad=pad, dtype=target, impl=i) for i in ("triton", "reference")
        )
        assert ours.dtype == target and ours.is_contiguous() and torch.equal(ours, reference)


@kernels
@pytest.mark.parametrize("layout", ["channels_last", "channels_first", "window"])
@pytest.mark.parametrize(
    ("q", "p", "size", "width"),
    [(1, 4, (1, 8, 16), 1), (2, 4, (3, 5, 9), 65), (1, 8, (2, 16, 16), 64), (1, 4, (1, 28, 32), 63)],
)
@pytest.mark.parametrize(
    ("source", "dtype"),
    [
        (torch.uint8, torch.float32), (torch.float32, torch.float16), (torch.uint8, torch.bfloat16),
        (torch.float16, torch.float16), (torch.bfloat16, torch.float32),
    ],
    ids=str,
)  # fmt: skip
def test_output_and_gradients(impl, source, dtype, q, p, size, width, layout, judge):
    if impl == "triton" and DEVICES[-1] == "cpu" and torch.bfloat16 in (source, dtype):
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    device = DEVICES[-1] if impl == "triton" else "cpu"
    pixels = LAYOUTS[layout](random_pixels(source, (1, *size, 3)).to(device))
    elements = q * p * p * 3
    weight = (torch.randn(width, elements, device=device) / elements**0.5).to(dtype)
    bias = torch.randn(width, device=device).to(dtype)
    seed = torch.randn(width, 1, device=device).to(dtype)

    def run(impl, dtype):
        leaves = [weight.to(dtype).requires_grad_(), bias.to(dtype).requires_grad_()]
        x = pixels
        if source != torch.uint8:
            x = (pixels.double() if dtype == torch.float64 else pixels.detach()).requires_grad_()
            leaves.append(x)
        out = tubelet_embed(x, *leaves[:2], tubelet=(q, p), impl=impl)
        gradient = seed.to(dtype).expand(width, out.shape[1]).mT[None]  # of strides 0 and 1
        return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]

    for actual, baseline, oracle in zip(
        run(impl, dtype), run("reference", dtype), run("reference", torch.float64), strict=True
    ):
        judge(actual, baseline, oracle)


@needs_triton
def test_large_tiles(monkeypatch, judge):
    """The choice for many tokens, at and one beyond the edge of a block of 128."""
    from vitok.kernels import tubelet_embed as kernel

    monkeypatch.setattr(kernel, "tiles", lambda *_: kernel.LARGE)
    weight = torch.randn(5, 48, device=DEVICES[-1]).half() / 7
    for width in (512, 528):
        pixels = random_pixels(shape=(1, 1, 4, width, 3)).to(DEVICES[-1])
        judge(
            tubelet_embed(pixels, weight, tubelet=(1, 4), impl="triton"),
            tubelet_embed(pixels, weight, tubelet=(1, 4), impl="reference"),
            tubelet_embed(pixels, weight.double(), tubelet=(1, 4), impl="reference"),
        )


@kernels
def test_nothing_but_pixels_and_weight_is_kept_for_the_backward(impl):
    pixels, weight = random_pixels(shape=(1, 1, 8, 8, 3)), torch.randn(3, 48, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        tubelet_embed(pixels, weight, torch.zeros(3), tubelet=(1, 4), impl=impl)
    assert {x.data_ptr() for x in kept} == {pixels.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize("impl", ["reference", NATIVE, TRITON])
def test_autocast(impl):
    pixels, weight, bias = random_pixels(), torch.randn(5, 96, requires_grad=True), torch.randn(5)
    expected = tubelet_embed(pixels, weight.half(), bias.half(), tubelet=(2, 4), impl=impl)
    with torch.autocast("cpu", torch.float16):
        tokens = tubelet_embed(pixels, weight, bias, tubelet=(2, 4), impl=impl)
    assert tokens.dtype == torch.float16 and torch.equal(tokens, expected)
    tokens.sum().backward()
    assert weight.grad.dtype == torch.float32


@needs_native
def test_the_same_bits_from_run_to_run_and_for_any_number_of_threads():
    pixels, weight = random_pixels(shape=(2, 3, 37, 67, 3)), torch.randn(9, 384).bfloat16()
    first = tubelet_gather(pixels, tubelet=(2, 8), dtype=torch.bfloat16, impl="native")
    tokens = tubelet_embed(pixels, weight, tubelet=(2, 8), impl="native")
    try:
        for threads in (2, 3, 1, 2, 3, 1, 2, 3, 1):
            torch.set_num_threads(threads)
            assert torch.equal(tubelet_gather(pixels, tubelet=(2, 8), dtype=torch.bfloat16, impl="native"), first)
            assert threads > 1 or torch.equal(tubelet_embed(pixels, weight, tubelet=(2, 8), impl="native"), tokens)
    finally:
        torch.set_num_threads(1)


@impls
def test_embed_is_a_matrix_product(impl):
    pixels, weight, bias = random_pixels(), torch.randn(5, 2 * 16 * 3), torch.randn(5)
    tokens = tubelet_embed(pixels, weight, bias, tubelet=(2, 4), impl=impl)
    expected = by_hand(pixels, 2, 4, "edge") @ weight.double().T + bias.double()
    torch.testing.assert_close(tokens.double(), expected, rtol=1e-5, atol=1e-5)
    assert tubelet_embed(pixels, weight.bfloat16(), tubelet=(2, 4), impl=impl).dtype == torch.bfloat16


def test_equals_conv3d():
    pixels, weight = random_pixels(torch.float32, (2, 4, 8, 12, 3)), torch.randn(5, 3, 2, 4, 4)
    expected = torch.nn.functional.conv3d(pixels.permute(0, 4, 1, 2, 3), weight, stride=(2, 4, 4)).flatten(2).mT
    tokens = tubelet_embed(pixels, weight.permute(0, 2, 3, 4, 1).flatten(1), tubelet=(2, 4))
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)


@impls
def test_no_clips(impl):
    assert tubelet_gather(random_pixels(shape=(0, 1, 9, 9, 3)), tubelet=(1, 4), impl=impl).shape == (0, 9, 48)


@settings(max_examples=30, deadline=None)
@given(
    size=st.tuples(st.integers(1, 5), st.integers(1, 20), st.integers(1, 20)),
    q=st.integers(1, 3),
    p=st.integers(1, 9),
    pad=st.sampled_from(["edge", "zero"]),
    layout=st.sampled_from(["channels_last", "channels_first"]),
)
def test_unembed_of_embed_with_identity_weights_gives_the_pixels_back(size, q, p, pad, layout):
    pixels = LAYOUTS[layout](random_pixels(torch.float32, (1, *size, 3)))
    identity = torch.eye(q * p * p * 3)
    tokens = tubelet_embed(pixels, identity, tubelet=(q, p), pad=pad)
    assert torch.equal(tubelet_unembed(tokens, identity, tubelet=(q, p), size=size).movedim(1, -1), pixels)


@settings(max_examples=30, deadline=None)
@given(
    size=st.tuples(st.integers(1, 5), st.integers(1, 20), st.integers(1, 20)),
    q=st.integers(1, 3),
    p=st.integers(1, 9),
    layout=st.sampled_from(["channels_last", "channels_first"]),
    dtype=st.sampled_from(TARGETS),
)
def test_bytes_come_back_exactly_in_every_dtype(size, q, p, layout, dtype):
    pixels = LAYOUTS[layout](random_pixels(shape=(1, *size, 3)))
    rows = tubelet_gather(pixels, tubelet=(q, p), dtype=dtype)
    back = {"tubelet": (q, p), "size": size, "out_dtype": torch.uint8}
    assert torch.equal(tubelet_scatter(rows, **back, layout="channels_last"), pixels)
    identity = torch.eye(q * p * p * 3, dtype=dtype)
    tokens = tubelet_embed(pixels, identity, tubelet=(q, p))
    assert torch.equal(tubelet_unembed(tokens, identity, **back).movedim(1, -1), pixels)


@needs_triton
@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
def test_bytes_come_back_exactly_through_triton(layout):
    for q, p, size in [(1, 4, (1, 8, 16)), (2, 4, (3, 5, 9))]:
        pixels = LAYOUTS[layout](random_pixels(shape=(1, *size, 3)).to(DEVICES[-1]))
        identity = torch.eye(q * p * p * 3, dtype=torch.float16, device=DEVICES[-1])
        tokens = tubelet_embed(pixels, identity, tubelet=(q, p), impl="triton")
        back = {"tubelet": (q, p), "size": size, "out_dtype": torch.uint8, "impl": "triton"}
        assert torch.equal(tubelet_unembed(tokens, identity, **back, layout="channels_last"), pixels)
        assert torch.equal(tubelet_unembed(tokens, identity, **back).movedim(1, -1), pixels)


@needs_native
@pytest.mark.parametrize("source", [torch.uint8, torch.float32])
def test_opcheck(source):
    for layout in ("channels_last", "channels_first"):
        pixels = LAYOUTS[layout](random_pixels(source))
        torch.library.opcheck(torch.ops.vitok.tubelet_gather, ("native", pixels, 2, 4, False, torch.bfloat16))
    weight, bias = torch.randn(5, 96), torch.randn(5)
    torch.library.opcheck(torch.ops.vitok.tubelet_embed_forward, ("native", pixels, weight, bias, 2, 4, False))


def test_compiles_whole_with_one_graph_for_many_sizes():
    torch.compiler.reset()
    weight, graphs = torch.randn(7, 48), []  # no two sizes alike, or they are taken for one

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x: tubelet_embed(x, weight, tubelet=(1, 4)), fullgraph=True, backend=backend, dynamic=True
    )
    for shape in [(2, 5, 13, 18, 3), (3, 4, 9, 22, 3), (4, 2, 30, 31, 3)]:
        pixels = random_pixels(shape=shape)
        assert torch.equal(compiled(pixels), tubelet_embed(pixels, weight, tubelet=(1, 4)))
    assert len(graphs) == 1


@pytest.mark.skipif(_native.library() is not None, reason="the native library is there")
def test_native_by_name_says_why_it_is_absent(one_sentence):
    with pytest.raises(ImplementationError) as error:
        tubelet_gather(random_pixels(), tubelet=(1, 4), impl="native")
    one_sentence(error.value, "'native'", _native.reason())


@needs_native
@pytest.mark.parametrize(
    ("pixels", "options", "reason"),
    [
        (random_pixels(), {"dtype": torch.float64}, "does not convert torch.uint8 to torch.float64"),
        (random_pixels(torch.float64), {}, "does not convert torch.float64 to torch.float32"),
        (random_pixels(), {"tubelet": (1, 257)}, "at most 256 pixels a side, got 257"),
    ],
    ids=["to_float64", "from_float64", "large_patch"],
)
def test_native_by_name_never_falls_back_and_auto_does(pixels, options, reason, one_sentence):
    arguments = {"tubelet": (1, 16)} | options
    with pytest.raises(ImplementationError) as error:
        tubelet_gather(pixels, **arguments, impl="native")
    one_sentence(error.value, "'native'", reason)
    assert torch.equal(tubelet_gather(pixels, **arguments), tubelet_gather(pixels, **arguments, impl="reference"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(7, 47)}, "weight must be [width, 48] for tubelet (1, 4), got [7, 47]"),
        ({"weight": torch.zeros(48)}, "weight must be [width, 48] for tubelet (1, 4), got [48]"),
        (
            {"weight": torch.zeros(7, 48, dtype=torch.int8)},
            "weight must be float32, bfloat16, float16 or float64, got torch.int8",
        ),
        ({"weight": torch.zeros(7, 48, device="meta")}, "weight must be on cpu as the input is, got one on meta"),
        ({"bias": torch.zeros(6)}, "bias must be [7], got [6]"),
        ({"impl": "cuda"}, "tubelet_embed has no implementation 'cuda'; it has native, triton, reference"),
    ],
)
def test_bad_arguments_of_embed(change, message, one_sentence):
    arguments = {"pixels": random_pixels(shape=(1, 1, 8, 8, 3)), "weight": torch.zeros(7, 48), "tubelet": (1, 4)}
    with pytest.raises(InputError) as error:
        tubelet_embed(**arguments | change)
    one_sentence(error.value, message)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_rows_of_no_float_are_refused(dtype, one_sentence):
    with pytest.raises(InputError) as error:
        tubelet_gather(random_pixels(), tubelet=(1, 4), dtype=dtype)
    one_sentence(error.value, "dtype must be float32, bfloat16, float16 or float64", str(dtype))


@pytest.mark.parametrize(
    ("shape", "dtype", "options", "message"),
    [
        ((1, 8, 8, 3), torch.uint8, {}, "pixels must be [B, T, H, W, 3], got [1, 8, 8, 3]"),
        ((1, 3, 1, 8, 8), torch.uint8, {}, "pixels must be [B, T, H, W, 3], got [1, 3, 1, 8, 8]"),
        ((1, 1, 8, 8, 3), torch.int32, {}, "pixels must be uint8 or floating point, got torch.int32"),
        ((1, 1, 0, 8, 3), torch.uint8, {}, "at least one frame, row and column, got [1, 1, 0, 8, 3]"),
        ((1, 1, 8, 8, 3), torch.uint8, {"pad": "wrap"}, "pad must be 'edge' or 'zero', got 'wrap'"),
        (
            (1, 1, 8, 8, 3),
            torch.uint8,
            {"tubelet": (0, 4)},
            "tubelet must be (frames, pixels), integers of at least 1, got (0, 4)",
        ),
        ((1, 1, 8, 8, 3), torch.uint8, {"impl": "cuda"}, "no implementation 'cuda'; it has native, triton, reference"),
    ],
)
def test_bad_arguments(shape, dtype, options, message, one_sentence):
    with pytest.raises(InputError) as error:
        tubelet_gather(torch.zeros(shape, dtype=dtype), **({"tubelet": (1, 4)} | options))
    one_sentence(error.value, message)
