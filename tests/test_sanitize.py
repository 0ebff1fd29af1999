"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, called with random arguments."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "csrc" / "sanitize.sh"


@pytest.mark.long
@pytest.mark.skipif(not SCRIPT.is_file(), reason="needs the source tree")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_nothing_is_reported():
    pytest.importorskip("pybind11", reason="needs the build's tools")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHON"] = sys.executable
    result = subprocess.run([SCRIPT], capture_output=True, text=True, env=environment, timeout=900)
    print(result.stdout[-4000:])
    assert result.returncode == 0, result.stderr[-4000:]
    assert "0 failures" in result.stdout
