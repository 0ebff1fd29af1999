"""vitok cache, and the data set mode of vitok encode: latent caches for trainers."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vitok.cache.formats import FORMATS
from vitok.cli.common import DTYPES, finish, open_device, show_table
from vitok.cli.progress import Display
from vitok.errors import InputError

if TYPE_CHECKING:
    from vitok.cache.build import Progress, Tell
    from vitok.cache.manifest import Manifest, Statistics
    from vitok.cache.store import Store

SIZE = 256
FRAMES = 16  # of a clip for a model of pictures
MOST_WORKERS = 16
MOST_TOLD = 10  # unreadable samples

F = TypeVar("F", bound=Callable[..., Any])


def cache_options(command: F) -> F:
    """The options of `vitok encode --format`; none is given a value without it."""
    count = click.IntRange(1)
    for option in (
        click.option("--engine", type=click.Choice(["ray"]), help="Share the shards out over a Ray cluster."),
        click.option("--frames", type=count, help=f"Of each video.  [default: the model's, else {FRAMES}]"),
        click.option("--workers", type=click.IntRange(0), help="Processes that decode.  [default: by the cores]"),
        click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Of drawn samples.  [default: 0]"),
        click.option("--latents-dtype", type=click.Choice(list(DTYPES)), help="As stored.  [default: float32]"),
        click.option("--flip", is_flag=True, default=None, help="Also the latents of the mirrored pictures."),
        click.option("--shard", type=count, help="Samples of a unit of work, mostly a file.  [default: 1024]"),
        click.option("--batch", type=count, help="Pictures or clips encoded at once.  [default: 8]"),
        click.option("--format", type=click.Choice(list(FORMATS)), help="Make a latent cache of one data set."),
    ):
        command = option(command)
    return command


def fill(
    inputs: Sequence[Path], out: Path, size: int | None, model_name: str, device: str | None, dtype: str,
    given: dict[str, Any],
) -> None:  # fmt: skip
    """What `vitok encode DATASET --format` does; `given` are the values of `cache_options` that were given."""
    from vitok.cache.build import build
    from vitok.cache.listing import open_listing
    from vitok.cache.manifest import Options
    from vitok.cache.store import Store
    from vitok.checkpoint import load
    from vitok.parallel import FailedElsewhere, Ranks, joined, own_cores

    if len(inputs) != 1:
        raise InputError(f"--format makes a cache of one data set, got {len(inputs)}")
    data, engine = str(inputs[0]), given.pop("engine", None)
    workers = given.pop("workers", MOST_WORKERS if engine else min(MOST_WORKERS, own_cores()))
    _check_apart(data, out)
    encode = _ray(workers) if engine == "ray" else None
    with joined(open_device(device)) as own:
        ranks = Ranks.current()
        model = load(model_name, device=own)
        frames = given.pop("frames", model.config.clip_frames if model.config.clip_frames > 1 else FRAMES)
        stored = given.pop("latents_dtype", "float32")
        store, silent = Store(out), ranks.rank > 0
        try:
            listing = open_listing(data, frames)
            options = Options(
                **given, size=size or SIZE, frames=frames if listing.clips else 1, dtype=stored, arithmetic=dtype
            )
            with Display(silent) as display, _followed(display, "clips" if listing.clips else "images") as tell:
                for problem in listing.skipped:
                    display.say(f"skipped: {problem}")
                found = build(
                    model, listing, store, options, name=model_name, workers=workers, tell=tell, encode=encode
                )
                if found.unreadable and not silent:
                    _tell_unreadable(store, display)
        except FailedElsewhere:
            raise SystemExit(2) from None
        try:
            failed = found.unreadable + len(listing.skipped)
            finish(found.samples + failed, failed, f"encoded, cache in {out}", quiet=silent)
        finally:
            ranks.wait()  # torchrun ends all others as soon as one has failed


@contextmanager
def _followed(display: Display, unit: str) -> Iterator[Tell]:
    """What is told of progress, on a bar that appears when it is known how much there is to do."""
    with ExitStack() as stack:
        tracks: list[Callable[[int, str], None]] = []

        def tell(progress: Progress) -> None:
            if not tracks:
                tracks.append(stack.enter_context(display.track(progress.total, unit)))
            tracks[0](progress.samples, f"wait {100 * progress.waiting:.0f}%")

        yield tell


def _tell_unreadable(store: Store, display: Display) -> None:
    reasons = [each.reason for record in store.records(store.opened()) for each in record.unreadable]
    for reason in reasons[:MOST_TOLD]:
        display.say(f"error: {reason}")
    if len(reasons) > MOST_TOLD:
        display.say(f"error: and {len(reasons) - MOST_TOLD} more, told in {store.root / 'manifest'}")


def _check_apart(data: str, out: Path) -> None:
    """What is written into a data set would be part of it the next time."""
    inside, folder = os.path.realpath(out), os.path.realpath(data)
    if os.path.isdir(folder) and os.path.commonpath([folder, inside]) == folder:
        raise InputError(f"--out {out} lies in the data set {data}; choose a folder outside it")


def _ray(workers: int) -> Any:
    from vitok.cache.cluster import on_ray

    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise InputError("--engine ray finds its processes itself; start it without torchrun")
    return on_ray(workers)


def _json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Machine-readable.")(command)


_folder = click.argument("folder", metavar="CACHE", type=click.Path(path_type=Path))


@click.group()
def cache() -> None:
    """Check, describe and join latent caches, which `vitok encode --format` makes."""


@cache.command()
@_folder
def verify(folder: Path) -> None:
    """Read every file of CACHE and name those that are missing or altered; exit code 2 if there are any."""
    from vitok.cache.maintain import problems
    from vitok.cache.store import Store

    store = Store(folder)
    manifest, failed, count = store.opened(), 0, 0
    with Display() as display, display.track(None, "files") as advance:
        for path, problem in problems(store, manifest):
            count += 1
            if problem:
                failed += 1
                display.say(f"error: {problem}")
            advance(1, path)
    finish(count, failed, "files as they were written")


@cache.command()
@_folder
@_json_option
def stats(folder: Path, as_json: bool) -> None:
    """Number of samples of CACHE, mean and standard deviation of each channel, and the scaling factor."""
    from vitok.cache.manifest import Statistics
    from vitok.cache.store import Store

    store = Store(folder)
    manifest = store.opened()
    found = Statistics.of(lambda: store.records(manifest))
    if as_json:
        click.echo(json.dumps(_facts(manifest, found), indent=2))
        return
    title = f"{folder}: {manifest.options['format']}, {found.shards} of {manifest.shards} shards"
    rows = [[str(c), f"{m:.4f}", f"{s:.4f}"] for c, (m, s) in enumerate(zip(found.mean, found.std, strict=True))]
    show_table(title, ("channel", "mean", "std"), rows)
    click.echo(f"{found.samples} samples, {found.unreadable} unreadable, {len(manifest.data['classes'])} classes")
    if found.scaling_factor is not None:
        click.echo(f"scaling factor {found.scaling_factor:.5f}")


def _facts(manifest: Manifest, found: Statistics) -> dict[str, Any]:
    about = {name: getattr(manifest, name) for name in ("model", "config_hash", "weights_hash", "data", "options")}
    return {**about, "shards_expected": manifest.shards, **dataclasses.asdict(found)}


@cache.command()
@click.argument("folders", metavar="CACHE CACHE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the new cache.")
def merge(folders: tuple[Path, ...], out: Path) -> None:
    """Join safetensors caches that one model made with the same options; samples get new numbers, in this order."""
    from vitok.cache.maintain import join
    from vitok.cache.store import Store

    with Display() as display, _followed(display, "shards") as tell:
        found = join([Store(folder) for folder in folders], Store(out), tell)
    finish(found.samples, 0, f"samples in {out}")
