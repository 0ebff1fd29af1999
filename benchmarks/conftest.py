"""Every result file says what it was measured with."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vitok import _native
from vitok.bench import Rows

COLUMNS = (
    "case", "op", "shape", "dtype", "input_dtype", "direction", "provider", "ms_p20", "ms_p50", "ms_p80", "samples",
    "host_us", "ratio_to_eager", "gb_per_s", "percent_of_copy", "gflop_per_s", "percent_of_matmul", "refused",
    "device", "cpu_isa", "threads", "torch", "triton", "python", "commit", "date",
)  # fmt: skip


def facts() -> dict[str, object]:
    """Where and with what this run measures. The name of the machine is nobody's business."""
    library = _native.library()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or _cpu_name(),
        "cpu_isa": library.cpu_isa() if library else "reference path",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "commit": str(_native.build_facts().get("commit", "unknown")),
        "date": datetime.date.today().isoformat(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return str(triton.__version__)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="write one CSV row a provider to ops-<device>.csv in this folder")
    parser.addoption(
        "--resume",
        action="store_true",
        help="measure only what that file lacks, if its device, versions and commit, which knows no edits, are ours",
    )


@pytest.fixture(scope="session", autouse=True)
def _full_float32() -> None:
    """No TF32, which convolutions have by default: float32 of every provider is the same arithmetic."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest) -> Rows:
    """The rows of this run, in the file of `--results` as soon as they are there."""
    folder = request.config.getoption("--results")
    device = "cuda" if torch.cuda.is_available() else f"cpu-{facts()['cpu_isa']}"
    path = folder / f"ops-{device}.csv" if folder else None
    return Rows(path, COLUMNS, facts(), resume=request.config.getoption("--resume"))


@pytest.fixture
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """`say(text)`: a line on the terminal at once."""
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    capture = request.config.pluginmanager.get_plugin("capturemanager")

    def line(text: str) -> None:
        with capture.global_and_fixture_disabled():
            terminal.ensure_newline()
            terminal.write_line(text)

    return line


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)
    machine_info["vitok"] = facts()
