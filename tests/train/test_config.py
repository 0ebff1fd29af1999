"""A training run as data: what a YAML file may say, and one sentence for what it may not."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
from pathlib import Path

import pytest

from vitok import InputError, ViTokConfig
from vitok.data.batches import DataSource
from vitok.train.config import TrainConfig

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "train"
NEEDED = {"data": "pictures", "out": "run"}


def test_yaml_with_assignments(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "data: pictures\nout: run\nlearning_rate: 1e-3\nbetas: [0.8, 0.9]\nshort_side: [64, 128]\n"
        "overrides: {rope: 2d, encoder_depth: 3}\n"
    )
    config = TrainConfig.load(tmp_path / "run.yaml", ("steps=7", "overrides.encoder_depth=4", "groups=^a", "beta=0"))
    assert config.learning_rate == 1e-3 and config.betas == (0.8, 0.9) and config.short_side == (64, 128)
    assert config.overrides == {"rope": "2d", "encoder_depth": 4}
    assert config.steps == 7 and config.groups == "^a" and config.beta == 0.0


def test_every_field_is_documented():
    """By a text of its own below it, which Python does not keep."""
    (made,) = (node for node in ast.parse(inspect.getsource(TrainConfig)).body if isinstance(node, ast.ClassDef))
    documented = {
        field.target.id
        for field, text in itertools.pairwise(made.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and str(text.value.value).strip()
    }  # fmt: skip
    assert documented == {field.name for field in dataclasses.fields(TrainConfig)}


def test_defaults_stand():
    assert TrainConfig.from_dict(NEEDED) == TrainConfig(**NEEDED)
    config = TrainConfig(**NEEDED)
    assert (config.beta, config.betas, config.weight_decay, config.grad_clip) == (1e-3, (0.9, 0.95), 1e-4, 1.0)
    assert TrainConfig.from_dict(dataclasses.asdict(config)) == config


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_ready_files_load_and_name_a_model(path):
    config = TrainConfig.load(path)
    ViTokConfig.from_name(config.model, preset=config.preset, channels=config.channels, **config.overrides)


@pytest.mark.parametrize(
    ("kind", "model", "crop", "frames", "batches"),
    [("paper", "S-B/16", 256, 1, (1024, 256)), ("paper-video", "S-B/4x8", 128, 16, (256, 128))],
)
def test_the_papers_settings(kind, model, crop, frames, batches):
    first, second = (TrainConfig.load(EXAMPLES / f"{kind}-stage{stage}.yaml") for stage in (1, 2))
    for config in (first, second):
        assert (config.model, config.channels, config.crop, config.steps) == (model, 16, crop, 100_000)
        assert (config.pixel_loss, config.beta, config.perceptual, config.eta) == ("l2", 1e-3, "lpips", 1.0)
        assert (config.betas, config.weight_decay, config.grad_clip) == ((0.9, 0.95), 1e-4, 1.0)
        assert config.learning_rate == pytest.approx(1e-4 * config.batch * frames / 256)
        assert frames == 1 or config.frames == frames
    assert (first.stage, first.batch, first.ema) == (1, batches[0], 0)
    assert (second.stage, second.batch, second.ema, second.adversarial_weight) == (2, batches[1], 0.9999, 0.05)
    assert (second.discriminator_learning_rate, second.discriminator_warmup) == (2e-5, 25_000)
    assert second.init == str(Path(first.out) / "model")


def test_a_mixture(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "data:\n- {path: pictures, groups: ^a}\n- {path: films, weight: 2}\nout: run\ncrop_scale: [0.8, 1]\nframes: 8\n"
    )
    config = TrainConfig.load(tmp_path / "run.yaml")
    assert config.data == (DataSource("pictures", 1.0, "^a"), DataSource("films", 2.0))
    assert config.crop_scale == (0.8, 1.0) and config.frames == 8
    assert TrainConfig.from_dict(dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stepps": 1}, "unknown training field 'stepps'; did you mean 'steps'?"),
        ({"percetual": "lpips"}, "unknown training field 'percetual'; did you mean 'perceptual'?"),
        ({5: 2}, "unknown training field 5"),
        ({"stage": 3}, "'stage' must lie between 1 and 2"),
        ({"stage": 2}, "'init' must be its directory, got 'random'"),
        ({"pca_bases": 2, "init": "pca"}, "freeze_encoder true, got init 'pca' and freeze_encoder false"),
        ({"pca_bases": 2, "freeze_encoder": True}, "'pca_bases' above 1 needs init 'pca' and freeze_encoder true, got"),
        ({"stage": 2, "init": "pca"}, "'init' must be its directory, got 'pca'"),
        ({"eta": -1}, "'eta' must lie between 0"),
        ({"adversarial_weight": -1}, "'adversarial_weight' must lie between 0"),
        ({"discriminator_learning_rate": "slow"}, "'discriminator_learning_rate' must be float, got 'slow'"),
        ({"discriminator_warmup": -1}, "'discriminator_warmup' must lie between 0"),
        ({"discriminator_width": 0}, "'discriminator_width' must lie between 4"),
        ({"lecam_weight": float("nan")}, "'lecam_weight' must lie between 0"),
        ({"perceptual": True}, "'perceptual' must be str, got True"),
        ({"steps": -1}, "'steps' must lie between 0 and"),
        ({"steps": "many"}, "'steps' must be int, got 'many'"),
        ({"steps": 1.5}, "'steps' must be int, got 1.5"),
        ({"batch": True}, "'batch' must be int, got True"),
        ({"batch": 0}, "'batch' must lie between"),
        ({"crop": -1}, "'crop' must lie between"),
        ({"save_every": 0}, "'save_every' must lie between"),
        ({"log_every": 0}, "'log_every' must lie between 1"),
        ({"sample_every": -1}, "'sample_every' must lie between 0"),
        ({"seed": -1}, "'seed' must lie between 0"),
        ({"seed": 2**32}, "'seed' must lie between 0"),
        ({"workers": -1}, "'workers' must lie between 0"),
        ({"warmup": -1}, "'warmup' must lie between 0"),
        ({"learning_rate": "fast"}, "'learning_rate' must be float, got 'fast'"),
        ({"learning_rate": -1e-3}, "'learning_rate' must lie between 0"),
        ({"learning_rate": float("nan")}, "'learning_rate' must lie between 0"),
        ({"beta": None}, "'beta' must be float, got None"),
        ({"betas": [0.9]}, "'betas' must be tuple[float, float], got [0.9]"),
        ({"betas": [0.9, 1.0]}, "'betas' must lie between 0 and 1"),
        ({"ema": 1.5}, "'ema' must lie between 0 and 1"),
        ({"grad_clip": 0}, "'grad_clip' must lie between"),
        ({"short_side": 25}, "'short_side' must be tuple[int, int], got 25"),
        ({"short_side": "25"}, "'short_side' must be tuple[int, int], got '25'"),
        ({"short_side": [25, 30.5]}, "'short_side' must be tuple[int, int], got [25, 30.5]"),
        ({"short_side": [30, 25]}, "'short_side' must be (smallest, largest), got (30, 25)"),
        ({"groups": "("}, "'groups' must be a regular expression"),
        ({"frames": 0}, "'frames' must lie between"),
        ({"crop_scale": [0.8]}, "'crop_scale' must be tuple[float, float] | None, got [0.8]"),
        ({"crop_scale": [0, 1]}, "'crop_scale' must lie between"),
        ({"crop_scale": [1, 0.8]}, "'crop_scale' must be (smallest, largest)"),
        ({"data": 5}, "'data' must be a path or a list of {path, weight, groups, camera}, got 5"),
        ({"data": []}, "'data' must be a path or a list"),
        ({"data": ["pictures"]}, "'data[0]' must be a mapping with a path, got 'pictures'"),
        ({"data": [{"path": "a"}, {"weight": 2}]}, "'data[1]' must be a mapping with a path"),
        ({"data": [{"path": 3}]}, "'data[0].path' must be str, got 3"),
        ({"data": [{"path": "a", "weigth": 3}]}, "'data[0]' must hold path, weight, groups, camera alone, got weigth"),
        ({"data": [{"path": "a", "weight": "much"}]}, "'data[0].weight' must be float, got 'much'"),
        ({"data": [{"path": "a", "weight": 0}]}, "'data[0].weight' must be a positive number"),
        ({"data": [{"path": "a", "camera": -1}]}, "'data[0].camera' must lie between 0 and 1024, got -1.0"),
        ({"data": [{"path": "a", "weight": float("nan")}]}, "'data[0].weight' must be a positive number"),
        ({"data": [{"path": "a", "groups": "("}]}, "'data[0].groups' must be a regular expression"),
        ({"pixel_loss": "l3"}, "'pixel_loss' must be one of l2, l1, charbonnier, log_l2, got 'l3'"),
        ({"precision": "fp16"}, "'precision' must be one of auto, bf16, fp32"),
        ({"model": 16}, "'model' must be str, got 16"),
        ({"overrides": ["rope"]}, "'overrides' must be dict"),
        ({"overrides": {"channels": 4}}, "'overrides' must hold fields of the model's config, got 'channels'"),
        ({"overrides": {"encoder_dept": 4}}, "did you mean 'encoder_depth'?"),
        ({"overrides": {"colour": 4}}, "'overrides' must hold fields of the model's config, got 'colour'"),
        ({"overrides": {3: 4}}, "'overrides' must hold fields of the model's config, got 3"),
    ],
)
def test_bad_fields(fields, message, one_sentence):
    with pytest.raises(InputError) as error:
        TrainConfig.from_dict(NEEDED | fields)
    one_sentence(error.value, message)


def test_missing_fields(one_sentence):
    with pytest.raises(InputError) as error:
        TrainConfig.from_dict({"steps": 3})
    one_sentence(error.value, "lacks data, out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a mapping of field to value, got NoneType"),
        ("- data", "must be a mapping of field to value, got list"),
        ("data: [", "cannot read training config"),
        ("\udcff", "cannot read training config"),
        ("!!python/object/apply:os.abort []", "cannot read training config"),
    ],
)
def test_files_that_are_no_config(tmp_path, text, message, one_sentence):
    (tmp_path / "run.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError) as error:
        TrainConfig.load(tmp_path / "run.yaml")
    one_sentence(error.value, message, "run.yaml")


def test_no_file(tmp_path, one_sentence):
    with pytest.raises(InputError) as error:
        TrainConfig.load(tmp_path / "nothing.yaml")
    one_sentence(error.value, "cannot read training config", "nothing.yaml")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("steps", "expected key=value, got 'steps'"),
        ("steps=[", "cannot read the value of 'steps=['"),
        ("steps.more=1", "'steps' is no mapping"),
        ("colour=1", "unknown training field 'colour'"),
    ],
)
def test_bad_assignments(tmp_path, assignment, message, one_sentence):
    (tmp_path / "run.yaml").write_text("data: a\nout: b\nsteps: 3\n")
    with pytest.raises(InputError) as error:
        TrainConfig.load(tmp_path / "run.yaml", (assignment,))
    one_sentence(error.value, message)
