"""What test_parallel.py starts by torchrun: runs its trainings one after the other, `python ranks.py RUNS.json`.

A run is the fields of a `TrainConfig`, and `killed`: the step after which the last rank kills itself, the first time.
It leaves loss and gradient norm of every step in `out`/steps.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from vitok.parallel import joined
from vitok.train.config import TrainConfig
from vitok.train.trainer import Trainer


def main(path: str) -> None:
    torch.set_num_threads(1)
    first_time = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    with joined(torch.device("cpu")) as device:
        for fields in json.loads(Path(path).read_text()):
            killed = fields.pop("killed", None)
            _train(fields, killed if first_time else None, device)


def _train(fields: dict[str, Any], killed: int | None, device: torch.device) -> None:
    trainer, steps = Trainer(TrainConfig.from_dict(fields), device), []

    def on_step(step: int, metrics: dict[str, float]) -> None:
        steps.append((metrics["loss"], metrics["grad_norm"]))
        if step == killed and trainer.ranks.rank == trainer.ranks.count - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.run(on_step)
    if trainer.ranks.rank == 0:
        (trainer.out / "steps.json").write_text(json.dumps(steps))


if __name__ == "__main__":
    main(sys.argv[1])
