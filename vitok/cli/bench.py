"""vitok bench: times beside the numbers that were timed, in tables, files and plots."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import click
import torch

import vitok
from vitok.bench.rows import Rows
from vitok.cli.common import DTYPES, device_option, open_device, open_folder, show_table
from vitok.cli.progress import Display
from vitok.errors import InputError

RESTART = 75  # exit code: the rows so far are in the file, and the rest needs a process of its own (with --resume)
SHOWN = {  # columns of the table on the terminal, of those that the rows have
    "case": "case", "frames": "frames", "size": "size", "batch": "batch", "dtype": "dtype", "direction": "direction",
    "path": "path", "what": "what", "provider": "provider", "layout": "layout", "ms_p50": "ms p50", "ms_p95": "p95",
    "images_per_s": "images/s", "mpixel_per_s": "Mpixel/s", "tokens_per_s": "tokens/s", "ns_per_pixel": "ns/pixel",
    "gmac": "GMAC", "percent_of_matmul": "% matmul", "percent_of_copy": "% copy", "linear_share": "linear share",
    "percent_of_encode": "% of encode alone",
    "ratio_to_eager": "x eager", "ratio_to_reference": "x reference", "ratio_to_plain": "x plain",
    "ratio_to_read": "x read", "percent_of_uniform": "% of uniform",
    "macs_ratio": "x MACs", "time_ratio": "x time", "seconds": "s", "peak_mb": "peak MB",
    "psnr_change_db": "PSNR dB", "refused": "",
}  # fmt: skip
TEXT = ("case", "path", "dtype", "direction", "what", "provider", "layout", "refused")

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Job:
    """One set of rows: `measure(rows)` adds them, and answers False when this process can measure nothing more."""

    key: Mapping[str, object]
    providers: Sequence[str]
    measure: Callable[[Rows], object]


@click.group()
def bench() -> None:
    """Time models, ops and other people's auto-encoders, side by side in one process."""


class Names(click.ParamType):
    """A list with commas between, each of it a known name; the nearest is named for one that is none."""

    name = "A,B,.."

    def __init__(self, known: Callable[[], Sequence[str]] = tuple, kind: Callable[[str], Any] = str) -> None:
        self.known, self.kind = known, kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        option = param.opts[0] if param else "list"
        parts = [part.strip() for part in value.split(",") if part.strip()]
        if not parts:
            raise InputError(f"{option} is an empty list")
        for part in parts:
            if (known := self.known()) and part not in known:
                near = difflib.get_close_matches(part, known, 1, 0.0)
                raise InputError(f"{option} {part!r} is unknown, the nearest is {near[0]!r} of {', '.join(known)}")
        try:
            return tuple(map(self.kind, parts))
        except ValueError:
            raise InputError(f"{option} must be a list such as it shows by default, got {value!r}") from None


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def _frames_and_size(text: str) -> tuple[int, int]:
    frames, _, size = text.rpartition("x")
    return _positive(frames or "1"), _positive(size)


def _model_providers() -> Sequence[str]:
    from vitok.bench.models import PROVIDERS

    return tuple(PROVIDERS)


def _peers() -> Sequence[str]:
    from vitok.bench.peers import PEERS

    return tuple(peer.name for peer in PEERS)


def run_options(seconds: float, *dtypes: str) -> Callable[[F], F]:
    """--out, --resume, --device, --seconds, and --dtype of models or the `dtypes`."""
    names = dtypes or ("float32", "bfloat16")
    default = "all" if dtypes else "the faster one here"

    def options(command: F) -> F:
        for option in (
            click.option("--resume", is_flag=True, help="Measure what the files in --out lack, if all versions agree."),
            click.option(
                "--seconds", type=click.FloatRange(0), default=seconds, show_default=True, help="Of timing a provider."
            ),
            click.option("--dtype", type=click.Choice(names), help=f"Arithmetic.  [default: {default}]"),
            device_option,
            click.option(
                "--out", default=Path("bench"), show_default=True, type=click.Path(path_type=Path),
                help="Folder for CSV, JSON and PNG files.",
            ),
        ):  # fmt: skip
            command = option(command)
        return command

    return options


def listed(name: str, default: str, what: str, *arguments: Any) -> Callable[[F], F]:
    return click.option(name, type=Names(*arguments), default=default, show_default=True, help=what)


def limit_option(seconds: float) -> Callable[[F], F]:
    what = "Seconds a call may take; a provider that would take longer is left out and says so."
    return click.option("--limit", type=click.FloatRange(0), default=seconds, show_default=True, help=what)


@bench.command()
@click.argument("name", default="S-B/16")
@click.option("--size", type=click.IntRange(1), default=256, show_default=True, help="Side of the square, pixels.")
@click.option("--frames", type=click.IntRange(1), default=1, show_default=True, help="Frames of a clip.")
@listed("--batch", "1,8", "Pictures or clips at once.", tuple, _positive)
@listed("--what", "encode,decode,both", "Of these and train.", lambda: ("encode", "decode", "both", "train"))
@click.option("--providers", type=Names(_model_providers), help="Which to time.  [default: all]")
@click.option(
    "--photos", type=click.Path(path_type=Path),
    help="Photographs by which 8-bit arithmetic is judged.  [default: examples/photos of the source tree]",
)  # fmt: skip
@run_options(1.0)
def model(
    name: str, size: int, frames: int, batch: tuple[int, ...], what: tuple[str, ...], providers: tuple[str, ...] | None,
    photos: Path | None, **options: Any,
) -> None:  # fmt: skip
    """A model's encode, decode and training step: ours in each precision, its eager reference, torch.compile.

    NAME is an architecture such as S-B/4x8 with random weights, a bundled model or a model directory.
    """
    from vitok.bench import models

    device, dtype = open_device(options["device"]), options["dtype"]
    work = models.Workload(name, size, frames, device, photos or _photos())
    chosen = providers or tuple(models.PROVIDERS)
    suite = models.Models(work, DTYPES[dtype] if dtype else models.default_dtype(device), chosen, options["seconds"])
    jobs = [Job(suite.key(b, w), chosen, partial(suite.measure, b, w)) for b in batch for w in what]
    _run("model", models.COLUMNS, models.KEY, jobs, device, options)


@bench.command()
@listed("--cases", "256,512,16x128", "Sides of pictures, and FRAMESxSIDE of clips.", tuple, _frames_and_size)
@click.option("--peers", type=Names(_peers), help="Which of them.  [default: all]")
@listed("--ours", "vitok,vitok fast bf16,vitok fast fp32", "Which of ours.", _model_providers)
@click.option("--picture-model", default="S-B/16", show_default=True, help="Ours beside those of pictures.")
@click.option("--clip-model", default="S-B/4x8", show_default=True, help="Ours beside those of clips.")
@limit_option(60.0)
@run_options(1.0)
def peers(
    cases: tuple[tuple[int, int], ...], peers: tuple[str, ...] | None, ours: tuple[str, ...], picture_model: str,
    clip_model: str, limit: float, **options: Any,
) -> None:  # fmt: skip
    """Ours beside the auto-encoders of diffusers, random weights all, one picture or clip at a time.

    Each peer in the dtype and memory layout it is fastest in; ratios are to our fastest row. Clips have one frame more
    for the peers, as their time axis wants.
    """
    from vitok.bench import models
    from vitok.bench import peers as module

    device, dtype = open_device(options["device"]), options["dtype"]
    dtype = DTYPES[dtype] if dtype else models.default_dtype(device)
    suite = module.Peers(device, ours, peers or _peers(), dtype, options["seconds"], limit)
    jobs = [
        Job(
            {"case": f"{frames} x {size} x {size}", "what": what},
            suite.providers(frames),
            partial(suite.measure, clip_model if frames > 1 else picture_model, frames, size, what),
        )
        for frames, size in cases
        for what in ("encode", "decode")
    ]
    _run("peers", module.COLUMNS, module.KEY, jobs, device, options)


@bench.command()
@listed("--sizes", "128,256,512,1024,2048,4096", "Sides of pictures.", tuple, _positive)
@listed("--frames", "1,4,16,64", "Frames of clips of 128 pixels.", tuple, _positive)
@click.option("--picture-model", default="S-B/16", show_default=True, help="The model of pictures.")
@click.option("--clip-model", default="S-B/4x8", show_default=True, help="The model of clips.")
@listed("--providers", "vitok,vitok fast bf16", "Which to time.", _model_providers)
@limit_option(20.0)
@run_options(1.0)
def scale(
    sizes: tuple[int, ...], frames: tuple[int, ...], picture_model: str, clip_model: str, providers: tuple[str, ...],
    limit: float, **options: Any,
) -> None:  # fmt: skip
    """Cost a pixel of encode and decode together, for larger and larger pictures and longer and longer clips."""
    from vitok.bench import models, series

    device, dtype = open_device(options["device"]), options["dtype"]
    dtype = DTYPES[dtype] if dtype else models.default_dtype(device)
    suite = series.Scale(device, dtype, providers, options["seconds"], limit)
    points = [(picture_model, 1, size) for size in sorted(sizes)] + [(clip_model, n, 128) for n in sorted(frames)]
    jobs = [Job(suite.key(*point), providers, partial(suite.measure, *point)) for point in points]
    _run("scale", series.SCALE_COLUMNS, series.SCALE_KEY, jobs, device, options)


@bench.command()
@click.argument("name", default="S-B/16")
@run_options(2.0)
def packed(name: str, **options: Any) -> None:
    """Pictures of mixed sizes in one call beside a uniform batch of as many tokens."""
    from vitok.bench import models, series

    device, dtype = open_device(options["device"]), options["dtype"]
    dtype = DTYPES[dtype] if dtype else models.default_dtype(device)
    jobs = [
        Job(
            series.packed_key(name, path, what, dtype),
            series.PACKED,
            partial(series.measure_packed, name, path, what, device, dtype, options["seconds"]),
        )
        for path in series.PATHS
        for what in ("encode", "decode")
    ]
    _run("packed", series.PACKED_COLUMNS, series.PACKED_KEY, jobs, device, options)


@bench.command()
@click.argument("name", default="350M-f16x64")
@click.option("--size", type=click.IntRange(1), default=256, show_default=True, help="Side of the square, pixels.")
@listed("--batch", "1,8", "Pictures at once.", tuple, _positive)
@listed("--what", "load,both", "Of these and encode, decode.", lambda: ("load", "encode", "decode", "both"))
@run_options(2.0)
def published(name: str, size: int, batch: tuple[int, ...], what: tuple[str, ...], **options: Any) -> None:
    """A ViTok-v2 model with random weights beside its plain definition, and its loading beside reading its files.

    NAME is a published model or a variant such as Ld4-Ld24/1x16x64.
    """
    from vitok.bench import models
    from vitok.bench import published as module

    device, dtype, seconds = open_device(options["device"]), options["dtype"], options["seconds"]
    dtype = DTYPES[dtype] if dtype else models.default_dtype(device)
    jobs = []
    if "load" in what:
        jobs.append(Job(module.load_key(name), module.LOADS, partial(module.measure_load, name, seconds)))
    if calls := [w for w in what if w != "load"]:
        work = module.Published(name, size, 1, device)
        suite = models.Models(work, dtype, module.SPEEDS, seconds, module.PLAIN)
        jobs += [Job(suite.key(b, w), module.SPEEDS, partial(suite.measure, b, w)) for b in batch for w in calls]
    _run("published", module.COLUMNS, models.KEY, jobs, device, options)


@bench.command()
@click.option("--case", "part", default="", help="Only cases whose name holds this.")
@run_options(0.3, "bfloat16", "float32")
def ops(part: str, **options: Any) -> None:
    """Every op beside the eager composition, its implementations and what others use, forward and backward."""
    from vitok.bench import copy_rate, matmul_rate, measure
    from vitok.bench.ops import cases
    from vitok.bench.rows import KEY

    device = open_device(options["device"])
    wanted = [DTYPES[options["dtype"]]] if options["dtype"] else [torch.bfloat16, torch.float32]
    known = cases()
    if not (chosen := [case for case in known if part in case.name]):
        raise InputError(f"--case {part!r} is in the name of no case; there are {', '.join(c.name for c in known)}")
    copy, products = copy_rate(device), {dtype: matmul_rate(device, dtype) for dtype in wanted}

    def rates(dtype: torch.dtype) -> tuple[float, float]:
        return copy, products[dtype]

    jobs = [
        Job(
            {"case": case.name, "dtype": str(dtype).removeprefix("torch."), "direction": direction},
            list(case.providers),
            partial(_op, case, dtype, direction, device, rates, seconds=options["seconds"]),
        )
        for case in chosen
        for dtype in wanted
        for direction in ("forward", "backward")
        if dtype in case.dtypes and (direction == "forward" or case.backward)
    ]
    _run("ops", measure.COLUMNS, KEY, jobs, device, options)


@bench.command()
@click.argument("name", default="S-B/16")
@click.option("--size", type=click.IntRange(1), default=256, show_default=True, help="Side of the pictures, pixels.")
@listed("--batch", "8", "Pictures encoded at once.", tuple, _positive)
@click.option("--pictures", type=click.IntRange(1), default=512, show_default=True, help="In a run.")
@click.option("--workers", type=click.IntRange(0), default=2, show_default=True, help="Processes that decode.")
@run_options(20.0)
def cache(name: str, size: int, batch: tuple[int, ...], pictures: int, workers: int, **options: Any) -> None:
    """A latent cache filled from JPEG files beside encoding the same pictures from memory; and one of many samples."""
    from vitok.bench import cache_samples, caching, models

    device, dtype = open_device(options["device"]), options["dtype"]
    dtype = DTYPES[dtype] if dtype else models.default_dtype(device)
    suites = [
        caching.Caching(name, size, each, pictures, workers, device, dtype, options["seconds"], _photos())
        for each in batch
    ]
    jobs = [Job(suite.key, caching.PROVIDERS, suite.measure) for suite in suites]
    many = partial(cache_samples.measure, workers=workers)
    jobs.append(Job(cache_samples.KEY, cache_samples.PROVIDERS, many))
    _run("cache", caching.COLUMNS, caching.KEY, jobs, device, options)


def _op(case: Any, dtype: torch.dtype, direction: str, device: Any, rates: Any, rows: Rows, seconds: float) -> bool:
    from vitok.bench.measure import measure

    return measure(case, dtype, direction, device, rates, rows, seconds)


def _photos() -> Path | None:
    found = Path(vitok.__file__).resolve().parents[1] / "examples" / "photos"
    return found if found.is_dir() else None


def _run(
    kind: str, columns: Sequence[str], key: Sequence[str], jobs: Sequence[Job], device: torch.device, options: Any
) -> None:
    """Measure what is missing; tables, JSON and plot of what is there are written however it ends."""
    from vitok.bench.machine import facts, file_name
    from vitok.bench.models import SKIPPED, full_float32

    open_folder(options["out"])
    path = options["out"] / file_name(kind, device)
    rows = Rows(path, columns, facts(device), options["resume"], key)
    able = True
    with Display() as display, _kept(rows, display), display.track(len(jobs), "measurements") as advance:
        for job in jobs:
            label = " ".join(map(str, job.key.values()))
            if not rows.complete(job.key, job.providers):
                with full_float32():
                    able = job.measure(rows) is not False
            advance(1, label)
            if not able:
                display.say(f"{label}: nothing more can be measured in this process; go on with --resume")
                break
    if not able:
        raise SystemExit(RESTART)
    failed = [row for row in rows.rows if row["refused"] and not row["refused"].startswith(SKIPPED)]
    for row in failed:
        click.echo(f"error: {' '.join(row[name] for name in key)} {row['provider']}: {row['refused']}", err=True)
    if failed:
        raise SystemExit(1)


@contextmanager
def _kept(rows: Rows, display: Display) -> Iterator[None]:
    try:
        yield
    finally:
        if rows.rows and rows.path:
            rows.write_json()
            _show(rows)
            if find_spec("matplotlib"):
                from vitok.bench.plots import plot

                display.say(f"{rows.path}, and .json and .png beside it")
                plot(rows.path)
            else:
                display.say("skipped plots: matplotlib is not installed (pip install vitok[bench])")


def _show(rows: Rows) -> None:
    """A table of the rows, without the slower variants of what has a time."""
    columns = [name for name in SHOWN if name in rows.columns]
    timed = {(*(row[name] for name in rows.key), row["provider"]) for row in rows.rows if row["ms_p50"]}
    said = [r for r in rows.rows if r["ms_p50"] or (*(r[name] for name in rows.key), r["provider"]) not in timed]
    cells = [[_cell(name, row[name]) for name in columns] for row in said]
    first = rows.rows[0]
    title = f"{first['device']}, {first['threads']} threads, torch {first['torch']}, commit {first['commit'][:12]}"
    if "layout" in columns and first["diffusers"]:
        title += f", diffusers {first['diffusers']}"
    show_table(title, [SHOWN[n] for n in columns], cells, text=[i for i, n in enumerate(columns) if n in TEXT])


def _cell(name: str, value: str) -> str:
    return f"{float(value):,.4g}" if value and name not in TEXT else value
