"""The harness of the benchmarks and the run on a GPU machine, as far as they go without a GPU."""

from __future__ import annotations

import csv
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vitok.bench import Rows, compare, measure, timing_stream
from vitok.bench.ops import Case
from vitok.bench.rows import LOST

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="gpu.sh uses GNU's timeout and env")
CPU = torch.device("cpu")

COLUMNS = ("case", "dtype", "direction", "provider", "ms_p50", "refused", "commit", "date")
KEY = {"case": "norm", "dtype": "float32", "direction": "forward"}


def written(path: Path) -> list[tuple[str, ...]]:
    with open(path, newline="") as file:
        return [(row["case"], row["provider"], row["ms_p50"] or row["refused"]) for row in csv.DictReader(file)]


def begin(path: Path, commit: str = "c1", date: str = "d1", resume: bool = True) -> Rows:
    return Rows(path, COLUMNS, {"commit": commit, "date": date}, resume)


def timed(provider: str, ms: float, **key: str) -> dict[str, object]:
    return {**KEY, **key, "provider": provider, "ms_p50": ms}


def test_rows_are_in_the_file_as_soon_as_they_are_added(tmp_path):
    path = tmp_path / "ops.csv"
    rows = begin(path)
    rows.replace(KEY, [timed("eager", 2.0), timed("ours", 1.00001)])
    assert written(path) == [("norm", "eager", "2"), ("norm", "ours", "1")]
    rows.replace(KEY | {"case": "loss"}, [timed("eager", 3.0, case="loss")])
    assert written(path)[2:] == [("loss", "eager", "3")]
    assert path.read_text().count("case,dtype") == 1 and os.listdir(tmp_path) == ["ops.csv"]


def test_rows_go_on_where_a_killed_run_stopped(tmp_path):
    path = tmp_path / "ops.csv"
    rows = begin(path)
    rows.replace(KEY, [timed("eager", 2.0), timed("ours", 1.0)])
    rows.replace(KEY | {"case": "loss"}, [timed("eager", 3.0, case="loss"), timed("ours", 3.5, case="loss")])
    path.write_bytes(path.read_bytes()[:-9])  # killed while it wrote the last row

    rows = begin(path, date="d2")
    assert rows.complete(KEY, ["eager", "ours"])
    assert not rows.complete(KEY | {"case": "loss"}, ["eager", "ours"])
    rows.replace(KEY | {"case": "loss"}, [timed("eager", 4.0, case="loss"), timed("ours", 5.0, case="loss")])
    assert written(path)[2:] == [("loss", "eager", "4"), ("loss", "ours", "5")]


def test_rows_of_another_commit_or_run_do_not_stay(tmp_path):
    path = tmp_path / "ops.csv"
    begin(path).replace(KEY, [timed("eager", 2.0)])
    for other in (begin(path, commit="c2"), begin(path, resume=False)):
        assert not other.of(KEY)
        other.replace(KEY | {"case": "loss"}, [timed("eager", 3.0, case="loss")])
        assert written(path) == [("loss", "eager", "3")]


def test_a_provider_that_fails_is_left_out_and_the_others_are_timed():
    def fails() -> None:
        raise ValueError("no")

    calls = {"good": [lambda: sum(range(100))], "bad": [fails], "also good": [lambda: sum(range(200))]}
    timings, failed = compare(calls, CPU, seconds=0.01)
    assert list(timings) == ["good", "also good"] and all(t.samples >= 5 for t in timings.values())
    assert list(failed) == ["bad"] and str(failed["bad"]) == "no"


class FakeCuda:
    """As much of torch.cuda as timing uses, which knows what the current stream is and whether it is captured."""

    def __init__(self) -> None:
        self.default = SimpleNamespace(wait_stream=lambda other: None)
        self.current, self.captured = self.default, None

    def Stream(self) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda other: None)

    def current_stream(self) -> SimpleNamespace:
        return self.current

    def synchronize(self) -> None:
        assert self.captured is None

    def CUDAGraph(self) -> SimpleNamespace:
        return SimpleNamespace(replay=lambda: None)

    def Event(self, enable_timing: bool) -> SimpleNamespace:
        return SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda other: 1.0)

    @contextmanager
    def stream(self, stream: SimpleNamespace) -> Iterator[None]:
        outer, self.current = self.current, stream
        yield
        self.current = outer

    @contextmanager
    def graph(self, graph: SimpleNamespace, stream: SimpleNamespace | None = None) -> Iterator[None]:
        with self.stream(stream or self.Stream()):
            self.captured = self.current
            try:
                yield
            except RuntimeError:
                raise RuntimeError("ending a capture that failed") from None
            finally:
                self.captured = None


def test_what_is_captured_runs_on_the_stream_it_was_made_on(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr("vitok.bench.timing.torch", SimpleNamespace(cuda=fake, device=torch.device))
    side = fake.Stream()
    monkeypatch.setattr("vitok.bench.timing._side_stream", lambda: side)
    seen = []

    def gradient_of_a_forward_made_now() -> Callable[[], None]:
        made = fake.current

        def run() -> None:
            seen.append(fake.captured is not None)
            if fake.current is not made:
                raise RuntimeError("operation would make the legacy stream depend on a capturing blocking stream")

        return run

    late = gradient_of_a_forward_made_now()
    with timing_stream(torch.device("cuda")):
        calls = {"inside": [gradient_of_a_forward_made_now()], "outside": [late]}
        timings, failed = compare(calls, torch.device("cuda"), seconds=0.0)
    assert list(timings) == ["inside"] and any(seen) and fake.current is fake.default
    assert str(failed["outside"]).startswith("operation would")


def double(**providers: Callable[[torch.Tensor], torch.Tensor]) -> Case:
    return Case(
        "norm", "4", lambda device, dtype, g: (torch.ones(4, dtype=dtype, device=device),), "eager",
        {"eager": lambda x: x * 2, **providers}, "norm",
    )  # fmt: skip


def fails(x: torch.Tensor) -> torch.Tensor:
    raise LookupError("out of shared memory\nand more")


def measured(case: Case, rows: Rows, direction: str = "forward") -> bool:
    return measure.measure(case, torch.float32, direction, CPU, lambda dtype: (1.0, 1.0), rows, seconds=0.0)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_row_for_every_provider(tmp_path, direction):
    rows = Rows(tmp_path / "ops.csv", measure.COLUMNS, {})
    case = double(good=lambda x: x + x, wrong=lambda x: x * 3, fails=fails)
    assert measured(case, rows, direction)
    assert [row["provider"] for row in rows.rows if row["ms_p50"]] == ["eager", "good"]
    assert written(tmp_path / "ops.csv")[2:] == [
        ("norm", "wrong", "its numbers are not those of the eager composition"),
        ("norm", "fails", "out of shared memory"),
    ]
    assert rows.complete(KEY | {"direction": direction}, list(case.providers))


def test_a_provider_that_breaks_the_process_is_not_tried_again(tmp_path, monkeypatch):
    case = double(breaks=fails, good=lambda x: x + x)
    monkeypatch.setattr(measure, "usable", lambda device: False)
    rows = Rows(tmp_path / "ops.csv", measure.COLUMNS, {}, resume=True)
    assert not measured(case, rows)
    assert written(tmp_path / "ops.csv") == [("norm", "breaks", LOST + "out of shared memory")]

    rows = Rows(tmp_path / "ops.csv", measure.COLUMNS, {}, resume=True)
    assert not rows.complete(KEY, list(case.providers))
    assert measured(case, rows) and rows.complete(KEY, list(case.providers))
    assert [row["provider"] for row in rows.rows if row["ms_p50"]] == ["eager", "good"]


def gpu_sh(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=60)


COMMANDS = ("bench ops --dtype bfloat16", "bench packed", "bench peers", "bench scale", "bench model S-B/16")


@LINUX
def test_dry_run_plans_every_stage_within_the_budget(tmp_path):
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0
    result = gpu_sh(SCRIPT, "--dry-run", TMPDIR=str(tmp_path), BUDGET="500")
    assert result.returncode == 0, result.stdout + result.stderr
    limits = dict(re.findall(r"^== (\w+), at most (\d+) s$", result.stdout, re.MULTILINE))
    assert list(limits) == ALL
    seconds = [int(limit) for limit in limits.values()]
    assert seconds == sorted(seconds) and seconds[0] >= 100 and seconds[-1] <= 500  # each but what the later need
    for part in ("VITOK_CUDA=on VITOK_CUDA_ARCHS=90a", "--junitxml", "test_sanitizer.py", *COMMANDS):
        assert part in result.stdout
    assert not os.listdir(tmp_path)


FAKE_PYTHON = """#!/usr/bin/env bash
echo "$*" | head -1 >> "$CALLS"
case "$*" in
    "-c import torch"*capability*) echo 90a ;;
    "-m pip install"*) [ ! -e "$CALLS.no-pip" ] ;;
    *" --dtype bfloat16 "*) [ ! -e "$CALLS.break" ] || { rm "$CALLS.break"; exit 75; } ;;
esac
"""


@pytest.fixture
def tree(tmp_path: Path) -> SimpleNamespace:
    """A source tree with gpu.sh and a Python that notes what it is asked to do, and does it by doing nothing."""
    root = tmp_path / "tree"
    for name in (
        "csrc/a.cu",
        "kernels/a.py",
        "vitok/a.py",
        "tests/a.py",
        "benchmarks/a.py",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml"):
        (root / name).write_text(name)
    shutil.copy(SCRIPT, root / "benchmarks")
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)

    def run() -> SimpleNamespace:
        """Exit code, what was printed, the lines of stages.txt, and which stages called Python."""
        calls.write_text("")
        result = gpu_sh(root / "benchmarks" / "gpu.sh", PYTHON=str(python), CALLS=str(calls))
        made = calls.read_text()
        marks = {
            "build": "pip install",
            "tests": "tests.xml",
            "sanitizer": "sanitizer.xml",
            "bench": "--dtype bfloat16",
        }
        marks["models"] = "bench packed"
        return SimpleNamespace(
            code=result.returncode,
            said=result.stdout + result.stderr,
            stages=(root / "benchmarks" / "results" / "gpu" / "stages.txt").read_text(),
            ran=[stage for stage, mark in marks.items() for _ in range(made.count(mark))],
        )

    return SimpleNamespace(root=root, run=run, set=lambda name: Path(f"{calls}.{name}").touch())


ALL = ["build", "tests", "sanitizer", "bench", "models"]


@LINUX
def test_a_stage_runs_again_when_its_sources_changed(tree):
    first = tree.run()
    assert first.code == 0 and first.ran == ALL, first.said
    again = tree.run()
    assert again.code == 0 and again.ran == [], again.said

    (tree.root / "tests" / "a.py").write_text("other")
    assert tree.run().ran == ["tests", "sanitizer"]
    rows = tree.root / "benchmarks" / "results" / "gpu" / "ops-cuda.csv"
    rows.write_text("old")
    (tree.root / "csrc" / "a.cu").write_text("other")
    assert tree.run().ran == ALL and not rows.exists()


@LINUX
def test_a_build_without_cuda_kernels_has_failed(tree):
    tree.set("no-pip")
    result = tree.run()
    assert result.code == 1 and result.ran == ALL
    assert "build failed" in result.stages and "tests done" in result.stages
    assert result.said.rstrip().endswith("gpu.sh: not done: build")
    assert "no native CUDA kernel was built, tested or timed" in result.said
    assert (tree.root / "build/gpu/site/vitok/kernels/a.py").is_file() and not (tree.root / "build/gpu/built").exists()


@LINUX
def test_what_was_done_without_native_kernels_is_done_again_with_them(tree):
    tree.set("no-pip")
    assert tree.run().code == 1
    for mark in tree.root.parent.glob("calls.no-pip"):
        mark.unlink()
    result = tree.run()
    assert result.code == 0 and result.ran == ALL


@LINUX
def test_benchmarks_go_on_in_another_process_after_a_kernel_broke_one(tree):
    tree.set("break")
    result = tree.run()
    assert result.code == 0 and result.ran == [*ALL[:4], "bench", "models"], result.said


@pytest.mark.parametrize(("seconds", "code"), [(0.5, None), (30.0, 3)])
def test_a_tool_that_takes_too_long_is_ended_and_keeps_what_it_said(tmp_path, seconds, code):
    run = runpy.run_path(str(ROOT / "tests" / "gpu" / "test_sanitizer.py"))["Run"]
    command = ["bash", "-c", "echo found; exec 2> /dev/null; " + ("exit 3" if code else "sleep 60")]
    output = tmp_path / "output"
    with open(output, "wb") as file:
        process = subprocess.Popen(command, stdout=file, start_new_session=True)
    start = time.monotonic()
    assert run(process, output, start + seconds).result() == (code, "found\n")
    assert time.monotonic() - start < 20 and process.poll() is not None
