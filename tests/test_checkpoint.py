"""A model on disk: the same bits back, and one sentence for everything that is no model."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vitok
from vitok import InputError, checkpoint


def outputs(model: vitok.ViTok, picture: torch.Tensor) -> list[torch.Tensor]:
    posterior = model.encode(picture)
    return [posterior.mean, posterior.sample(seed=1), model.decode(posterior.mode(), size=tuple(picture.shape[-3:-1]))]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(first, second, strict=True))


@pytest.fixture
def saved(tiny, tmp_path) -> Path:
    tiny().save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", ["paper", "author-v1", "v2"])
def test_save_load_encode_decode_is_bit_identical(tiny, pixels, tmp_path, preset, dtype):
    model, picture = tiny(preset=preset).to(dtype), pixels(2, 37, 21, 3)
    model.save(tmp_path / "deep" / "model")
    again = vitok.load(tmp_path / "deep" / "model")
    assert again.config == model.config and again.dtype == dtype and not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    assert same(list(again.state_dict().values()), list(model.state_dict().values()))
    assert same(outputs(again, picture), outputs(model, picture))
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert sorted(file.name for file in (tmp_path / "deep" / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_a_clip_model_too(tiny, pixels, tmp_path):
    model, clip = tiny("S-B/4x8"), pixels(1, 17, 20, 9, 3)
    model.save(str(tmp_path))
    again = vitok.load(str(tmp_path))
    assert torch.equal(again.encode(clip).mean, model.encode(clip).mean)


def test_load_into_another_dtype(tiny, saved):
    loaded = vitok.load(saved, dtype=torch.bfloat16, device="cpu")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    expected = tiny().bfloat16().state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())


def test_a_saved_model_is_as_readable_as_the_umask_says(tiny, tmp_path):
    umask = os.umask(0o022)
    try:
        tiny().save(tmp_path / "model")
    finally:
        os.umask(umask)
    assert {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {
        "config.json": 0o644,
        "model.safetensors": 0o644,
    }


def test_save_over_the_directory_it_came_from(saved, pixels):
    """The loaded weights may still be mapped from the file that is replaced."""
    model, picture = vitok.load(saved), pixels(1, 16, 24, 3)
    expected = outputs(model, picture)
    with torch.no_grad():
        model.decoder.unembed.bias += 1
    model.save(saved)
    again = outputs(vitok.load(saved), picture)
    assert torch.equal(again[0], expected[0]) and not torch.equal(again[2], expected[2])
    assert same(outputs(model, picture), again)


def test_create_model(pixels):
    torch.manual_seed(3)
    model = vitok.create_model("Ti-Ti/16", channels=8, dtype=torch.bfloat16, encoder_depth=1, decoder_depth=1)
    assert model.config.channels == 8 and model.dtype == torch.bfloat16 and model.device.type == "cpu"
    assert model.config.encoder_width == 384 and len(model.encoder.stack.blocks) == 1
    torch.manual_seed(3)
    again = vitok.create_model("Ti-Ti/16", channels=8, dtype=torch.bfloat16, encoder_depth=1, decoder_depth=1)
    assert same(list(again.parameters()), list(model.parameters()))
    assert model.encode(pixels(1, 20, 30, 3)).mean.isfinite().all()


def test_weights_hash_sees_every_weight(tiny):
    model = tiny()
    before = checkpoint.weights_hash(model)
    assert before == checkpoint.weights_hash(tiny()) and len(before) == 16
    for key in ("encoder.embed.bias", "decoder.stack.blocks.1.feed_forward.down.weight"):
        changed = tiny()
        with torch.no_grad():
            changed.get_parameter(key).view(-1)[-1] += 1e-3
        assert checkpoint.weights_hash(changed) != before
    assert checkpoint.weights_hash(tiny().bfloat16()) != before


# --- What is no model ---


def refused(directory, one_sentence, *wanted: str) -> None:
    with pytest.raises(InputError) as error:
        vitok.load(directory)
    one_sentence(error.value, *wanted)


def test_no_such_model(tmp_path, one_sentence):
    refused(tmp_path / "nothing", one_sentence, str(tmp_path / "nothing"), "nor a directory")
    refused("S-B/16", one_sentence, "'S-B/16'")


def test_directories_that_are_no_model(saved, tmp_path, one_sentence):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", one_sentence, str(tmp_path / "empty"), "no config.json")
    refused(saved / "config.json", one_sentence, "no model directory")
    (saved / "model.safetensors").unlink()
    refused(saved, one_sentence, str(saved), "no model.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "config.json"),
        ("{", "config.json"),
        ("[1, 2]", "must be a JSON object, got list"),
        ('{"name": "S-B/16"}', "lacks field(s)"),
        ("\udcff", "config.json"),
    ],
)
def test_damaged_config(saved, text, message, one_sentence):
    (saved / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(saved, one_sentence, str(saved / "config.json"), message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 3}, "has unknown field(s) colour"),
        ({"patch": "8"}, "'patch' must be of type int, got '8'"),
        ({"norm": "batch"}, "'norm' must be one of layer, rms"),
        ({"rope_theta": float("nan")}, "'rope_theta' must be positive and finite"),
    ],
)
def test_config_with_bad_fields(saved, changes, message, one_sentence):
    values = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(values | changes))
    refused(saved, one_sentence, str(saved / "config.json"), message)


def rewritten(saved: Path, change) -> None:
    state = load_file(saved / "model.safetensors")
    change(state)
    save_file({key: value.clone() for key, value in state.items()}, saved / "model.safetensors")


BIAS = "encoder.embed.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(BIAS), f"lacks weight(s) {BIAS}"),
        (lambda state: state.update(extra=torch.ones(1)), "has unknown weight(s) extra"),
        (
            lambda state: state.update({BIAS: torch.ones(7)}),
            f"weight {BIAS} must be floating point [48], got torch.float32 [7]",
        ),
        (lambda state: state.update({BIAS: torch.ones(48, dtype=torch.int64)}), "got torch.int64 [48]"),
        (lambda state: state.clear(), " and 40 more"),
        (lambda state: state.update({BIAS: torch.ones(48).half()}), "of one dtype, got torch.float16, torch.float32"),
    ],
    ids=["missing", "extra", "shape", "dtype", "empty", "mixed dtypes"],
)
def test_weights_that_do_not_fit(saved, change, message, one_sentence):
    rewritten(saved, change)
    refused(saved, one_sentence, str(saved / "model.safetensors"), message)


def test_weights_of_another_model(tiny, saved, one_sentence):
    tiny(encoder_width=72, encoder_heads=3).save(saved.parent / "other")
    shutil.copy(saved.parent / "other" / "model.safetensors", saved)
    refused(saved, one_sentence, str(saved / "model.safetensors"), "must be floating point")


@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, 0.999])
def test_truncated_weights(saved, kept, one_sentence):
    data = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    refused(saved, one_sentence, str(saved / "model.safetensors"), "no readable safetensors file")


class Trap:
    def __reduce__(self):
        return os.abort, ()


@pytest.mark.parametrize(
    "write", [lambda path: torch.save({"a": Trap()}, path), lambda path: path.write_bytes(pickle.dumps(Trap()))]
)
def test_a_pickle_under_the_name_of_weights_is_never_run(saved, write, one_sentence):
    write(saved / "model.safetensors")
    refused(saved, one_sentence, str(saved / "model.safetensors"), "no readable safetensors file")


# --- Interrupted and impossible writes ---


def test_a_save_killed_in_the_middle_leaves_the_old_model_whole(tiny, saved, pixels, monkeypatch):
    picture = pixels(1, 16, 24, 3)
    expected = outputs(vitok.load(saved), picture)

    def half(state, path, metadata):
        save_file(state, path, metadata)
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        checkpoint.save_file = half
        tiny(seed=1).save(saved)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert same(outputs(vitok.load(saved), picture), expected)


def test_an_interrupted_save_leaves_the_old_model_whole_and_no_debris(tiny, saved, pixels, monkeypatch):
    picture = pixels(1, 16, 24, 3)
    expected = outputs(vitok.load(saved), picture)

    def interrupted(state, path, metadata):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny(seed=1).save(saved)
    assert same(outputs(vitok.load(saved), picture), expected)
    assert sorted(file.name for file in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_unwritable_directories(tiny, tmp_path, one_sentence):
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError) as error:
            tiny().save(directory)
        one_sentence(error.value, "cannot make the model directory", str(directory))
    (tmp_path / "model" / "model.safetensors").mkdir(parents=True)
    with pytest.raises(InputError) as error:
        tiny().save(tmp_path / "model")
    one_sentence(error.value, "cannot write", "model.safetensors")
