"""The compiled tubelet gather against the plain expression, bit for bit, on every instruction set of this machine."""

from __future__ import annotations

import itertools
import math
import mmap
import os
import subprocess
import sys
import threading

import pytest
import torch

from vitok import _native

_C = _native.library()

if _C is None:
    pytest.skip(f"no native library: {_native.reason()}", allow_module_level=True)

SOURCES = (torch.uint8, torch.float32, torch.bfloat16, torch.float16)
TARGETS = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = [(source, target) for source in SOURCES for target in TARGETS] + [(torch.float64, torch.float64)]
SCALE, SHIFT = 2 / 255, -1.0


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def native(pixels, q, p, pad_zero, dtype, scale=SCALE, shift=SHIFT):
    """The kernel's result between two guard bands that it must leave alone, in memory poisoned with NaN."""
    b, t, h, w, _ = pixels.shape
    rows, width = math.ceil(t / q) * math.ceil(h / p) * math.ceil(w / p), q * p * p * 3
    memory = torch.full((b * rows * width + 128,), math.nan, dtype=dtype)
    out = memory[64:-64]
    _C.tubelet_gather_cpu(
        pixels.data_ptr(), name(pixels.dtype), (b, t, h, w), pixels.stride(), q, p, pad_zero,
        out.data_ptr(), name(dtype), scale, shift,
    )  # fmt: skip
    assert memory[:64].isnan().all() and memory[-64:].isnan().all()
    return out.view(b, rows, width)


def expression(pixels, q, p, pad_zero, dtype, scale=SCALE, shift=SHIFT):
    """The same by indexing and whole-tensor arithmetic."""
    b, t, h, w, _ = pixels.shape
    lt, ly, lx = math.ceil(t / q), math.ceil(h / p), math.ceil(w / p)
    it, iy, ix = torch.arange(lt * q), torch.arange(ly * p), torch.arange(lx * p)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    values = pixels.to(compute)[:, it.clamp(max=t - 1)][:, :, iy.clamp(max=h - 1)][:, :, :, ix.clamp(max=w - 1)]
    values = values * scale + shift
    if pad_zero:
        inside = (it < t)[:, None, None] & (iy < h)[None, :, None] & (ix < w)[None, None, :]
        values = torch.where(inside[None, ..., None], values, torch.zeros((), dtype=compute))
    values = values.view(b, lt, q, ly, p, lx, p, 3).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return values.reshape(b, lt * ly * lx, q * p * p * 3).to(dtype)


def random_pixels(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=dtype, generator=generator)
    return (torch.rand(shape, dtype=torch.float64, generator=generator) * 2 - 1).to(dtype)


def assert_same_bits(actual, expected):
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[actual.element_size()]
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert torch.equal(actual.contiguous().view(kind), expected.contiguous().view(kind))


LAYOUTS = {
    "channels_last": lambda x: x,
    "channels_first": lambda x: x.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1),
    "channels_before_width": lambda x: x.transpose(3, 4).contiguous().transpose(3, 4),
    "window_of_rgba": lambda x: torch.nn.functional.pad(x, (0, 1, 1, 2, 3, 1))[:, :, 3:-1, 1:-2, :3],
    "grey_broadcast": lambda x: x[..., :1].expand_as(x),
    "still_broadcast": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda d: name(d))
def test_bits_of_every_dtype_pair_and_layout(isa, source, target, layout):
    pixels = LAYOUTS[layout](random_pixels((2, 3, 19, 37, 3), source))
    for pad_zero in (False, True):
        assert_same_bits(native(pixels, 2, 8, pad_zero, target), expression(pixels, 2, 8, pad_zero, target))


@pytest.mark.parametrize(("q", "p"), [(1, 16), (4, 8), (1, 8), (2, 3), (1, 1), (3, 5)])
@pytest.mark.parametrize(
    "size", [(1, 1, 1), (1, 16, 16), (4, 32, 48), (5, 17, 33), (3, 7, 9), (1, 1, 300), (1, 300, 1)]
)
def test_bits_of_every_size_and_tubelet(isa, q, p, size):
    for layout in ("channels_last", "channels_first"):
        pixels = LAYOUTS[layout](random_pixels((1, *size, 3), torch.uint8, seed=p))
        for pad_zero in (False, True):
            actual = native(pixels, q, p, pad_zero, torch.bfloat16)
            assert_same_bits(actual, expression(pixels, q, p, pad_zero, torch.bfloat16))


def test_the_largest_patch(isa):
    pixels = LAYOUTS["channels_first"](random_pixels((1, 1, 9, 270, 3), torch.float32))
    assert_same_bits(native(pixels, 1, 256, True, torch.float16), expression(pixels, 1, 256, True, torch.float16))


@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
def test_threads_and_long_rows(isa, layout):
    """Rows of several stretches and enough work for the parallel path, with any number of threads."""
    pixels = LAYOUTS[layout](random_pixels((2, 2, 50, 1000, 3), torch.uint8))
    expected = expression(pixels, 2, 16, False, torch.float32)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_same_bits(native(pixels, 2, 16, False, torch.float32), expected)
    finally:
        torch.set_num_threads(threads)


# Where rounding and widening go wrong first: ties, subnormals, overflow to infinity, signed zero, both infinities.
EDGES = [
    0.0, -0.0, 1.0, -1.0, 65504.0, 65519.996, 65520.0, -65520.0, 1e5, 3.4e38, -3.4e38, math.inf, -math.inf,
    2.0**-14, 2.0**-15, 2.0**-24, 2.0**-25, 3 * 2.0**-25, 2.0**-26, 1.5 * 2.0**-24, 2.0**-126, 2.0**-130, 2.0**-149,
    1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-11 + 2.0**-23, 6.1e-5, 6.097e-5, 1e-40,
]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS, ids=name)
@pytest.mark.parametrize("source", SOURCES[1:], ids=name)
def test_rounding_at_the_edges(isa, source, target):
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31 - 1, (3 * 16 * 16 * 8 - 2 * len(EDGES),), generator=generator)
    anything = bits.to(torch.int32).view(torch.float32)
    edges = torch.tensor(EDGES)
    values = torch.cat([edges, -edges, torch.where(anything.isnan(), 1.0, anything)])
    pixels = values.to(source).view(1, 1, 16, 128, 3)
    # Scaling by 1 and shifting by -0 leaves every value as it is, the sign of zero too.
    actual = native(pixels, 1, 16, False, target, 1.0, -0.0)
    assert_same_bits(actual, expression(pixels, 1, 16, False, target, 1.0, -0.0))


@pytest.mark.parametrize("target", TARGETS, ids=name)
@pytest.mark.parametrize("source", SOURCES[1:], ids=name)
def test_nan_stays_nan(isa, source, target):
    pixels = torch.zeros(1, 1, 16, 32, 3, dtype=source)
    pixels[0, 0, 3, 5, 1] = math.nan
    out = native(pixels, 1, 16, False, target)
    assert torch.equal(out.isnan(), expression(pixels, 1, 16, False, target).isnan())


def test_no_fma_contraction(isa):
    """Scales whose product does not fit fp32: one rounding instead of two would change bits."""
    pixels = random_pixels((1, 1, 64, 64, 3), torch.float32)
    for scale, shift in [(1 / 3, -0.1), (2 / 255, -1.0), (1 / 0.229, -0.485 / 0.229)]:
        assert_same_bits(native(pixels, 1, 16, False, torch.float32, scale, shift),
                         expression(pixels, 1, 16, False, torch.float32, scale, shift))  # fmt: skip
        fused = pixels.double() * torch.tensor(scale).double() + torch.tensor(shift).double()
        plain = pixels * scale + shift
        assert not torch.equal(fused.float(), plain), "the case cannot tell the two apart"


def test_ten_runs_give_the_same_bits(isa):
    pixels = random_pixels((1, 2, 100, 333, 3), torch.uint8)
    first = native(pixels, 1, 16, False, torch.bfloat16)
    for _ in range(9):
        assert_same_bits(native(pixels, 1, 16, False, torch.bfloat16), first)


def test_concurrent_calls_from_python_threads():
    pixels = random_pixels((1, 1, 256, 256, 3), torch.uint8)
    expected = expression(pixels, 1, 16, False, torch.bfloat16)
    same = []

    def work():
        for _ in range(5):
            same.append(torch.equal(native(pixels, 1, 16, False, torch.bfloat16), expected))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(same) == 15 and all(same)


def test_empty_batch_touches_nothing():
    _C.tubelet_gather_cpu(0, "uint8", (0, 1, 8, 8), (0, 0, 0, 0, 0), 1, 8, False, 0, "float32", 1.0, 0.0)


def test_addresses_past_int32(isa):
    """Two frames 3 GB apart: address space only, of which a few pages are ever touched."""
    stride = 3 * 2**30
    memory = torch.frombuffer(mmap.mmap(-1, stride + 192), dtype=torch.uint8)
    pixels = memory.as_strided((1, 2, 8, 8, 3), (0, stride, 24, 3, 1))
    pixels.copy_(random_pixels((1, 2, 8, 8, 3), torch.uint8))
    assert_same_bits(native(pixels, 2, 8, False, torch.float32), expression(pixels, 2, 8, False, torch.float32))


VALID = {
    "src": 1, "src_dtype": "uint8", "sizes": (1, 1, 8, 8), "strides": (192, 192, 24, 3, 1), "q": 1, "p": 8,
    "pad_zero": False, "dst": 1, "dst_dtype": "float32", "scale": 1.0, "shift": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"src_dtype": "int32"}, "src_dtype is 'int32'; it must be uint8"),
        ({"dst_dtype": "uint8"}, "dst_dtype is 'uint8'; it must be a float type"),
        ({"dst_dtype": "float64"}, "float64 is supported from float64 to float64 only"),
        ({"src_dtype": "float64"}, "float64 is supported from float64 to float64 only"),
        ({"sizes": (1, 0, 8, 8)}, "sizes must be"),
        ({"sizes": (-1, 1, 8, 8)}, "sizes must be"),
        ({"strides": (192, 192, -24, 3, 1)}, "strides must not be negative"),
        ({"q": 0}, "q must be at least 1"),
        ({"p": 0}, "p must be from 1 to 256"),
        ({"p": 257}, "p must be from 1 to 256"),
        ({"src": 0}, "must not be null"),
        ({"dst": 0}, "must not be null"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        _C.tubelet_gather_cpu(**VALID | change)
    if hasattr(_C, "tubelet_gather_cuda"):
        with pytest.raises(ValueError, match=message):
            _C.tubelet_gather_cuda(**VALID | change, stream=0)


def test_unknown_level_is_refused_and_changes_nothing(usable_isas):
    assert usable_isas[0] == "baseline"
    before = _C.cpu_isa()
    with pytest.raises(ValueError, match="level is 'sse9'; this build on this machine offers: baseline"):
        _C.set_cpu_isa("sse9")
    assert _C.cpu_isa() == before


@pytest.mark.skipif(not hasattr(_C, "tubelet_gather_cuda"), reason="built without CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the error of a machine without a GPU")
def test_cuda_without_a_gpu_is_a_clear_error():
    with pytest.raises(RuntimeError, match=r"tubelet_gather: no CUDA device: .+"):
        _C.tubelet_gather_cuda(**VALID, stream=0)


@pytest.mark.gpu
@pytest.mark.skipif(not hasattr(_C, "tubelet_gather_cuda"), reason="built without CUDA")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_bits(layout):
    tubelets = [(2, 8, (3, 19, 37)), (1, 16, (1, 64, 64)), (1, 32, (1, 64, 96)), (2, 3, (2, 7, 9)), (1, 8, (1, 8, 8))]
    for (source, target), (q, p, size), pad_zero in itertools.product(PAIRS, tubelets, (False, True)):
        pixels = LAYOUTS[layout](random_pixels((2, *size, 3), source).cuda())
        expected = expression(pixels.cpu(), q, p, pad_zero, target)
        out = torch.full_like(expected, math.nan, device="cuda")
        _C.tubelet_gather_cuda(
            pixels.data_ptr(), name(source), pixels.shape[:4], pixels.stride(), q, p, pad_zero, out.data_ptr(),
            name(target), SCALE, SHIFT, torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
        assert_same_bits(out.cpu(), expected)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)


def test_switched_off_at_run_time():
    code = "from vitok import _native; print(_native.library(), '|', _native.reason())"
    result = run_python(code, VITOK_NATIVE="off")
    assert result.stdout.strip() == "None | VITOK_NATIVE=off in the environment", result.stderr


def test_level_from_the_environment():
    code = "from vitok import _native; print(_native.library() and _native.library().cpu_isa(), '|', _native.reason())"
    assert run_python(code, VITOK_CPU_ISA="baseline").stdout.strip() == "baseline |"
    missing = run_python(code, VITOK_CPU_ISA="sse9").stdout.strip()
    assert missing.startswith("None | vitok/_C does not load: ") and "VITOK_CPU_ISA is 'sse9'" in missing


def test_build_facts_agree_with_the_library():
    facts = _native.build_facts()
    assert facts["native"] is True
    assert facts["cpu_isas"] == _C.cpu_isas()
    assert facts["cuda_archs"] == _C.cuda_archs()
    assert facts["cuda"] is bool(_C.cuda_archs()) is hasattr(_C, "tubelet_gather_cuda")
    assert bool(facts["cuda_reason"]) is not facts["cuda"]
    assert facts["commit"] and facts["compiler"] and "-ffp-contract=off" in facts["flags"]
