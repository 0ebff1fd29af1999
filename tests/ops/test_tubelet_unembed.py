"""tubelet_unembed against the transposed convolution that it replaces; the scatter bitwise against its reference."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from vitok import InputError, _native
from vitok.evaluate.metrics import to_uint8
from vitok.ops import _triton, tubelet_gather, tubelet_scatter, tubelet_unembed
from vitok.ops._registry import ImplementationError
from vitok.ops._tubelet import SCATTER

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
LAYOUTS = ["channels_first", "channels_last"]
needs_native = pytest.mark.skipif(_native.library() is None, reason=f"no native library: {_native.reason()}")
no_triton = _triton.MISSING or _triton.refuses(torch.empty(0, device=DEVICES[-1]))
needs_triton = pytest.mark.skipif(bool(no_triton), reason=no_triton or "Triton is there")
NATIVE, TRITON = pytest.param("native", marks=needs_native), pytest.param("triton", marks=needs_triton)
impls = pytest.mark.parametrize("impl", ["reference", NATIVE, TRITON])
kernels = pytest.mark.parametrize("impl", [NATIVE, TRITON])

TUBELETS = [(1, 4, (1, 8, 12)), (2, 4, (3, 5, 9)), (1, 8, (2, 9, 17)), (4, 3, (1, 1, 1)), (1, 1, (1, 2, 3))]


def count(q, p, size):
    return math.prod(math.ceil(n / step) for n, step in zip(size, (q, p, p), strict=True))


def random_rows(q, p, size, dtype=torch.float32, batch=2):
    return 1.5 * torch.randn(batch, count(q, p, size), q * p * p * 3).to(dtype)


ROWS = {
    "contiguous": lambda x: x,
    "tokens_apart": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "turned": lambda x: x.mT.contiguous().mT,
    "one_clip": lambda x: x[:1].expand_as(x),
    "one_value": lambda x: x[:, :1, :1].expand_as(x),
}


@impls
@pytest.mark.parametrize(("q", "p", "size"), TUBELETS)
@pytest.mark.parametrize("bias", ["none", "colour", "element"])
def test_equals_conv_transpose(impl, q, p, size, bias):
    dtype = torch.float32 if impl == "triton" else torch.float64
    grid = [-(-n // step) for n, step in zip(size, (q, p, p), strict=True)]
    tokens = torch.randn(2, grid[0] * grid[1] * grid[2], 6, dtype=dtype)
    kernel = torch.randn(6, 3, q, p, p, dtype=dtype)
    per_colour, per_element = torch.randn(3, dtype=dtype), torch.randn(q, p, p, 3, dtype=dtype)
    given = {"none": None, "colour": per_colour, "element": per_element.flatten()}[bias]
    full = torch.nn.functional.conv_transpose3d(tokens.mT.unflatten(-1, grid), kernel, stride=(q, p, p))
    if bias == "colour":
        full = full + per_colour.view(3, 1, 1, 1)
    if bias == "element":
        full = full + per_element.permute(3, 0, 1, 2).repeat(1, *grid)
    expected = full[:, :, : size[0], : size[1], : size[2]]
    weight = kernel.permute(2, 3, 4, 1, 0).flatten(0, 3)
    tolerance = 1e-5 if impl == "triton" else 1e-12
    for layout in LAYOUTS:
        actual = tubelet_unembed(tokens, weight, given, tubelet=(q, p), size=size, layout=layout, impl=impl)
        assert actual.is_contiguous()
        actual = actual if layout == "channels_first" else actual.movedim(-1, 1)
        assert actual.shape == (2, 3, *size)
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@needs_native
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_native_scatter_equals_reference_bit_for_bit(isa, dtype, rows):
    outputs = [None] if dtype == torch.float64 else [None, torch.uint8]
    for (q, p, size), out_dtype, layout in itertools.product(TUBELETS, outputs, LAYOUTS):
        x = ROWS[rows](random_rows(q, p, size, dtype))
        native, reference = (
            tubelet_scatter(x, tubelet=(q, p), size=size, out_dtype=out_dtype, layout=layout, impl=impl)
            for impl in ("native", "reference")
        )
        assert native.dtype == reference.dtype and native.is_contiguous()
        assert torch.equal(native, reference)


@needs_triton
@pytest.mark.parametrize("device", DEVICES[-1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows", ["contiguous", "turned"])
def test_triton_scatter_equals_reference_bit_for_bit(dtype, rows, device):
    for (q, p, size), out_dtype, layout in itertools.product(TUBELETS[1:3], [None, torch.uint8], LAYOUTS):
        x = ROWS[rows](random_rows(q, p, size, dtype, batch=1)).to(device)
        ours, reference = (
            tubelet_scatter(x, tubelet=(q, p), size=size, out_dtype=out_dtype, layout=layout, impl=impl)
            for impl in ("triton", "reference")
        )
        assert ours.is_contiguous() and torch.equal(ours, reference)


@impls
def test_rounding_to_bytes(impl):
    """Every tie, the values around it, and what lies outside; the bits of the expression that metrics use."""
    ties = (torch.arange(0, 512, dtype=torch.float64) / 2 / 127.5 - 1).float()
    around = torch.stack((ties, torch.nextafter(ties, ties - 9), torch.nextafter(ties, ties + 9))).flatten()
    special = torch.tensor([-1.5, 1.5, -math.inf, math.inf, 0.0, -0.0, 1e-42, 3e38])
    values = torch.cat((around, special))
    values = torch.nn.functional.pad(values, (0, -len(values) % 48)).view(1, -1, 48)
    arguments = {"tubelet": (1, 4), "size": (1, 4, 4 * values.shape[1]), "impl": impl}
    actual = tubelet_scatter(values, out_dtype=torch.uint8, **arguments)
    assert actual.dtype == torch.uint8
    assert torch.equal(actual, to_uint8(tubelet_scatter(values, **arguments)))
    nothing = tubelet_scatter(torch.full_like(values, math.nan), out_dtype=torch.uint8, **arguments)
    assert not nothing.any()


@needs_native
def test_rounding_on_every_instruction_set(isa):
    test_rounding_to_bytes("native")


@impls
def test_gather_undoes_scatter(impl):
    rows = random_rows(2, 4, (4, 8, 12))
    for layout in LAYOUTS:
        clip = tubelet_scatter(rows, tubelet=(2, 4), size=(4, 8, 12), layout=layout, impl=impl)
        clip = clip if layout == "channels_last" else clip.movedim(1, -1)
        assert torch.equal(tubelet_gather(clip, tubelet=(2, 4), impl=impl), rows)


@kernels
@pytest.mark.parametrize(
    ("q", "p", "size", "width"),
    [
        (1, 4, (1, 8, 12), 1),
        (2, 4, (3, 5, 9), 65),
        (1, 8, (2, 8, 16), 64),
        (1, 4, (1, 27, 34), 63),
        (1, 2, (1, 16, 16), 9),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_output_and_gradients(impl, q, p, size, width, dtype, judge):
    if impl == "triton" and dtype == torch.bfloat16 and DEVICES[-1] == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    device = DEVICES[-1] if impl == "triton" else "cpu"
    layout = LAYOUTS[width % 2]
    weight, bias = torch.randn(q * p * p * 3, width) / width**0.5, torch.randn(q * p * p * 3)
    inputs = [x.to(device, dtype) for x in (torch.randn(1, count(q, p, size), width), weight, bias)]
    seed = torch.randn(1, *size, 3, device=device).to(dtype)
    seed = seed if layout == "channels_last" else seed.movedim(-1, 1)  # not contiguous

    def run(impl, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = tubelet_unembed(*leaves, tubelet=(q, p), size=size, layout=layout, impl=impl)
        return [out.detach(), *torch.autograd.grad(out, leaves, seed.to(dtype))]

    for actual, baseline, oracle in zip(
        run(impl, dtype), run("reference", dtype), run("reference", torch.float64), strict=True
    ):
        judge(actual, baseline, oracle)


@needs_triton
def test_large_tiles(monkeypatch, judge):
    """The choice for many tokens, at and one beyond the edge of a block of 128."""
    from vitok.kernels import tubelet_embed
    from vitok.kernels import tubelet_unembed as kernel

    monkeypatch.setattr(kernel, "tiles", lambda *_: tubelet_embed.LARGE)
    for width in (512, 516):
        tokens, weight = (torch.randn(n, 5, device=DEVICES[-1]).half() for n in (width // 4, 48))
        out = [
            tubelet_unembed(tokens[None].to(dtype), weight.to(dtype), tubelet=(1, 4), size=(1, 3, width), impl=impl)
            for impl, dtype in (("triton", None), ("reference", None), ("reference", torch.float64))
        ]
        judge(*out)


@impls
def test_bytes_are_the_rounded_floats_and_have_no_gradient(impl):
    tokens, weight = torch.randn(2, 4, 8, requires_grad=True), (torch.randn(48, 8) / 4).requires_grad_()
    arguments = {"tubelet": (1, 4), "size": (1, 7, 8), "impl": impl}
    for layout in LAYOUTS:
        floats = tubelet_unembed(tokens, weight, layout=layout, **arguments)
        byte = tubelet_unembed(tokens, weight, layout=layout, out_dtype=torch.uint8, **arguments)
        assert byte.dtype == torch.uint8 and not byte.requires_grad and byte.is_contiguous()
        assert torch.equal(byte, to_uint8(floats.detach()))


@impls
@pytest.mark.parametrize("gradient", ["expanded", "permuted"])
def test_scatter_gradient_of_any_strides(impl, gradient):
    rows = random_rows(2, 4, (3, 5, 9)).requires_grad_()
    out = tubelet_scatter(rows, tubelet=(2, 4), size=(3, 5, 9), impl=impl)
    if gradient == "expanded":
        seed = torch.ones(1, 1, 1, 1, 1).expand_as(out)
    else:
        seed = torch.randn(2, 9, 5, 3, 3).permute(0, 3, 4, 2, 1)
    before = seed.clone()
    (actual,) = torch.autograd.grad(out, rows, seed)
    expected = tubelet_gather(seed.movedim(1, -1), tubelet=(2, 4), pad="zero", impl="reference")
    assert torch.equal(actual, expected) and torch.equal(seed, before)


@kernels
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("q", "p", "size"), TUBELETS)
def test_fold_sums_what_edge_replication_repeated(impl, q, p, size, channels_last):
    rows = random_rows(q, p, size)
    pixels = torch.zeros(2, *size, 3, dtype=torch.float64, requires_grad=True)
    copies = tubelet_gather(pixels, tubelet=(q, p), dtype=torch.float64, impl="reference")
    (expected,) = torch.autograd.grad(copies, pixels, rows.double())
    actual = SCATTER(impl, rows, q, p, size, True, torch.float32, channels_last)
    actual = actual if channels_last else actual.movedim(1, -1)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("impl", ["reference", NATIVE])
def test_gradcheck(impl):
    shapes = [(1, 4, 2), (1 * 9 * 3, 2), (27,)]
    for layout in LAYOUTS:
        tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

        def unembed(x, w, b, layout=layout):
            return tubelet_unembed(x, w, b, tubelet=(1, 3), size=(1, 4, 6), layout=layout, impl=impl)

        assert torch.autograd.gradcheck(unembed, tensors)


@impls
def test_mixed_dtypes_and_autocast(impl):
    tokens, weight, bias = torch.randn(1, 4, 8), torch.randn(48, 8, requires_grad=True), torch.randn(3)
    arguments = {"tubelet": (1, 4), "size": (1, 8, 8), "impl": impl}
    out = tubelet_unembed(tokens.half(), weight, bias, **arguments)
    assert out.dtype == torch.float16
    out.sum().backward()
    assert weight.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(tubelet_unembed(tokens, weight, bias, **arguments), out)


@impls
def test_no_clips(impl):
    for layout, shape in zip(LAYOUTS, [(0, 3, 1, 7, 7), (0, 1, 7, 7, 3)], strict=True):
        arguments = {"tubelet": (1, 4), "size": (1, 7, 7), "layout": layout, "impl": impl}
        tokens, weight = torch.zeros(0, 4, 8, requires_grad=True), torch.ones(48, 8, requires_grad=True)
        out = tubelet_unembed(tokens, weight, **arguments)
        assert out.shape == shape
        out.sum().backward()
        assert tokens.grad.shape == (0, 4, 8) and not weight.grad.any()
        assert tubelet_scatter(torch.zeros(0, 4, 48), **arguments).shape == shape


@needs_native
def test_the_same_bits_from_run_to_run_and_for_any_number_of_threads():
    rows = random_rows(2, 8, (3, 37, 67), torch.bfloat16)
    arguments = ("native", rows, 2, 8, (3, 37, 67), True, torch.bfloat16, False)
    first = SCATTER(*arguments)
    try:
        for threads in (1, 2, 3, 1, 2, 3, 1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(SCATTER(*arguments), first)
    finally:
        torch.set_num_threads(1)


@needs_native
def test_nothing_is_written_outside(isa):
    """Between two guard bands, into a clip whose rows lie apart."""
    rows, size = random_rows(1, 4, (1, 6, 7)), (1, 6, 7)
    expected = tubelet_scatter(rows, tubelet=(1, 4), size=size, layout="channels_last", impl="reference")
    memory = torch.full((2 * 6 * 40 + 128,), math.nan)
    clip = memory[64:].as_strided((2, 1, 6, 7, 3), (240, 240, 40, 3, 1))
    _native.library().tubelet_scatter_cpu(
        rows.data_ptr(), "float32", rows.stride(), 1, 4, False, clip.data_ptr(), "float32", (2, 1, 6, 7), clip.stride()
    )
    assert torch.equal(clip, expected)
    clip.fill_(math.nan)
    assert memory.isnan().all()


VALID = {
    "src": 1, "src_dtype": "float32", "src_strides": (192, 192, 1), "q": 1, "p": 8, "fold_edges": False, "dst": 1,
    "dst_dtype": "float32", "sizes": (1, 1, 8, 8), "strides": (192, 192, 24, 3, 1),
}  # fmt: skip


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"src_dtype": "uint8"}, "src_dtype is 'uint8'; it must be a float type"),
        ({"dst_dtype": "float64"}, "float64 is supported from float64 to float64 only"),
        ({"src_dtype": "float64", "dst_dtype": "uint8"}, "float64 is supported from float64 to float64 only"),
        ({"sizes": (1, 0, 8, 8)}, "sizes must be"),
        ({"src_strides": (1, 1, -1)}, "src_strides must not be negative"),
        ({"strides": (192, 192, -24, 3, 1)}, "strides must not be negative"),
        ({"q": 0}, "q must be at least 1"),
        ({"p": 257}, "p must be from 1 to 256"),
        ({"sizes": (2**40, 1, 2**20, 2**20)}, "reach beyond an address space of 64 bits"),
        ({"src_strides": (2**62, 2**62, 2**62)}, "reach beyond an address space of 64 bits"),
        ({"dst": 0}, "must not be null"),
    ],
)
def test_the_kernel_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        _native.library().tubelet_scatter_cpu(**VALID | change)


@pytest.mark.parametrize("impl", [NATIVE, TRITON])
def test_opcheck(impl):
    tokens, weight, bias = torch.randn(2, 9, 6), torch.randn(48, 6), torch.randn(48)
    for dtype, last in ((torch.float32, False), (torch.uint8, True)):
        arguments = (impl, tokens, weight, bias, 1, 4, [1, 9, 10], dtype, last)
        torch.library.opcheck(torch.ops.vitok.tubelet_unembed_forward, arguments)
        rows = random_rows(1, 4, (1, 9, 10), batch=1)
        torch.library.opcheck(torch.ops.vitok.tubelet_scatter, (impl, rows, 1, 4, [1, 9, 10], not last, dtype, last))


@pytest.mark.parametrize("out_dtype", [None, torch.uint8])
def test_compiles_whole_with_one_graph_for_many_batches(out_dtype):
    torch.compiler.reset()
    weight, graphs = torch.randn(48, 7, requires_grad=True), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def unembed(x):
        return tubelet_unembed(x, weight, tubelet=(1, 4), size=(1, 11, 10), out_dtype=out_dtype)

    compiled = torch.compile(unembed, fullgraph=True, backend=backend, dynamic=True)
    for batch in (2, 3, 5):
        tokens = torch.randn(batch, 9, 7, requires_grad=True)
        out = compiled(tokens)
        assert torch.equal(out, unembed(tokens))
        if out_dtype is None:
            out.sum().backward()
    assert len(graphs) == 1


@needs_native
def test_native_by_name_never_falls_back_and_auto_does(one_sentence):
    rows = torch.zeros(1, 1, 192, dtype=torch.float64)
    arguments = {"tubelet": (1, 8), "size": (1, 8, 8), "out_dtype": torch.uint8}
    with pytest.raises(ImplementationError) as error:
        tubelet_scatter(rows, **arguments, impl="native")
    one_sentence(error.value, "'native'", "does not convert torch.float64 to torch.uint8")
    assert tubelet_scatter(rows, **arguments).unique().tolist() == [128]


@pytest.mark.skipif(_native.library() is not None, reason="the native library is there")
def test_native_by_name_says_why_it_is_absent(one_sentence):
    with pytest.raises(ImplementationError) as error:
        tubelet_scatter(torch.zeros(1, 1, 48), tubelet=(1, 4), size=(1, 4, 4), impl="native")
    one_sentence(error.value, "'native'", _native.reason())


@pytest.mark.parametrize(
    ("shape", "size"), [((1, 4, 8), (1, 8, 9)), ((1, 4, 8), (1, 4, 8)), ((4, 8), (1, 8, 8)), ((1, 4, 8), (2, 8, 8))]
)
def test_tokens_that_do_not_fit(shape, size, one_sentence):
    with pytest.raises(InputError) as error:
        tubelet_unembed(torch.zeros(shape), torch.ones(48, 8), tubelet=(1, 4), size=size)
    one_sentence(error.value, "tokens must be [B, ", str(size), str(list(shape)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(47, 8)}, "weight must be [48, 8] for tubelet (1, 4), got [47, 8]"),
        ({"weight": torch.zeros(48, 9)}, "weight must be [48, 8] for tubelet (1, 4), got [48, 9]"),
        (
            {"weight": torch.zeros(48, 8, dtype=torch.int32)},
            "weight must be float32, bfloat16, float16 or float64, got torch.int32",
        ),
        ({"weight": torch.zeros(48, 8, device="meta")}, "weight must be on cpu as the input is, got one on meta"),
        ({"bias": torch.zeros(4)}, "bias must be [48], got [4]"),
        (
            {"tokens": torch.zeros(1, 4, 8, dtype=torch.int32)},
            "tokens must be float32, bfloat16, float16 or float64, got torch.int32",
        ),
        ({"tubelet": (0, 4)}, "tubelet must be (frames, pixels), integers of at least 1, got (0, 4)"),
        ({"size": (1, 0, 8)}, "size must be (T, H, W), integers of at least 1, got (1, 0, 8)"),
        ({"out_dtype": torch.int8}, "out_dtype must be None or torch.uint8, got torch.int8"),
        ({"layout": "nchw"}, "layout must be 'channels_first' or 'channels_last', got 'nchw'"),
        ({"impl": "cuda"}, "no implementation 'cuda'; it has native, triton, reference"),
    ],
)
def test_bad_arguments(change, message, one_sentence):
    arguments = {
        "tokens": torch.zeros(1, 4, 8), "weight": torch.zeros(48, 8), "tubelet": (1, 4), "size": (1, 8, 8),
    }  # fmt: skip
    with pytest.raises(InputError) as error:
        tubelet_unembed(**arguments | change)
    one_sentence(error.value, message)


def test_rows_that_do_not_fit(one_sentence):
    with pytest.raises(InputError) as error:
        tubelet_scatter(torch.zeros(1, 4, 47), tubelet=(1, 4), size=(1, 8, 8))
    one_sentence(error.value, "rows must be [B, L, 48] for tubelet (1, 4), got [1, 4, 47]")
