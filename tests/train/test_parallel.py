"""Two processes train as one does, by torchrun and Gloo."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import vitok
from vitok import InputError
from vitok.train import checkpoints
from vitok.train.trainer import Trainer

RANKS = Path(__file__).with_name("ranks.py")


@pytest.fixture
def on_two(torchrun, tmp_path) -> Callable[..., None]:
    """`on_two(config, ...)`: the runs, each by two ranks."""

    def run(*runs: Any, restarts: int = 0) -> None:
        path = tmp_path / "runs.json"
        path.write_text(json.dumps([run if isinstance(run, dict) else run.__dict__ for run in runs]))
        result = torchrun("--max-restarts", str(restarts), str(RANKS), str(path))
        assert result.returncode == 0, result.stderr

    return run


Steps = list[tuple[float, float]]
"""Loss and gradient norm of each."""


def steps_of(settings: Any) -> Steps:
    steps: Steps = []
    Trainer(settings).run(lambda step, metrics: steps.append((metrics["loss"], metrics["grad_norm"])))
    return steps


def assert_same(settings: Any, alone: Any, expected: Steps) -> None:
    """The run of two ranks is that of one, in its losses, gradient norms and what it exported.

    AdamW and clipping hide a gradient that is too large by a factor, but its norm does not.
    """
    found = json.loads((Path(settings.out) / "steps.json").read_text())
    for (loss, norm), (its_loss, its_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(its_loss, rel=1e-5) and norm == pytest.approx(its_norm, rel=1e-4)
    models = [vitok.load(Path(run.out) / "model") for run in (settings, alone)]
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (a - b).abs().max() <= 1e-5, name


def test_two_ranks_equal_one(config, second_stage, on_two, tmp_path):
    """The same global batch: DDP and FSDP2, both stages, batches in parts; each rank has its own part of the noise."""
    # At a small rate AdamW does not turn the rounding of a zero gradient, such as that of a key's bias, into a step.
    first = {"learning_rate": 1e-4, "beta": 1e-2, "steps": 4, "batch": 8, "latent_noise": 0.5}
    second = {"learning_rate": 1e-4, "discriminator_learning_rate": 1e-4, "steps": 3, "perceptual": "none"}
    kinds = {"ddp": {}, "fsdp": {"parallel": "fsdp", "sample_every": 1}, "parts": {"parallel": "fsdp", "accumulate": 2}}
    runs = {
        **{f"first-{kind}": config(f"first-{kind}", **first, **fields) for kind, fields in kinds.items()},
        **{f"second-{kind}": second_stage(f"second-{kind}", **second, **kinds[kind]) for kind in ("ddp", "fsdp")},
    }
    on_two(*runs.values())
    alone = {"first": config("first", **first), "second": second_stage("second", **second)}
    expected = {name: steps_of(settings) for name, settings in alone.items()}
    for name, settings in runs.items():
        assert_same(settings, alone[name.split("-")[0]], expected[name.split("-")[0]])
        shards = list(checkpoints.newest(Path(settings.out)).glob("*.safetensors"))
        assert len(shards) == 2, "each rank writes what it has"
        sheets = list(Path(settings.out, "reconstructions").iterdir())
        assert len(sheets) == (settings.steps if settings.sample_every == 1 else 1)


@pytest.mark.long
def test_a_checkpoint_loads_on_another_number_of_ranks(config, on_two):
    fields = {"learning_rate": 1e-5, "batch": 8, "save_every": 2}
    whole = config("whole", **fields)
    expected = steps_of(whole)
    split = config("split", steps=4, parallel="fsdp", **fields)
    on_two(split)
    alone = Trainer(config("split", **fields))
    assert alone.step == 4
    alone.run()
    one, two = (vitok.load(Path(run.out) / "model") for run in (whole, split))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    back = config("back", **fields)
    Trainer(config("back", steps=2, **fields)).run()
    on_two(back)
    assert_same(back, whole, expected[2:])


def test_a_rank_that_is_killed_costs_nothing_but_time(config, on_two):
    fields = {"steps": 6, "save_every": 2, "parallel": "fsdp"}
    whole, killed = config("whole", **fields), config("killed", **fields)
    on_two(whole, killed.__dict__ | {"killed": 5}, restarts=1)
    for folder in ("model", "state-00000006"):
        files = sorted((Path(whole.out) / folder).glob("*.safetensors"))
        assert files
        for file in files:
            other = load_file(Path(killed.out) / folder / file.name)
            assert all(torch.equal(other[name], x) for name, x in load_file(file).items())
    assert (Path(whole.out) / "log.csv").read_text() == (Path(killed.out) / "log.csv").read_text()


@pytest.mark.parametrize(
    ("whom", "number", "status"),
    [("rank", signal.SIGTERM, 0), ("torchrun", signal.SIGTERM, 1), ("all", signal.SIGINT, 1)],
    ids=["one rank", "torchrun", "Ctrl-C"],
)
def test_a_stop_request_saves_on_all_ranks(config, torchrun, tmp_path, whom, number, status):
    settings = config(steps=100_000, workers=1, parallel="fsdp")
    path = tmp_path / "runs.json"
    path.write_text(json.dumps([settings.__dict__ | {"stopped": [3, number, whom]}]))
    result = torchrun(str(RANKS), str(path))
    assert result.returncode == status and "KeyboardInterrupt" not in result.stderr, result.stderr
    out = Path(settings.out)
    done = len(json.loads((out / "steps.json").read_text()))  # which the first rank writes when it ends well
    assert done >= 4 and [state.name for state in out.glob("state-*")] == [f"state-{done:08d}"]
    assert vitok.load(out / "model") and Trainer(settings).step == done


def test_the_command_line_under_torchrun(config, torchrun, tmp_path):
    settings = config(steps=3)
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(settings.__dict__))
    result = torchrun(
        "--no-python", str(Path(sys.executable).with_name("vitok")), "train", str(path), "--device", "cpu"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("step 3 of 3") == 1, "one rank does the talking"


def test_a_batch_that_cannot_be_shared_out(config, one_sentence):
    with pytest.raises(InputError) as error:
        Trainer(config(batch=4, accumulate=3))
    one_sentence(error.value, "'batch' must be a multiple of ranks x accumulate, 1 x 3, got 4")
