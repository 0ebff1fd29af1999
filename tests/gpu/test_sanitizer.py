"""compute-sanitizer over small cases of every op: no access outside a tensor, no race, no read of unwritten memory."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).parent
TOOLS = ("memcheck", "racecheck", "initcheck")
# For all of them together: what benchmarks/gpu.sh gives this file, but for the time to say what was found.
SECONDS = float(os.environ.get("VITOK_STAGE_SECONDS", "400")) - 10


def our_kernels() -> re.Pattern[str]:
    """What a report names when it concerns a kernel of this package, and not one of torch's."""
    import vitok.kernels

    names = [r"vitok::"]
    for file in Path(vitok.kernels.__path__[0]).glob("*.py"):
        names += re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)
    return re.compile("|".join(names))


class Run(NamedTuple):
    """One tool at work: its process, where its output goes, and when it has to be done (time.monotonic)."""

    process: subprocess.Popen[bytes]
    output: Path
    deadline: float

    def result(self) -> tuple[int | None, str]:
        """Exit code, None when it was ended for taking too long, and what was printed until then."""
        code = None
        with suppress(subprocess.TimeoutExpired):
            code = self.process.wait(max(0.0, self.deadline - time.monotonic()))
        self.end()
        return code, self.output.read_text(errors="replace")

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """All tools at once, each over the same program."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    # Each tensor an allocation of its own, so that one past its end is noticed.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
    folder = tmp_path_factory.mktemp("sanitizer")
    deadline = time.monotonic() + SECONDS
    started = {}
    for tool in TOOLS:
        options = ["--tool", tool, "--show-backtrace", "no", "--report-api-errors", "no"]
        command = [sanitizer, *options, sys.executable, str(HERE / "sanitized.py")]
        with open(folder / tool, "wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=folder, start_new_session=True
            )
        started[tool] = Run(process, folder / tool, deadline)
    yield started
    for run in started.values():
        run.end()


@pytest.mark.parametrize("tool", TOOLS)
def test_nothing_is_reported(tool, runs):
    code, said = runs[tool].result()
    if "Device not supported" in said:
        pytest.skip("compute-sanitizer does not support this device")
    pattern = our_kernels()
    reports = [line for line in said.splitlines() if line.startswith("=====") and pattern.search(line)]
    assert not reports, "\n".join(reports[:20])
    assert code is not None, f"not done after {SECONDS:.0f} s, nothing reported until then:\n{said[-2000:]}"
    assert code == 0, said[-4000:]
    assert re.search(r"========= (ERROR|RACECHECK) SUMMARY", said), said[-2000:]
