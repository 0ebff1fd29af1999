"""`vitok.count` against the published table, the parameters of real models and torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vitok

V1 = {"preset": "author-v1", "channels": 16}


def test_the_table_of_parameters():
    image = vitok.count("S-B/16", size=256, **V1)
    assert (image.params, image.encoder_params, image.decoder_params) == (128_862_827, 43_163_960, 85_698_867)
    large = vitok.count("S-L/16", size=256, **V1)
    assert (large.params, large.encoder_params, large.decoder_params) == (426_838_859, 43_163_960, 383_674_899)
    assert vitok.count("S-B/4x8", size=128, frames=16, **V1).params == 128_862_827
    assert vitok.count("S-B/4x16", size=128, frames=16, **V1).params == 132_401_771
    assert vitok.count("S-B/8x8", size=128, frames=16, **V1).params == 130_042_475


def test_parameters_of_the_published_weights():
    assert vitok.count("Ld4-Ld24/1x16x64", preset="v2").params == 354_548_032
    assert vitok.count("Td4-T/1x16x64", preset="v2").params == 4_994_721_600


@pytest.mark.parametrize(
    ("name", "size", "frames", "gmac", "tokens"),
    [
        ("S-B/16", 256, 1, "34.76", 256),
        ("S-B/16", 512, 1, "160.78", 1024),
        ("S-L/16", 256, 1, "113.40", 256),
        ("S-B/4x8", 128, 16, "160.78", 1024),
        ("S-B/4x16", 128, 16, "35.7", 256),
        ("S-B/8x8", 128, 16, "73.7", 512),
    ],
)
def test_the_table_of_operations(name, size, frames, gmac, tokens):
    counted = vitok.count(name, size=size, frames=frames, **V1)
    digits = len(gmac.split(".")[1])
    assert f"{counted.macs / 1e9:.{digits}f}" == gmac
    assert counted.flops == 2 * counted.macs and counted.macs == counted.encoder_macs + counted.decoder_macs
    assert counted.tokens == tokens and counted.floats == tokens * 16


def test_the_paper_preset():
    """Hidden 2048 instead of 2050."""
    assert f"{vitok.count('S-B/16', channels=16).macs / 1e9:.2f}" == "34.74"


def counted_by_torch(model: vitok.ViTok, pixels: torch.Tensor, size: tuple[int, ...], prefer) -> tuple[int, int]:
    """FLOPs of encode and decode. The counter knows no fused kernels, hence the references."""
    flops = []
    with torch.no_grad(), prefer("reference"):
        with FlopCounterMode(display=False) as counter:
            posterior = model.encode(pixels)
        flops.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            model.decode(posterior.mode(), size=size)
        flops.append(counter.get_total_flops())
    return flops[0], flops[1]


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("preset", ["paper", "author-v1", "v2"])
@pytest.mark.parametrize(
    ("name", "frames", "height", "width"),
    [("S-B/16", 1, 256, 256), ("S-L/16", 1, 37, 211), ("S-B/4x8", 17, 33, 50), ("Ti-S/1x32x3", 1, 1, 1)],
)
def test_equals_torch_on_the_full_sizes(prefer, preset, name, frames, height, width):
    """On the meta device, so that the real sizes cost nothing."""
    if preset == "v2":
        name = name.replace("Ti-", "B-").replace("-S", "-B").replace("S-", "B-")
    counted = vitok.count(name, size=(height, width), frames=frames, preset=preset)
    model = vitok.create_model(name, preset=preset, device="meta").eval()
    assert (parameters(model.encoder), parameters(model.decoder)) == (counted.encoder_params, counted.decoder_params)
    assert parameters(model) == counted.params
    shape = (1, frames, height, width, 3) if frames > 1 else (1, height, width, 3)
    size = (frames, height, width) if frames > 1 else (height, width)
    encoder, decoder = counted_by_torch(model, torch.empty(shape, dtype=torch.uint8, device="meta"), size, prefer)
    assert (encoder, decoder) == (2 * counted.encoder_macs, 2 * counted.decoder_macs)


@pytest.mark.parametrize(
    "fields",
    [
        {"qkv_bias": True, "proj_bias": True, "mlp_bias": True, "qk_norm": True, "layer_scale": 0.1},
        {"norm": "rms", "pixel_bias": "element", "final_norm": False, "bottleneck": "layernorm"},
        {"block": "parallel", "layer_scale": 1.0, "absolute": "sincos", "encoder_depth": 0},
    ],
)
def test_equals_torch_on_every_switch(tiny, pixels, prefer, fields):
    model = tiny("S-B/2x8", **fields)
    counted = vitok.count(model.config, size=(9, 30), frames=5)
    assert parameters(model) == counted.params and parameters(model.encoder) == counted.encoder_params
    flops = counted_by_torch(model, pixels(1, 5, 9, 30, 3), (5, 9, 30), prefer)
    assert flops == (2 * counted.encoder_macs, 2 * counted.decoder_macs)
    assert counted.floats == model.encode(pixels(1, 5, 9, 30, 3)).mean.numel()


@pytest.mark.parametrize("options", [{"size": 0}, {"size": (16, 0)}, {"frames": 0}])
def test_bad_sizes(options, one_sentence):
    with pytest.raises(vitok.InputError) as error:
        vitok.count("S-B/16", **options)
    one_sentence(error.value, "must be positive")
