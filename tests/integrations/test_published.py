"""Weights of the authors in our model: the published forward pass, and a sentence for what does not fit."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import vitok
from vitok import InputError
from vitok.integrations import load_vitok_v1, load_vitok_v2
from vitok.integrations import published as module

plain = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "plain_formulas.py")))
SIZES = {"width": 64, "hidden": 176, "depth": 2, "patch": 4, "channels": 6}
HEADS = 2
NAME = "w64_d2_h2-w64_d2_h2/1x4x6"
QUERIES = "encoder_blocks.0.attn.norm_q.weight"


def single(weights):
    return {key: value.float().contiguous() for key, value in weights.items()}


@pytest.fixture
def v2():
    torch.manual_seed(0)
    return {part: single(weights) for part, weights in plain.v2_model(SIZES, HEADS).items()}


@pytest.fixture
def v2_files(v2, tmp_path):
    for part, weights in v2.items():
        save_file(weights, tmp_path / f"{part}.safetensors")
    return tmp_path / "encoder.safetensors", tmp_path / "decoder.safetensors"


@pytest.fixture
def v1():
    torch.manual_seed(0)
    return single(plain.author_v1_model(128, 70, 2, (2, 4), 6))


@torch.no_grad()
@pytest.mark.parametrize("size", [(12, 20), (11, 18)])
def test_v2_is_the_published_forward_pass(v2, v2_files, size):
    model = load_vitok_v2(*v2_files)
    wide = {part: {key: x.double() for key, x in weights.items()} for part, weights in v2.items()}
    pixels = torch.rand(2, 3, *size) * 2 - 1
    codes = model.encode(pixels, layout="channels_first").mode()
    expected = plain.v2_encode(pixels.double(), wide["encoder"], 4, HEADS)
    assert codes.shape == expected.shape and expected.std() > 0.5
    assert (codes - expected).abs().max() <= 1e-4
    decoded = model.decode(codes, size=size)
    expected = plain.v2_decode(codes.double(), wide["decoder"], 4, HEADS)[..., : size[0], : size[1]]
    assert (decoded - expected).abs().max() <= 1e-4 and expected.std() > 0.1
    assert not model.training and model.config.preset == "v2"


@torch.no_grad()
def test_v1_is_the_forward_pass_of_its_code(v1):
    model = load_vitok_v1(v1)
    wide = {key: x.double() for key, x in v1.items()}
    clips = torch.rand(1, 3, 4, 8, 12) * 2 - 1
    posterior = model.encode(clips, layout="channels_first")
    mean, logvar = plain.author_v1_encode(clips.double(), wide, 2)
    assert (posterior.mean - mean).abs().max() <= 1e-4 and mean.std() > 0.1
    assert (posterior.logvar - logvar.clamp(-30, 20)).abs().max() <= 1e-4
    expected = plain.author_v1_decode(mean, wide, 2)
    assert (model.decode(mean.float()) - expected).abs().max() <= 1e-4
    assert model.config.tubelet == (2, 4) and model.config.channels == 6


def test_heads_of_v1(v1):
    assert load_vitok_v1(v1, heads=(4, 2)).config.encoder_heads == 4
    assert load_vitok_v1(v1, heads=8).config.decoder_heads == 8


def test_a_state_dict_a_file_and_shards_are_alike(v2, v2_files, tmp_path):
    keys = sorted(v2["encoder"])
    for number, part in enumerate((keys[::2], keys[1::2])):
        save_file({key: v2["encoder"][key] for key in part}, tmp_path / f"shard-{number}.safetensors")
    index = tmp_path / "encoder.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: f"shard-{keys.index(key) % 2}.safetensors" for key in keys}}))
    whole = load_vitok_v2(*v2_files, variant=NAME).state_dict()
    for model in (load_vitok_v2(**v2), load_vitok_v2(index, v2_files[1])):
        assert all(torch.equal(value, whole[key]) for key, value in model.state_dict().items())


def test_what_is_loaded_can_be_saved_and_used_like_any_model(v2_files, tmp_path):
    model = load_vitok_v2(*v2_files, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    model.save(tmp_path / "model")
    pixels = torch.rand(1, 3, 8, 8).bfloat16()
    again = vitok.load(tmp_path / "model")
    assert torch.equal(again.encode(pixels).mode(), model.encode(pixels).mode())


@pytest.mark.parametrize("load", ["v1", "v2"])
def test_one_half(load, v1, v2, one_sentence):
    parts = {"encoder": ("encoder", "tubelet_embed"), "decoder": ("decoder", "tubelet_decode", "code_to")}
    for part, other in (("encoder", "decoder"), ("decoder", "encoder")):
        if load == "v2":
            model = load_vitok_v2(**{part: v2[part]})
        else:
            model = load_vitok_v1({key: x for key, x in v1.items() if key.startswith(parts[part])})
        half = {"encoder": (model.encode, torch.zeros(1, 3, 8, 8)), "decoder": (model.decode, torch.zeros(1, 6, 2, 2))}
        call, inputs = half[part]
        call(inputs)
        call, inputs = half[other]
        with pytest.raises(InputError) as error:
            call(inputs)
        one_sentence(error.value, f"without its {other}")
        assert model.device.type == "cpu" and sum(p.numel() for p in model.parameters()) > 1000


def test_what_does_not_fit_is_named(v2, v1, one_sentence):
    for changes, words in (
        ({"variant": "w64_d2_h2-w64_d2_h2/1x4x8"}, "weight to_code.weight must be [8, 64], got [6, 64]"),
        ({"variant": "w64_d3_h2-w64_d2_h2/1x4x6"}, "lacks weight(s) encoder_blocks.2."),
        ({"variant": "Ld4-Ld24"}, "unknown model"),
        ({"encoder": v2["encoder"] | {"surplus": torch.zeros(1)}}, "has unknown weight(s) surplus"),
        ({"encoder": {"x": torch.zeros(1)}}, "lacks weight(s) patch_embed.weight"),
        ({"encoder": v2["decoder"]}, "lacks weight(s) patch_embed.weight"),
        ({"encoder": v2["encoder"] | {"to_code.bias": torch.zeros(3)}}, "to_code.bias must be [6], got [3]"),
        ({"encoder": v2["encoder"] | {"patch_embed.weight": torch.zeros(3)}}, "[width, elements of a patch], got [3]"),
        ({"encoder": v2["encoder"] | {"to_code.weight": torch.tensor(0.0)}}, "must be [channels, width], got []"),
        ({"encoder": v2["encoder"] | {QUERIES: torch.tensor(0.0)}}, f"{QUERIES} must be [width of a head], got []"),
        ({"encoder": v2["encoder"] | {QUERIES: torch.zeros(0)}}, f"{QUERIES} must be [width of a head], got [0]"),
        ({"encoder": v2["encoder"] | {"to_code.bias": torch.zeros(6, dtype=torch.int32)}}, "dtype, got int32"),
        ({"only": "encoder"}, "of a published model and no files, got 'encoder'"),
    ):
        with pytest.raises(InputError) as error:
            load_vitok_v2(**(v2 | changes))
        one_sentence(error.value, words)
    for weights, words in (
        (v1 | {"posemb": torch.zeros(1, 4, 128)}, "'posemb', learned positions"),
        ({}, "no such ViTok weights"),
        (v1 | {"encoder_to_code.bias": torch.zeros(3)}, "encoder_to_code.bias must be [12], got [3]"),
        (v1 | {"tubelet_embed.proj.weight": torch.zeros(3)}, "[width, 3, q, p, p], got [3]"),
        (v1 | {"encoder_to_code.weight": torch.tensor(0.0)}, "[2 channels, width], got []"),
        (v1 | {"encoder_to_code.bias": torch.zeros(12).long()}, "a floating-point dtype, got int64"),
    ):
        with pytest.raises(InputError) as error:
            load_vitok_v1(weights)
        one_sentence(error.value, words)


def test_bad_files(v2, v2_files, tmp_path, one_sentence):
    (tmp_path / "torn.safetensors").write_bytes(v2_files[0].read_bytes()[:500])
    torch.save(v2, tmp_path / "pickle.safetensors")
    (tmp_path / "bad.index.json").write_text("{}")
    (tmp_path / "out.index.json").write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    for file, words in (
        ("nowhere.safetensors", "does not exist"), ("torn.safetensors", "no readable safetensors file"),
        ("pickle.safetensors", "no readable safetensors file"),
        ("bad.index.json", "no index of sharded weights"), ("out.index.json", "outside its folder"),
    ):  # fmt: skip
        with pytest.raises(InputError) as error:
            load_vitok_v2(tmp_path / file)
        one_sentence(error.value, file, words)


def test_pickles_are_taken_by_name_alone(v1, tmp_path, one_sentence):
    path = tmp_path / "model.pt"
    torch.save(v1, path)
    with pytest.raises(InputError) as error:
        load_vitok_v1(path)
    one_sentence(error.value, "is a pickle", "allow_pickle=True")
    with pytest.warns(UserWarning, match="reading the pickle"):
        model = load_vitok_v1(path, allow_pickle=True)
    assert torch.equal(model.decoder.unembed.bias, v1["tubelet_decode.proj.bias"])
    torch.save({"weights": Path("x")}, path)
    with pytest.raises(InputError) as error, pytest.warns(UserWarning):
        load_vitok_v1(path, allow_pickle=True)
    one_sentence(error.value, "cannot read", str(path))


def test_published_names(v2_files, monkeypatch, one_sentence):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(repository, file):
        asked.append((repository, file))
        return str(v2_files[0].with_name(file))

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setitem(module.PUBLISHED, "350M-f16x64", NAME)
    load_vitok_v2(variant="350M-f16x64")
    assert asked == [("philippehansen/ViTok-v2-350M-f16x64", f"{part}.safetensors") for part in ("encoder", "decoder")]

    asked.clear()
    model = load_vitok_v2(variant="350M-f16x64", only="encoder")
    assert asked == [("philippehansen/ViTok-v2-350M-f16x64", "encoder.safetensors")]
    with pytest.raises(InputError, match="without its decoder"):
        model.decode(torch.zeros(1, 6, 2, 2))

    def offline(repository, file, **_):
        raise OSError("no network")

    monkeypatch.setattr(hub, "hf_hub_download", offline)
    with pytest.raises(InputError) as error:
        load_vitok_v2(variant="350M-f16x64")
    one_sentence(error.value, "cannot fetch encoder.safetensors", "no network", "huggingface.co", "encoder=")
    with pytest.raises(InputError) as error:
        load_vitok_v2(variant="350M-f16x63")
    one_sentence(error.value, "did you mean '350M-f16x64'?")
    with pytest.raises(InputError) as error:
        vitok.load("hf:philippehansen/ViTok-v2-350M-f16x64")
    one_sentence(error.value, "load_vitok_v2(variant='350M-f16x64')", "vitok convert v2 --variant 350M-f16x64")


@pytest.mark.parametrize(("name", "parameters"), [("350M-f16x64", 354_548_032), ("5B-f16x64", 4_994_721_600)])
def test_sizes_of_published_models(name, parameters):
    with torch.device("meta"):
        model = vitok.ViTok(vitok.ViTokConfig.from_name(module.PUBLISHED[name], preset="v2"))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_page_runs(v2_files, monkeypatch):
    page = Path(__file__).parents[2] / "docs" / "integrations" / "published-weights.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    monkeypatch.chdir(v2_files[0].parent)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["latents"].shape == (1, 6, 16, 16)


# Loads the two halves from their shards, and says how many bytes the model has and how many more were held that are
# not pages of the files.
HELD = """
import sys, threading, time
import torch
from vitok.integrations import load_vitok_v2

def held():
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def watch():
    while True:
        peaks.append(held())
        time.sleep(0.001)

peaks = []
before = held()
threading.Thread(target=watch, daemon=True).start()
model = load_vitok_v2(*sys.argv[1:], dtype=torch.bfloat16)
print(sum(p.nbytes for p in model.parameters()), max(peaks) - before)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="asked of Linux")
def test_shards_are_not_held_twice(processes, tmp_path):
    indices = []
    config = vitok.ViTokConfig.from_name("w1024_d3_h16-w1024_d3_h16/1x16x16", preset="v2")
    for part, shapes in module.v2_shapes(config).items():
        shards = [list(shapes)[n::4] for n in range(4)]
        for n, keys in enumerate(shards):
            save_file({key: torch.rand(shapes[key]) for key in keys}, tmp_path / f"{part}-{n}.safetensors")
        where = {key: f"{part}-{n}.safetensors" for n, keys in enumerate(shards) for key in keys}
        indices.append(tmp_path / f"{part}.safetensors.index.json")
        indices[-1].write_text(json.dumps({"weight_map": where}))
    result = processes.run([sys.executable, "-c", HELD, *indices], limit=120)
    assert result.returncode == 0, result.stderr
    model, held = map(int, result.stdout.split())
    assert model > 140e6 and held < 1.4 * model
