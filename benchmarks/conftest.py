"""Every result file says what it was measured with."""

from __future__ import annotations

import csv
import datetime
import platform
from pathlib import Path

import pytest
import torch

from vitok import _native
from vitok.io.files import atomic_path

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


@pytest.fixture(scope="session")
def record_row(request: pytest.FixtureRequest):
    """`record_row(case=..., provider=..., ms_p50=...)`: a row of the CSV, on the terminal at once."""
    rows: list[dict[str, object]] = []
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    terminal.write_line("")

    def record(**row: object) -> None:
        rows.append(row)
        said = row.get("refused") or f"{row['ms_p50']:9.3f} ms  {row['ratio_to_eager']:6.2f}x"
        what = f"{row['case']:<28}{row['dtype']:<10}{row['direction']:<10}{row['provider']:<28}"
        terminal.write_line(f"{what} {said}")

    yield record
    folder = request.config.getoption("--results")
    if folder and rows:
        device = "cuda" if torch.cuda.is_available() else f"cpu-{facts()['cpu_isa']}"
        with atomic_path(folder / f"ops-{device}.csv") as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            for row in rows:
                numbers = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
                writer.writerow(numbers | facts())


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)
    machine_info["vitok"] = facts()
