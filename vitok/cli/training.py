"""vitok train."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch

from vitok.cli.common import device_option, open_device
from vitok.cli.progress import Display

if TYPE_CHECKING:
    from vitok.train.config import TrainConfig

MUCH_WAITING = 20.0
"""Percentage of a run's time from which its input is called the limit."""


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("assignments", nargs=-1, metavar="[KEY=VALUE]...")
@device_option
def train(config: Path, assignments: tuple[str, ...], device: str | None) -> None:
    """Train a model as the YAML file CONFIG says, with fields replaced by KEY=VALUE.

    Goes on where a stopped run left off. Ctrl-C or SIGTERM stops after the step at hand and saves.
    """
    from vitok.parallel import joined
    from vitok.train.config import TrainConfig

    settings = TrainConfig.load(config, assignments)
    with joined(open_device(device)) as own:
        _train(settings, own)


def _train(settings: TrainConfig, device: torch.device) -> None:
    from vitok.bench.timing import matmul_rate
    from vitok.parallel import Ranks
    from vitok.train.records import CURVES, LOG, SHEETS, draw_curves, lacking
    from vitok.train.trainer import MODEL, Trainer

    with Display(silent=Ranks.current().rank > 0) as display:
        trainer = Trainer(settings, device, track=display.over)
        if trainer.ranks.rank > 0:
            trainer.run()  # the first rank does the talking
            return
        told = 0

        def tell_skipped() -> None:
            nonlocal told
            for problem in list(trainer.skipped)[told:]:
                display.say(f"skipped: {problem}")
            told = len(trainer.skipped)

        tell_skipped()
        about = f"{trainer.parameters / 1e6:.2f} M parameters, {trainer.data.contents}"
        display.say(f"{about}, step {trainer.step} of {settings.steps}")
        for what in lacking():
            display.say(f"skipped {what}")
        fastest = matmul_rate(device, trainer.dtype)  # in operations a second
        with display.track(settings.steps - trainer.step, "steps") as advance:

            def on_step(step: int, m: dict[str, float]) -> None:
                tell_skipped()
                speed = f"{m['images_per_s']:.3g} images/s {100 * m['operations_per_s'] / fastest:.0f}% of matmul"
                label = f"loss {m['loss']:.5f} psnr {m['psnr']:.2f} dB {speed} wait {m['data_wait']:.0f}%"
                advance(1, f"{label} skipped {m['skipped']}" if told else label)

            trainer.run(on_step)
    draw_curves(trainer.out)
    click.echo(f"step {trainer.step} of {settings.steps}; averaged model in {trainer.out / MODEL}")
    for what, name in (("log", LOG), ("curves", CURVES), ("reconstructions", SHEETS)):
        if (trainer.out / name).exists():
            click.echo(f"{what} in {trainer.out / name}")
    if trainer.data_wait > MUCH_WAITING:
        waited = f"steps waited {trainer.data_wait:.0f}% of the time for data"
        click.echo(f"{waited}; raise training field 'workers', which is {settings.workers}", err=True)
    if trainer.step < settings.steps:
        click.echo("stopped early; the same command goes on from here", err=True)
