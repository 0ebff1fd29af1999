"""for_inference on a GPU: the model it is made of, with graphs and without, and in 8 bits."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import vitok
from vitok.evaluate.reconstruction import score_folder
from vitok.ops import dequantize, quantize_rows

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"
QUANTIZED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
quantized = pytest.mark.parametrize("quantize", QUANTIZED)


def skip_where_missing(quantize):
    if quantize == "fp8" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("fp8 products with a scale a row need compute capability 9.0")


@pytest.mark.parametrize("preset", ["paper", "v2"])
@pytest.mark.parametrize("graphs", [False, True])
def test_is_the_model(tiny, pixels, judge, preset, graphs):
    model = tiny(preset=preset).cuda()
    exact, plain = copy.deepcopy(model).double(), copy.deepcopy(model).bfloat16()
    fast = model.for_inference(graphs=graphs)
    with torch.no_grad():
        for batch in (3, 1, 3, 9):
            pictures = pixels(batch, 3, 40, 24, seed=batch)
            latents = exact.encode(pictures).mode()
            judge(fast.encode(pictures).mode().cpu(), plain.encode(pictures).mode().cpu(), latents.cpu())
            given = latents.bfloat16()
            oracle = exact.decode(given.double(), size=(36, 24))
            decoded = fast.decode(given, size=(36, 24))
            judge(decoded.cpu(), plain.decode(given, size=(36, 24)).cpu(), oracle.cpu())


def test_a_replay_leaves_earlier_results_alone(tiny, pixels):
    fast = tiny().cuda().for_inference(graphs=True)
    first = fast.encode(pixels(2, 3, 24, 24)).mode()
    kept = first.clone()
    other = fast.encode(255 - pixels(2, 3, 24, 24)).mode()
    assert torch.equal(first, kept) and not torch.equal(first, other)


def test_graphs_outlive_the_positions_they_read(tiny, pixels):
    fast = tiny().cuda().for_inference(torch.float32, graphs=True)
    pictures = pixels(1, 3, 24, 24)
    before = fast.encode(pictures).mode()
    for height in range(8, 8 * 40, 8):
        fast.encode(pixels(9, 3, height, 8))  # too many to be captured: only their positions are kept
    assert torch.equal(fast.encode(pictures).mode(), before)


@quantized
def test_eight_bits_cost_little_on_the_demo_weights(quantize):
    skip_where_missing(quantize)
    model = vitok.load("demo", device="cuda")

    def quality(model):
        def reconstruct(picture):
            return model.decode(model.encode(picture).mode()).float()

        scores = [score.psnr for score in score_folder(PHOTOS, 256, reconstruct)]
        return sum(scores) / len(scores)

    with torch.no_grad():
        assert quality(model.for_inference(quantize)) > quality(model) - 0.15


@quantized
@pytest.mark.parametrize("before", [None, "layer", "rms", "silu", "gelu"])
def test_triton_quantises_as_the_reference_does(quantize, before):
    skip_where_missing(quantize)
    for width in (96, 768, 2050, 8208):
        x = torch.randn(33, width * (2 if before in ("silu", "gelu") else 1), device="cuda", dtype=torch.bfloat16)
        (q, scale), (wanted, steps) = (
            quantize_rows(x, QUANTIZED[quantize], before=before, impl=impl) for impl in ("triton", "reference")
        )
        assert torch.allclose(scale, steps, rtol=1e-5)
        apart = (q.float() - wanted.float()).abs()
        # Numbers that fall between two steps may go either way.
        assert (apart <= (1 if quantize == "int8" else wanted.float().abs().clamp(min=2.0**-6) / 8)).all()
        assert (apart > 0).float().mean() < 0.01


def test_triton_dequantises_as_the_reference_does(judge):
    sums = torch.randint(-(2**20), 2**20, (65, 2050), dtype=torch.int32, device="cuda")
    row, column, bias = (torch.rand(n, device="cuda") for n in (65, 2050, 2050))
    total = torch.randn(65, 2050, device="cuda", dtype=torch.bfloat16)
    exact = sums.double() * row.double()[:, None] * column.double() + bias.double() + total.double()
    out, wanted = (
        dequantize(sums, row, column, bias, dtype=torch.bfloat16, add_to=total.clone(), impl=impl)
        for impl in ("triton", "reference")
    )
    judge(out.cpu(), wanted.cpu(), exact.cpu())
