"""Names, presets and fields: what they mean, and what is said about those that mean nothing."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from vitok import InputError, ViTokConfig
from vitok.config import COMMON_NAMES, PRESETS


def stacks(name: str, **options: object) -> tuple[tuple[int, ...], tuple[int, ...]]:
    config = ViTokConfig.from_name(name, **options)
    return dataclasses.astuple(config.encoder), dataclasses.astuple(config.decoder)


SMALL, BASE, LARGE = (768, 6, 12, 2048), (768, 12, 12, 2048), (1152, 24, 16, 3072)


@pytest.mark.parametrize(
    ("name", "encoder", "decoder", "tubelet"),
    [
        ("S-B/16", SMALL, BASE, (1, 16)),
        ("S-L/16", SMALL, LARGE, (1, 16)),
        ("L-S/32", LARGE, SMALL, (1, 32)),
        ("Ti-Ti/8", (384, 6, 6, 1024), (384, 6, 6, 1024), (1, 8)),
        ("S-B/4x8", SMALL, BASE, (4, 8)),
        ("S-B/1x16", SMALL, BASE, (1, 16)),
        ("Bd4-Bw512h8/16", (768, 4, 12, 2048), (512, 12, 8, 1408), (1, 16)),
        ("Bm4-B/16", (768, 12, 12, 3072), BASE, (1, 16)),
        ("w512_d4_h8-w256_d2_h4_m4/2x8", (512, 4, 8, 1408), (256, 2, 4, 1024), (2, 8)),
    ],
)
def test_names(name, encoder, decoder, tubelet):
    config = ViTokConfig.from_name(name)
    assert stacks(name) == (encoder, decoder)
    assert config.tubelet == tubelet and config.channels == 16 and config.name == name


def test_names_of_the_later_paper():
    config = ViTokConfig.from_name("Ld4-Ld24/1x16x64", preset="v2")
    assert (config.tubelet, config.channels) == ((1, 16), 64)
    assert stacks("Ld4-Ld24/1x16x64", preset="v2") == ((1024, 4, 16, 2736), (1024, 24, 16, 2736))
    assert stacks("Td4-T/1x32x256", preset="v2") == ((3072, 4, 24, 8208), (3072, 40, 24, 8208))
    assert stacks("G-E/16", preset="v2") == ((1728, 32, 24, 4608), (4096, 48, 32, 10944))


def test_hidden_sizes_of_the_presets():
    assert stacks("S-L/16", preset="author-v1") == ((768, 6, 12, 2050), (1152, 24, 16, 3075))
    assert stacks("S-L/16", preset="paper") == (SMALL, LARGE)
    for width in (384, 768, 1024, 1152):
        assert PRESETS["paper"].hidden(width, 8 / 3) == 64 * math.ceil(8 * width / 3 / 64)


def test_a_width_override_brings_its_hidden_size():
    assert ViTokConfig.from_name("S-B/16", encoder_width=384, encoder_heads=6).encoder_hidden == 1024
    assert ViTokConfig.from_name("S-B/16", encoder_width=384, encoder_heads=6, encoder_hidden=7).encoder_hidden == 7


def test_presets_differ_where_the_specification_says():
    paper, v1, v2 = (ViTokConfig.from_name("B-B/16", preset=preset) for preset in ("paper", "author-v1", "v2"))
    assert (paper.norm, paper.norm_eps, paper.gate, paper.rope, paper.block) == ("layer", 1e-5, "silu", "3d", "serial")
    assert not (paper.qkv_bias or paper.proj_bias or paper.mlp_bias or paper.qk_norm) and paper.layer_scale is None
    assert (v1.gate, v1.rope, v1.absolute, v1.final_norm) == ("gelu", "1d", "none", True)
    assert (v1.qkv_bias, v1.proj_bias, v1.mlp_bias) == (False, True, True)
    assert ViTokConfig.from_name("B-B/4x8", preset="author-v1").absolute == "sincos"
    assert (v2.norm, v2.norm_eps, v2.block, v2.rope, v2.pad) == ("rms", 1e-6, "parallel", "2d", "zero")
    assert v2.qk_norm and not v2.final_norm and v2.layer_scale == 1.0 and v2.bottleneck == "layernorm"


def test_grid_counts_partial_tubelets_whole():
    config = ViTokConfig.from_name("S-B/4x16")
    assert config.grid(17, 37, 211) == (5, 3, 14)
    assert config.grid(1, 1, 1) == (1, 1, 1)
    assert config.tubelet_elements == 4 * 16 * 16 * 3


@pytest.mark.parametrize("name", COMMON_NAMES)
def test_common_names_parse_and_survive_json(name):
    for preset in ("paper", "author-v1"):
        config = ViTokConfig.from_name(name, preset=preset, layer_scale=1)
        again = ViTokConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert again == config and again.hash() == config.hash()


def test_hash_sees_fields_and_not_labels():
    config = ViTokConfig.from_name("S-B/16")
    assert config.hash() == config.replace(name="mine", preset="own").hash()
    assert config.hash() == config.replace(rope_theta=10000).hash(), "10000 and 10000.0 are one value"
    changes = {"pad": "zero", "channels": 8, "norm_eps": 1e-6, "qk_norm": True, "layer_scale": 1.0, "clip_frames": 2}
    assert len({config.hash()} | {config.replace(**{k: v}).hash() for k, v in changes.items()}) == len(changes) + 1


def test_differences_name_the_first_few_fields_and_no_labels():
    config = ViTokConfig.from_name("S-B/16")
    assert config.differences(config.replace(name="mine", preset="own")) == ""
    assert config.differences(config.replace(channels=8)) == "channels 16 (here 8)"
    other = config.replace(pad="zero", channels=8, norm_eps=1e-4, qk_norm=True, gate="gelu", layer_scale=1.0)
    assert config.differences(other).count("(here ") == 4 and config.differences(other).endswith(" and 2 more")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("S-B", {}, "did you mean 'S-B/"),
        ("SB/16", {}, "did you mean 'S-B/16'?"),
        ("S-B/4x8x", {}, "did you mean 'S-B/4x8'?"),
        ("", {}, "unknown model ''"),
        ("S-X/16", {}, "unknown size 'X' in model name 'S-X/16'; this preset has Ti, S, B, L"),
        ("S-T/16", {}, "unknown size 'T'"),
        ("S-B/16", {"preset": "v2"}, "this preset has B, L, G, T, E"),
        ("w512_d4-B/16", {}, "unknown size 'w512_d4'"),
        ("Sd2.5-B/16", {}, "unknown size 'Sd2.5'"),
        ("S-B/16", {"preset": "papr"}, "unknown preset 'papr'; there are paper, author-v1, v2"),
        ("S-B/1x16x64", {"channels": 16}, "channels=16 contradicts the model name"),
        ("S-B/0", {}, "'patch' must be positive, got 0"),
        ("S-B/0x16", {}, "must be positive, got 0"),
        ("Sh0-B/16", {}, "'encoder_heads' must be positive"),
        ("Sh5-B/16", {}, "encoder_width / encoder_heads must be a multiple of 8"),
    ],
)
def test_bad_names(name, options, message, one_sentence):
    with pytest.raises(InputError) as error:
        ViTokConfig.from_name(name, **options)
    one_sentence(error.value, message)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("patch", 0, "positive"),
        ("patch", 16.0, "of type int"),
        ("channels", -1, "positive"),
        ("channels", "16", "of type int"),
        ("channels", True, "of type int"),
        ("encoder_depth", -1, "positive"),
        ("encoder_width", "wide", "of type int"),
        ("decoder_width", 772, "multiple of 8"),
        ("norm", "batch", "one of layer, rms"),
        ("norm", None, "of type str"),
        ("block", "both", "one of serial, parallel"),
        ("gate", "relu", "one of silu, gelu"),
        ("bottleneck", "vq", "one of gaussian, layernorm"),
        ("rope", "4d", "one of 3d, 2d, 1d, none"),
        ("absolute", "learned", "one of none, sincos"),
        ("pixel_bias", "row", "one of channel, element"),
        ("pad", "wrap", "one of edge, zero"),
        ("qk_norm", 1, "of type bool"),
        ("final_norm", "yes", "of type bool"),
        ("norm_eps", float("nan"), "positive and finite"),
        ("norm_eps", -1e-5, "positive and finite"),
        ("rope_theta", 0, "positive and finite"),
        ("rope_theta", "1e4", "of type float"),
        ("layer_scale", float("inf"), "positive and finite"),
        ("layer_scale", "one", "of type float | None"),
        ("clip_frames", 3, "multiple of temporal_patch 2"),
        ("encoder_heads", 96, "head of 8 channels"),
        ("pathc", 16, "unknown config field 'pathc'; did you mean 'patch'?"),
    ],
)
def test_bad_fields(field, value, message, one_sentence):
    with pytest.raises(InputError) as error:
        ViTokConfig.from_name("S-B/2x16", **{field: value})
    one_sentence(error.value, message)


def test_depth_zero_and_layer_scale_zero_are_models_too():
    config = ViTokConfig.from_name("S-B/16", encoder_depth=0, layer_scale=0)
    assert config.encoder_depth == 0 and config.layer_scale == 0.0


@pytest.mark.parametrize("values", [None, [], "S-B/16"])
def test_from_dict_wants_an_object(values, one_sentence):
    with pytest.raises(InputError) as error:
        ViTokConfig.from_dict(values)
    one_sentence(error.value, "must be a JSON object")


def test_from_dict_names_missing_and_unknown_fields(one_sentence):
    values = ViTokConfig.from_name("S-B/16").to_dict()
    with pytest.raises(InputError) as error:
        ViTokConfig.from_dict({key: value for key, value in values.items() if key not in ("pad", "gate")})
    one_sentence(error.value, "lacks", "gate, pad")
    with pytest.raises(InputError) as error:
        ViTokConfig.from_dict(values | {"colour": 3})
    one_sentence(error.value, "unknown", "colour")
