"""for_inference: the same numbers as the model it is made of, to the tolerance rule, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import vitok
from vitok import graphs, inference
from vitok.evaluate.reconstruction import score_folder

PHOTOS = Path(__file__).parents[1] / "examples" / "photos"

PRESETS = ["paper", "author-v1", "v2"]
# Multiples of 16, which the library's products of 8 bits want.
SIXTEENTHS = {"decoder_hidden": 144}
packings = pytest.mark.parametrize("packing", ["native", "reference"])


@pytest.fixture
def make(tiny):
    """`make(preset, **fields)`: a model whose biases and LayerScale are there and random where the preset has them."""

    def build(preset, **fields):
        name = "S-S/4x8" if fields.pop("clips", False) and preset != "v2" else "S-S/8"
        return tiny(name, preset=preset, **(SIXTEENTHS | fields))

    return build


@packings
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_is_the_model(make, pixels, judge, prefer, packing, preset, dtype):
    model = make(preset)
    exact, plain = copy.deepcopy(model).double(), copy.deepcopy(model).to(dtype)
    pictures = pixels(3, 3, 40, 28)
    with prefer(packing), torch.no_grad():
        fast = model.for_inference(dtype)
        latents = exact.encode(pictures).mode()
        judge(fast.encode(pictures).mode(), plain.encode(pictures).mode(), latents)
        given = latents.to(dtype)
        oracle = exact.decode(given.double(), size=(40, 28))
        judge(fast.decode(given, size=(40, 28)), plain.decode(given, size=(40, 28)), oracle)
    assert fast.dtype == dtype and fast.device == model.device and fast.config is model.config


@packings
def test_clips_and_mixed_sizes(make, pixels, judge, prefer, packing):
    model = make("paper", clips=True)
    exact = copy.deepcopy(model).double()
    items = [pixels(2, 3, 5, 24, 16), pixels(1, 3, 16, 40)]
    sizes = [(5, 24, 16), (16, 40)]
    with prefer(packing), torch.no_grad():
        fast = model.for_inference(torch.float32)
        posteriors = fast.encode_packed(items)
        decoded = fast.decode_packed([p.mode() for p in posteriors], sizes=sizes)
        for item, size, posterior, picture in zip(items, sizes, posteriors, decoded, strict=True):
            judge(posterior.mode(), model.encode(item).mode(), exact.encode(item).mode())
            judge(fast.encode(item).logvar, model.encode(item).logvar, exact.encode(item).logvar)
            latents = posterior.mode()
            judge(picture, model.decode(latents, size=size), exact.decode(latents.double(), size=size))


@packings
@pytest.mark.parametrize("preset", PRESETS)
def test_chunks_give_the_same(make, pixels, prefer, packing, preset):
    with prefer(packing), torch.no_grad():
        fast, pictures = make(preset, window=5).for_inference(torch.float32), pixels(2, 3, 40, 28)
        whole = fast.encode(pictures).mode()
        assert torch.allclose(fast.encode(pictures, chunk=7).mode(), whole, atol=1e-5)
        pixels_out = fast.decode(whole, size=(40, 28))
        assert torch.allclose(fast.decode(whole, size=(40, 28), chunk=7), pixels_out, atol=1e-5)


@pytest.mark.parametrize("fields", [{"qkv_bias": True, "proj_bias": True, "mlp_bias": True}, {"layer_scale": 0.1}])
@pytest.mark.parametrize("preset", PRESETS)
def test_biases_and_scales_are_folded(make, pixels, judge, preset, fields):
    model = make(preset, **fields)
    exact, pictures = copy.deepcopy(model).double(), pixels(2, 3, 24, 24)
    with torch.no_grad():
        fast = model.for_inference(torch.float32)
        judge(fast.encode(pictures).mode(), model.encode(pictures).mode(), exact.encode(pictures).mode())


@packings
def test_eight_bits_cost_little_on_the_demo_weights(prefer, packing):
    """At most 0.15 dB of PSNR on the example pictures."""
    model = vitok.load("demo")

    def quality(model):
        def reconstruct(picture):
            return model.decode(model.encode(picture).mode()).float()

        scores = [score.psnr for score in score_folder(PHOTOS, 256, reconstruct)]
        return sum(scores) / len(scores)

    with prefer(packing), torch.no_grad():
        plain = quality(model)
        assert abs(quality(model.for_inference(torch.bfloat16)) - plain) < 0.05
        assert quality(model.for_inference("int8")) > plain - 0.15


def test_joined_products_are_the_parallel_block(make, pixels, judge, monkeypatch):
    """As GPUs have it: gates before the products they quantise for, and two products a parallel block."""
    monkeypatch.setattr(inference.Folder, "gates_after", False)
    for preset in PRESETS:
        model, pictures = make(preset), pixels(2, 3, 24, 40)
        exact = copy.deepcopy(model).double()
        with torch.no_grad():
            fast = model.for_inference(torch.float32)
            whole = fast.encode(pictures).mode()
            judge(whole, model.encode(pictures).mode(), exact.encode(pictures).mode())
            assert torch.allclose(fast.encode(pictures, chunk=4).mode(), whole, atol=1e-5)


def test_the_model_stays_as_it_is_and_results_are_ones_own(make, pixels):
    model, pictures = make("v2"), pixels(2, 3, 16, 16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fast = model.for_inference(torch.float32)
    with torch.no_grad():
        first = fast.decode(fast.encode(pictures).mode())
        kept = first.clone()
        fast.decode(fast.encode(255 - pictures).mode())
    assert torch.equal(first, kept)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_sample_does_not_depend_on_its_batch(make, pixels):
    fast, pictures = make("paper").for_inference("int8"), pixels(5, 3, 24, 40)
    together = fast.encode(pictures).mode()
    for i, picture in enumerate(pictures):
        assert torch.equal(fast.encode(picture[None]).mode()[0], together[i])


def test_positions_are_kept_for_a_few_grids_only(make, pixels):
    fast = make("paper").for_inference()
    for height in range(8, 8 * 40, 8):
        fast.encode(pixels(1, 3, height, 8))
    assert len(fast.encoder.stack.known) <= 16


@pytest.mark.parametrize(
    ("use", "wanted"),
    [
        (lambda model: model.for_inference("int4"), ("dtype must be", "'int8'", "'int4'")),
        (lambda model: model.for_inference(torch.float64), ("dtype must be", "float64")),
        (lambda model: model.for_inference("fp8"), ("'fp8' needs a CUDA device", "9.0", "cpu")),
        (lambda model: model.for_inference(graphs=True), ("graphs=True needs", "CUDA", "cpu")),
        (lambda model: model.for_inference(graphs="always"), ("graphs must be", "'always'")),
        (lambda model: model.for_inference().to("meta"), ("for_inference", "stays")),
        (lambda model: model.for_inference().half(), ("for_inference", "stays")),
        (lambda model: model.for_inference().save("nowhere"), ("for_inference", "cannot be saved")),
        (lambda model: model.for_inference().for_inference(), ("for_inference", "made of")),
        (lambda model: model.for_inference().encode(torch.full((1, 3, 8, 8), 7.0)), ("[-1, 1]", "7")),
        (lambda model: model.for_inference().encode_packed([]), ("items", "at least one")),
        (lambda model: model.for_inference().decode(torch.zeros(1, 4, 2, 2).requires_grad_()), ("gradient",)),
    ],
)
def test_bad_input_is_one_sentence(make, one_sentence, use, wanted):
    with pytest.raises(vitok.InputError) as caught:
        use(make("paper"))
    one_sentence(caught.value, *wanted)


class FakeGraph:
    """Runs again what a CUDA graph would replay, into the same memory."""

    def __init__(self, run, given, rest, made):
        self.replay = lambda: made.copy_(run(given, *rest))


@pytest.fixture
def captured(monkeypatch):
    """Graphs without a GPU; a list of the shapes that were captured."""
    shapes = []

    def capture(run, given, rest, reads):
        shapes.append(tuple(given.shape))
        made = run(given, *rest)
        return graphs._Captured(FakeGraph(run, given, rest, made), given, made, dict(reads))

    monkeypatch.setattr(graphs, "_capture", capture)
    return shapes


def test_graphs_are_made_for_powers_of_two_and_give_copies(captured):
    replayed = graphs.Graphs()

    def run(x, factor):
        return x * factor

    kept = []
    for batch in (1, 2, 3, 4, 3, 8, 9):
        x = torch.randn(batch, 5)
        out = replayed(run, x, 2.0, reads={})
        assert torch.equal(out, 2 * x)
        kept.append((out, 2 * x))
    assert captured == [(1, 5), (2, 5), (4, 5), (8, 5)]  # 9 runs by itself
    assert all(torch.equal(a, b) for a, b in kept)
    assert torch.equal(replayed(run, torch.ones(1, 5), 3.0, reads={}), torch.full((1, 5), 3.0))


def test_the_graphs_used_last_are_kept(captured):
    replayed = graphs.Graphs()
    for width in [*range(1, 17), 1, 17, 1, 2]:
        replayed(_double, torch.ones(1, width), reads={})
    assert len(captured) == 18  # 17 widths, and 2 again, which had to go for 17


def _double(x):
    return 2 * x


def test_a_captured_model_is_the_model(make, pixels, captured):
    model = make("paper")
    plain, fast = model.for_inference(torch.float32), model.for_inference(torch.float32)
    fast.encoder.graphs = fast.decoder.graphs = graphs.Graphs()
    for batch in (3, 1, 4, 3):
        pictures = pixels(batch, 3, 24, 16, seed=batch)
        latents = plain.encode(pictures).mode()
        assert torch.allclose(fast.encode(pictures).mode(), latents, atol=1e-5)  # a library may round batches apart
        decoded = fast.decode(latents, size=(20, 16))
        assert decoded.shape == (batch, 3, 20, 16)
        assert torch.allclose(decoded, plain.decode(latents, size=(20, 16)), atol=1e-5)
    assert len(captured) == 4
