"""compute-sanitizer over small cases of every op: no access outside a tensor, no race, no read of unwritten memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TOOLS = ("memcheck", "racecheck", "initcheck")


def our_kernels() -> re.Pattern[str]:
    """What a report names when it concerns a kernel of this package, and not one of torch's."""
    import vitok.kernels

    names = [r"vitok::"]
    for file in Path(vitok.kernels.__path__[0]).glob("*.py"):
        names += re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)
    return re.compile("|".join(names))


@pytest.mark.parametrize("tool", TOOLS)
def test_nothing_is_reported(tool, tmp_path):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    # Each tensor an allocation of its own, so that one past its end is noticed.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options = ["--tool", tool, "--show-backtrace", "no", "--report-api-errors", "no"]
    command = [sanitizer, *options, sys.executable, str(HERE / "sanitized.py")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=400)
    if "Device not supported" in result.stdout:
        pytest.skip("compute-sanitizer does not support this device")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert re.search(r"========= (ERROR|RACECHECK) SUMMARY", result.stdout), result.stdout[-2000:]
    pattern = our_kernels()
    reports = [line for line in result.stdout.splitlines() if line.startswith("=====") and pattern.search(line)]
    assert not reports, "\n".join(reports[:20])
