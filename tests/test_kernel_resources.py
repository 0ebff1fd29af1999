"""The machine code of every kernel for every GPU generation, compiled without a GPU, and the committed table of it."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vitok import _native

pytest.importorskip("triton", reason="needs triton")

ROOT = Path(__file__).resolve().parents[1]
CUDA_RESOURCES = ROOT / "csrc" / "cuda_resources.py"
COMMITTED = ROOT / "benchmarks" / "results" / "kernel-resources.json"


@pytest.fixture(scope="module")
def table(processes: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Section "triton" of the table for one GPU generation, made now; `make kernels-check` does all three."""
    file = tmp_path_factory.mktemp("resources") / "table.json"
    command = [sys.executable, "-m", "vitok.kernels.resources", "--archs", "90", "--json", str(file)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = processes.run(command, limit=1500, env=environment, cwd=file.parent)
    print(result.stdout)
    assert result.returncode == 0, result.stderr
    return json.loads(file.read_text())["triton"]


@pytest.mark.long
def test_every_kernel_fits_its_registers(table):
    """The command checks spills, local memory and matrix instructions itself and has returned 0."""
    assert {row["arch"] for row in table["rows"]} == {90}
    assert max(row["registers"] for row in table["rows"]) <= 255


@pytest.mark.long
def test_every_kernel_of_the_package_is_in_the_table(table):
    """A launcher or a tile without a case would be proven by nobody."""
    from vitok.kernels import resources

    folder = Path(resources.__file__).parent
    defined = set()
    for file in folder.glob("*.py"):
        lines = file.read_text().splitlines()
        defined |= {line[4:].split("(")[0] for line in lines if line.startswith("def ") and "_kernel(" in line}
    assert {row["kernel"] for row in table["rows"]} == defined


@pytest.mark.long
def test_the_committed_table_is_current(table):
    committed = json.loads(COMMITTED.read_text())["triton"]
    if committed["version"] != table["version"]:
        pytest.skip(f"made with triton {committed['version']}, this is {table['version']}")
    assert [row for row in committed["rows"] if row["arch"] == 90] == table["rows"], "run `make kernels-table`"


@pytest.mark.long
def test_tubelet_gather_has_wide_accesses_and_no_fused_rounding(table):
    rows = [row for row in table["rows"] if row["kernel"] == "tubelet_gather_forward_kernel"]
    rows = [row for row in rows if "P=3" not in row["tile"]]  # whose rows are not aligned
    assert rows
    for row in rows:
        instructions = row["instructions"]
        assert instructions["FFMA"] == 0, f"product and sum must be rounded separately: {row}"
        assert instructions["STG.E.128"] > 0, f"stores are to be 16 bytes wide: {row}"
        if "WHOLE_ROWS=1" in row["tile"]:
            wide = instructions["LDG.E.64"] + instructions["LDG.E.128"]
            assert wide > 0, f"interleaved rows are to be read by wide loads: {row}"


def test_cuda_kernels_of_the_built_library_do_not_spill(processes):
    result = processes.run([sys.executable, CUDA_RESOURCES])
    facts = _native.build_facts()
    if _native.library() is None or not facts["cuda"]:
        assert (result.returncode, result.stdout) == (2, "")
        assert re.fullmatch(r"error: the built library holds no CUDA kernels: .+\.\n", result.stderr)
        return
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line.split() for line in result.stdout.splitlines()[1:]]
    sources = "".join(file.read_text() for file in (ROOT / "csrc" / "cuda").glob("*.cu"))
    defined = set(re.findall(r"(\w+_kernel)\(", "".join(sources)))
    assert {(kernel, arch) for kernel, arch, *_ in rows} == {
        (k, f"sm_{a}") for k in defined for a in facts["cuda_archs"]
    }
    for _, _, instances, registers, stack, local, _ in rows:
        assert int(instances) > 0 and 0 < int(registers) <= 255 and int(stack) == int(local) == 0
