"""What test_parallel.py starts by torchrun: runs its trainings one after the other, `python ranks.py RUNS.json`.

A run is the fields of a `TrainConfig`, and either of
- `killed`: the step after which the last rank kills itself, the first time.
- `stopped`: [step, signal, whom], "rank", "torchrun" or "all": whom the last rank sends a signal after that step. Then
  it waits until torchrun has had the time to hand on what it got.

It leaves loss and gradient norm of every step in `out`/steps.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
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
            killed, stopped = fields.pop("killed", None), fields.pop("stopped", (None,))
            _train(fields, killed if first_time else None, stopped, device)


def _train(fields: dict[str, Any], killed: int | None, stopped: Sequence[Any], device: torch.device) -> None:
    trainer, steps = Trainer(TrainConfig.from_dict(fields), device), []

    def on_step(step: int, metrics: dict[str, float]) -> None:
        steps.append((metrics["loss"], metrics["grad_norm"]))
        if step == killed and trainer.ranks.rank == trainer.ranks.count - 1:
            os.kill(os.getpid(), signal.SIGKILL)

        if step == stopped[0] and trainer.ranks.rank == trainer.ranks.count - 1:
            whom = {"rank": [os.getpid()], "torchrun": [os.getppid()], "all": [*everyone, os.getppid()]}
            for process in whom[stopped[2]]:
                os.kill(process, stopped[1])
            time.sleep(1)

    everyone = trainer.ranks.gathered([os.getpid()])
    trainer.run(on_step)
    if trainer.ranks.rank == 0:
        (trainer.out / "steps.json").write_text(json.dumps(steps))


if __name__ == "__main__":
    main(sys.argv[1])
