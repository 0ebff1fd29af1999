"""norm and add_norm against their formulas in float64: every implementation, layout, dtype and instruction set."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitok import InputError, _native
from vitok.ops import _triton, add_norm, norm
from vitok.ops._registry import OPS, ImplementationError

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
KINDS = ["layer", "rms"]
NARROW = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5

needs_native = pytest.mark.skipif(_native.library() is None, reason=f"no native library: {_native.reason()}")
no_triton = _triton.MISSING or _triton.refuses(torch.empty(0, device=DEVICES[-1]))
needs_triton = pytest.mark.skipif(bool(no_triton), reason=f"no Triton: {no_triton}")
impls = pytest.mark.parametrize(
    "impl", ["reference", pytest.param("native", marks=needs_native), pytest.param("triton", marks=needs_triton)]
)
fused = pytest.mark.parametrize(
    "impl", [pytest.param("native", marks=needs_native), pytest.param("triton", marks=needs_triton)]
)

# Views of a contiguous [rows, width] tensor's values: read in place, or (the last two) copied.
LAYOUTS = {
    "plain": lambda x: x,
    "columns_of_a_wider_one": lambda x: torch.nn.functional.pad(x, (3, 5))[:, 3:-5],
    "every_second_row": lambda x: x.repeat_interleave(2, 0)[::2],
    "one_row_repeated": lambda x: x[:1].expand(len(x), -1),
    "one_column_repeated": lambda x: x[:, :1].expand(-1, x.shape[1]),
    "transposed": lambda x: x.T.contiguous().T,
}


def formula(x, weight, bias, kind, eps):
    centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    y = centred / (centred**2).mean(-1, keepdim=True).add(eps).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def device_of(impl):
    return "cuda" if impl == "triton" and "cuda" in DEVICES else "cpu"


def dtypes_of(impl):
    """The interpreter of Triton is slow, and stands in for the GPU in float32 and float16."""
    return [torch.float32, torch.float16] if impl == "triton" and "cuda" not in DEVICES else NARROW


def tensors(rows, width, dtype, parameter_dtype=None, layout="plain", device="cpu"):
    """x, residual, scale, weight, bias, and gradients of y and s."""
    wide = [LAYOUTS[layout]((torch.randn(rows, width) + 0.5).to(device, dtype)) for _ in range(4)]
    thin = [(torch.randn(width) + 0.5).to(device, parameter_dtype or dtype) for _ in range(3)]
    return [*wide[:2], *thin], wide[2:]


def outcome(inputs, gradients, kind, impl, plain=False, dtype=None):
    """Outputs and all gradients of add_norm, or of a plain norm of x; in another dtype if one is given."""
    x, residual, scale, weight, bias = (
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs
    )
    gradients = [g.to(dtype or g.dtype) for g in gradients]
    if plain:
        outputs, leaves = [norm(x, weight, bias, kind=kind, eps=EPS, impl=impl)], [x, weight, bias]
    else:
        outputs = list(add_norm(x, residual, weight, bias, kind=kind, eps=EPS, scale=scale, impl=impl))
        leaves = [x, residual, scale, weight, bias]
    leaves = [leaf for leaf in leaves if leaf is not None]
    return [t.detach() for t in outputs] + list(torch.autograd.grad(outputs, leaves, gradients[: len(outputs)]))


def check(judge, inputs, gradients, kind, impl, plain=False):
    actual, baseline = (outcome(inputs, gradients, kind, i, plain) for i in (impl, "reference"))
    oracle = outcome(inputs, gradients, kind, "reference", plain, torch.float64)
    for ours, theirs, exact in zip(actual, baseline, oracle, strict=True):
        if exact.dtype == ours.dtype:  # the baseline is the oracle
            torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-11)
        else:
            judge(ours, theirs, exact)


@impls
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 72, 768, 2050])
@pytest.mark.parametrize("affine", ["none", "weight", "both", "bias"])
def test_formula(impl, kind, width, affine):
    dtype = torch.float32 if impl == "triton" else torch.float64
    x = torch.randn(3, 5, width, dtype=dtype) * 3 + 1
    weight = torch.randn(width, dtype=dtype) if affine in ("weight", "both") else None
    bias = torch.randn(width, dtype=dtype) if affine in ("both", "bias") else None
    device = device_of(impl)
    moved = [None if t is None else t.to(device) for t in (x, weight, bias)]
    actual = norm(*moved, kind=kind, eps=EPS, impl=impl).cpu()
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(actual, formula(x, weight, bias, kind, EPS), rtol=tolerance, atol=tolerance)


@needs_native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [*NARROW, torch.float64], ids=str)
def test_native_on_every_instruction_set(isa, kind, dtype, judge):
    for rows, width in [(1, 1), (3, 15), (5, 16), (2, 17), (9, 64), (130, 40), (37, 768), (2, 2050), (5, 3075)]:
        check(judge, *tensors(rows, width, dtype), kind, "native")
    check(judge, *tensors(6, 72, dtype), kind, "native", plain=True)


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
def test_triton(kind, judge):
    """Narrow rows, as many as a tile has and more, in several blocks; and widths that are no power of two."""
    for dtype in dtypes_of("triton"):
        for rows, width in [(1, 1), (16, 64), (65, 64), (2, 768), (1, 3075)]:
            check(judge, *tensors(rows, width, dtype, device=device_of("triton")), kind, "triton")
        check(judge, *tensors(6, 72, dtype, device=device_of("triton")), kind, "triton", plain=True)


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")
@fused
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_on_a_gpu(impl, kind, dtype, judge):
    sizes = [(1, 1), (300, 64), (1000, 768), (1001, 1024), (77, 1025), (50, 2050), (33, 3075), (9, 4096)]
    for rows, width in sizes:
        check(judge, *tensors(rows, width, dtype, device="cuda"), kind, impl)
        check(judge, *tensors(rows, width, dtype, torch.float32, device="cuda"), kind, impl, plain=True)


@fused
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_layouts_of_inputs_and_gradients(impl, kind, layout, judge):
    dtype = torch.float16 if impl == "triton" else torch.bfloat16
    inputs, gradients = tensors(5, 48, dtype, layout=layout, device=device_of(impl))
    check(judge, inputs, gradients, kind, impl)
    strided, _ = tensors(5, 48, dtype, layout=layout, device=device_of(impl))
    check(judge, strided, [g.contiguous() for g in gradients], kind, impl, plain=True)


@fused
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("absent", [[2], [3], [4], [3, 4], [2, 3, 4]], ids=str)
def test_absent_parameters(impl, kind, absent, judge):
    inputs, gradients = tensors(7, 40, torch.float32, device=device_of(impl))
    for index in absent:
        inputs[index] = None
    check(judge, inputs, gradients, kind, impl)


@fused
@pytest.mark.parametrize("kind", KINDS)
def test_wide_parameters_beside_narrow_rows(impl, kind, judge):
    """As mixed precision gives them; and of two dtypes at once."""
    dtype = dtypes_of(impl)[-1]
    inputs, gradients = tensors(9, 72, dtype, torch.float32, device=device_of(impl))
    check(judge, inputs, gradients, kind, impl)
    check(judge, [*inputs[:4], inputs[4].to(dtype)], gradients, kind, impl)
    y, s = add_norm(*inputs[:2], *inputs[3:], kind=kind, eps=EPS, scale=inputs[2], impl=impl)
    assert y.dtype == s.dtype == dtype


@impls
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_leaves_the_dtype_alone(impl, kind):
    (x, residual, _, weight, bias), _ = tensors(4, 24, torch.bfloat16, torch.float32)
    device = device_of(impl)
    if impl == "triton" and device == "cpu":
        pytest.skip("the interpreter does not stand in for bfloat16")
    x, residual, weight, bias = (t.to(device).requires_grad_() for t in (x, residual, weight, bias))
    with torch.autocast(device, torch.bfloat16):
        y, s = add_norm(x, residual, weight, bias, kind=kind, eps=EPS, impl=impl)
        z = norm(x, weight, bias, kind=kind, eps=EPS, impl=impl)
    assert y.dtype == s.dtype == z.dtype == torch.bfloat16
    (y.float().sum() + s.float().sum() + z.float().sum()).backward()
    assert weight.grad.dtype == torch.float32 and x.grad.dtype == torch.bfloat16


@impls
def test_a_wider_residual_stream_stays_wide(impl):
    (x, residual, scale, weight, bias), _ = tensors(4, 24, torch.float16, torch.float32, device=device_of(impl))
    y, s = add_norm(x, residual.float(), weight, bias, kind="rms", eps=EPS, scale=scale, impl=impl)
    assert y.dtype == s.dtype == torch.float32
    torch.testing.assert_close(s, residual.float() + x.float() * scale, rtol=1e-6, atol=1e-6)


@impls
@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_is_rounded_before_it_is_normalised(impl, kind):
    for dtype in dtypes_of(impl):
        (x, residual, _, weight, bias), _ = tensors(5, 72, dtype, device=device_of(impl))
        y, s = add_norm(x, residual, weight, bias, kind=kind, eps=EPS, impl=impl)
        assert torch.equal(s, x + residual)
        assert torch.equal(y, norm(s, weight, bias, kind=kind, eps=EPS, impl=impl))


@fused
@pytest.mark.parametrize("kind", KINDS)
def test_one_output_alone_and_some_gradients_alone(impl, kind, judge):
    inputs, (grad_y, grad_s) = tensors(6, 24, torch.float32, device=device_of(impl))
    zeros = torch.zeros_like(grad_y)
    for used, gradients in [(0, (grad_y, zeros)), (1, (zeros, grad_s))]:
        leaves = [t.detach().requires_grad_() for t in inputs]
        x, residual, scale, weight, bias = leaves
        output = add_norm(x, residual, weight, bias, kind=kind, eps=EPS, scale=scale, impl=impl)[used]
        found = torch.autograd.grad(output, leaves, gradients[used])
        exact = outcome(inputs, gradients, kind, "reference", dtype=torch.float64)[2:]
        near = outcome(inputs, gradients, kind, "reference")[2:]
        for arguments in zip(found, near, exact, strict=True):
            judge(*arguments)
    everything = outcome(inputs, (grad_y, grad_s), kind, impl)[2:]
    for wanted in range(5):
        leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(inputs)]
        x, residual, scale, weight, bias = leaves
        outputs = add_norm(x, residual, weight, bias, kind=kind, eps=EPS, scale=scale, impl=impl)
        (found,) = torch.autograd.grad(outputs, leaves[wanted], (grad_y, grad_s))
        assert torch.equal(found, everything[wanted])


@pytest.mark.parametrize("impl", ["reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(impl, kind):
    inputs = [t.double().requires_grad_() for t in tensors(3, 6, torch.float64)[0]]

    def both(x, residual, scale, weight, bias):
        return add_norm(x, residual, weight, bias, kind=kind, eps=EPS, scale=scale, impl=impl)

    assert torch.autograd.gradcheck(both, inputs)
    assert torch.autograd.gradcheck(lambda x, w, b: norm(x, w, b, kind=kind, eps=EPS, impl=impl), inputs[2:3] * 3)
    assert torch.autograd.gradcheck(lambda x, w: norm(x, w, kind=kind, eps=EPS, impl=impl), [inputs[0], inputs[3]])


@impls
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows(impl, kind, shape):
    device = device_of(impl)
    x, residual = (torch.ones(shape, device=device, requires_grad=True) for _ in range(2))
    weight = torch.ones(8, device=device, requires_grad=True)
    y, s = add_norm(x, residual, weight, kind=kind, eps=EPS, impl=impl)
    assert y.shape == s.shape == shape
    (y.sum() + s.sum() + norm(x, weight, kind=kind, eps=EPS, impl=impl).sum()).backward()
    assert x.grad.shape == shape and torch.equal(weight.grad, torch.zeros(8, device=device))


@needs_native
@pytest.mark.parametrize("kind", KINDS)
def test_native_bits_depend_neither_on_the_run_nor_on_the_threads(kind):
    inputs, gradients = tensors(300, 200, torch.bfloat16)
    first = outcome(inputs, gradients, kind, "native")
    threads = torch.get_num_threads()
    try:
        for count in [1] * 5 + [2, 3, 4, 2, 3]:
            torch.set_num_threads(count)
            again = outcome(inputs, gradients, kind, "native")
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(threads)


@fused
def test_gradients_given_are_not_written_to(impl):
    inputs, gradients = tensors(5, 24, torch.float32, device=device_of(impl))
    before = [t.clone() for t in (*inputs, *gradients)]
    outcome(inputs, gradients, "layer", impl)
    assert all(torch.equal(a, b) for a, b in zip((*inputs, *gradients), before, strict=True))


@impls
def test_large_offsets_cancel_in_the_variance(impl):
    """A row far from zero: the variance is taken of the distances from the mean, not of squares that nearly cancel."""
    x = (torch.randn(4, 768) + 1000).to(device_of(impl))
    actual = norm(x, None, kind="layer", eps=0.0, impl=impl)
    torch.testing.assert_close(actual.double(), formula(x.double(), None, None, "layer", 0.0), rtol=1e-3, atol=1e-3)


@impls
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_in_its_row(impl, kind):
    x = torch.randn(3, 40)
    x[1, 7] = float("nan")
    actual = norm(x.to(device_of(impl)), None, kind=kind, eps=EPS, impl=impl).cpu()
    assert actual[1].isnan().all() and actual[[0, 2]].isfinite().all()


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-3, 1e3), st.integers(0, 2**32), st.integers(1, 70))
def test_rms_norm_does_not_see_scale(scale, seed, width):
    x = torch.randn(4, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    scaled = norm(scale * x, None, kind="rms", eps=0.0)
    torch.testing.assert_close(scaled, norm(x, None, kind="rms", eps=0.0), rtol=1e-12, atol=1e-12)
    squares = norm(x, None, kind="rms", eps=0.0).square().mean(-1)
    torch.testing.assert_close(squares, torch.ones_like(squares), rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(-10, 10), st.integers(0, 2**32))
def test_layer_norm_sees_neither_scale_nor_shift(scale, shift, seed):
    x = torch.randn(4, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    moved = norm(scale * (x + shift), None, kind="layer", eps=0.0)
    torch.testing.assert_close(moved, norm(x, None, kind="layer", eps=0.0), rtol=1e-10, atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(KINDS), st.sampled_from([17, 48, 100]))
def test_a_row_does_not_see_its_batch(seed, kind, width):
    generator = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(7, width, generator=generator).bfloat16() for _ in range(2))
    together = add_norm(x, residual, None, kind=kind, eps=EPS)
    for row in (0, 3, 6):
        alone = add_norm(x[row], residual[row], None, kind=kind, eps=EPS)
        assert all(torch.equal(a[row], b) for a, b in zip(together, alone, strict=True))


@fused
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(impl, kind):
    inputs, (grad_y, grad_s) = tensors(5, 24, torch.float32, layout="columns_of_a_wider_one", device=device_of(impl))
    x, residual, scale, weight, bias = inputs
    centred = kind == "layer"
    checks = ["test_schema", "test_faketensor"]
    for arguments in [(x, residual, scale, weight, bias), (x, None, None, weight, None)]:
        for save in (False, True):
            call = (impl, *arguments, centred, EPS, save)
            torch.library.opcheck(torch.ops.vitok.norm_forward, call, test_utils=checks)
    stats = torch.rand(1 + centred, 5, device=x.device) + 0.5
    for arguments in [(grad_y, grad_s, residual, x, scale, weight), (grad_y, None, x, None, None, weight)]:
        for wanted in ([True, True, arguments[3] is not None], [False] * 3):
            call = (impl, *arguments, stats, centred, wanted)
            torch.library.opcheck(torch.ops.vitok.norm_backward, call, test_utils=checks)


@pytest.mark.parametrize(("impl", "kind"), [("auto", "layer"), pytest.param("native", "rms", marks=needs_native)])
def test_compiles_whole_with_one_graph_for_many_sizes(impl, kind):
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def step(x, residual, weight, bias, scale):
        # eps as a constant: dynamic=True takes a variable for symbolic at first, and compiles again when that fails
        y, s = add_norm(x, residual, weight, bias, kind=kind, eps=1e-5, scale=scale, impl=impl)
        return norm(y, weight, kind=kind, eps=1e-5, impl=impl) + s

    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=True)
    for batch, length in [(2, 5), (3, 7), (6, 11)]:  # no two sizes alike, or they are taken for one
        results = []
        for function in (compiled, step):
            torch.manual_seed(0)
            leaves = [torch.randn(batch, length, 24).requires_grad_() for _ in range(2)]
            leaves += [torch.randn(24).requires_grad_() for _ in range(3)]
            output = function(*leaves)
            results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1


@pytest.mark.skipif(_native.library() is not None, reason="the native library is there")
def test_native_by_name_says_why_it_is_absent(one_sentence):
    with pytest.raises(ImplementationError) as error:
        norm(torch.ones(2, 4), None, kind="rms", eps=EPS, impl="native")
    one_sentence(error.value, "'native'", _native.reason())


@needs_triton
@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.ones(2, 4, dtype=torch.float64), "it computes in float32"),
        (torch.ones(2, 4097), "rows have at most 4096 elements, got 4097"),
    ],
    ids=["float64", "wide"],
)
def test_triton_by_name_never_falls_back(x, reason, one_sentence):
    with pytest.raises(ImplementationError) as error:
        norm(x, None, kind="rms", eps=EPS, impl="triton")
    one_sentence(error.value, "'triton'", reason)
    assert norm(x, None, kind="rms", eps=EPS).shape == x.shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "batch"}, "kind must be 'layer' or 'rms', got 'batch'"),
        ({"eps": -1.0}, "eps must be a finite number of at least 0, got -1.0"),
        ({"eps": float("nan")}, "eps must be a finite number of at least 0, got nan"),
        ({"x": torch.ones(())}, "x must be [..., width] with width at least 1, got []"),
        ({"x": torch.ones(2, 0)}, "x must be [..., width] with width at least 1, got [2, 0]"),
        (
            {"x": torch.ones(2, 4, dtype=torch.int32)},
            "x must be float32, bfloat16, float16 or float64, got torch.int32",
        ),
        ({"weight": torch.ones(5)}, "weight must be [width] = [4], got [5]"),
        ({"weight": torch.ones(1, 4)}, "weight must be [width] = [4], got [1, 4]"),
        (
            {"bias": torch.ones(4, dtype=torch.int64)},
            "bias must be float32, bfloat16, float16 or float64, got torch.int64",
        ),
        ({"bias": torch.ones(4, device="meta")}, "bias must be on the device of x, cpu, got meta"),
        ({"scale": torch.ones(3)}, "scale must be [width] = [4], got [3]"),
        ({"residual": torch.ones(1, 4)}, "residual must have the shape of x, [2, 4], got [1, 4]"),
        (
            {"residual": torch.ones(2, 4, dtype=torch.int8)},
            "residual must be float32, bfloat16, float16 or float64, got torch.int8",
        ),
        ({"residual": torch.ones(2, 4, device="meta")}, "residual must be on the device of x, cpu, got meta"),
        ({"impl": "cuda"}, "no implementation 'cuda'; it has native, triton, reference"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments(arguments, message, one_sentence):
    good = {"x": torch.ones(2, 4), "residual": torch.ones(2, 4), "weight": torch.ones(4), "kind": "rms", "eps": EPS}
    with pytest.raises(InputError) as error:
        add_norm(**good | arguments)
    one_sentence(error.value, message)
    if not {"residual", "scale"} & arguments.keys():
        with pytest.raises(InputError) as error:
            norm(**{name: value for name, value in (good | arguments).items() if name != "residual"})
        one_sentence(error.value, message)


@needs_native
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"dtype": "uint8"}, "dtype is 'uint8'"),
        ({"dtype": "float64"}, "parameter_dtype must be that of the rows"),
        ({"rows": -1}, "rows must not be negative"),
        ({"width": 0}, "width must be at least 1"),
        ({"rows": 2**40, "width": 2**40}, "rows * width elements are beyond 64-bit addresses"),
        ({"x_stride": -1}, "x_stride must not be negative"),
        ({"rows": 2**20, "x_stride": 2**50}, "x_stride must not be negative nor lead beyond 64-bit addresses"),
        ({"eps": -1.0}, "eps must not be negative"),
        ({"scale": 8}, "scale goes with a residual only"),
        ({"y": 0}, "must not be null"),
    ],
    ids=str,
)
def test_the_library_refuses_what_it_can_tell(change, problem):
    arguments = {
        "x": 8, "x_stride": 4, "residual": 0, "residual_stride": 0, "scale": 0, "weight": 0, "bias": 0,
        "dtype": "float32", "parameter_dtype": "float32", "rows": 2, "width": 4, "centred": True, "eps": 0.0,
        "s": 0, "y": 8, "stats": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match="norm_forward: ") as error:
        _native.library().norm_forward_cpu(**arguments | change)
    assert problem in str(error.value)


def test_every_implementation_is_listed():
    for name, order in itertools.product(("norm", "add_norm"), [["native", "triton", "reference"]]):
        assert list(OPS[name].implementations) == order
