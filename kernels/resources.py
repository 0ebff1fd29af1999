"""What every Triton kernel costs on every GPU generation, found without a GPU.

    python -m vitok.kernels.resources [--archs 80,90,100] [--ops norm,attention] [--json FILE]

Each case of resource_cases.py calls a public op, forward and backward, on CPU tensors. Triton's own launch code runs
up to the point where it would compile, so that signature, specialisation (divisible by 16, equal to 1), constants and
options are those of a launch. What it would compile is compiled for each architecture and disassembled. Prints a row a
kernel; exits with 1 when one spills, uses local memory or misses the matrix instruction its case demands.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from vitok.kernels.resource_cases import CASES, Case

# The names of matrix instructions in machine code: of one warp, of a warp group (Hopper), of a block (Blackwell).
MATRIX = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA)\b")
DEMANDS = {
    "mma": {80: r"HMMA", 90: r"HG?MMA", 100: r"HMMA|UTC\w*MMA"},  # any
    "wide mma": {80: r"HMMA", 90: r"HGMMA", 100: r"UTC\w*MMA"},  # the largest the generation has
}
COUNTED = ("FFMA", "LDG.E.64", "LDG.E.128", "STG.E.64", "STG.E.128", "LDGSTS", "LDL", "STL")


class Launch(NamedTuple):
    """One distinct compilation: its first case, and the arguments of Triton's compiler."""

    op: str
    case: Case
    arch: int
    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    def tile(self) -> str:
        """The constants that are not tensors' properties, such as "BLOCK=1024 PAD_ZERO=0"."""
        names = list(self.signature)
        values = [(names[path[0]], value) for path, value in self.constants.items() if len(path) == 1]
        return " ".join(f"{n}={int(v) if isinstance(v, bool) else v}" for n, v in values if n.isupper())


@contextmanager
def recorder() -> Iterator[Callable[[str, Case, int], list[Launch]]]:
    """`record(op, case, arch)`: what the case would compile that no case before it did. Nothing is launched."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    launches: list[Launch] = []
    current: list[Any] = []

    class Driver:
        """A machine whose device n is a GPU of compute capability n; Triton keeps its caches by device."""

        def get_current_device(self) -> int:
            return int(current[2])

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", current[2], 32)

    compiled = SimpleNamespace(
        run=lambda *_: None, launch_metadata=lambda *_: None, function=None, packed_metadata=None
    )

    def compile_nothing(self, key, signature, device, constants, options, attributes, warmup):  # type: ignore[no-untyped-def]
        launches.append(Launch(*current, self, signature, constants, attributes, dict(options.__dict__)))
        self.device_caches[device][0][key] = compiled
        return compiled

    def record(op: str, case: Case, arch: int) -> list[Launch]:
        launches.clear()
        current[:] = op, case, arch
        capability = (arch // 10, arch % 10)
        properties = SimpleNamespace(multi_processor_count={80: 108, 90: 132}.get(arch, 148), major=capability[0])
        with (
            mock.patch("torch.cuda.get_device_capability", lambda *_: capability),
            mock.patch("torch.cuda.get_device_properties", lambda *_: properties),
            mock.patch.object(Tensor, "is_cuda", property(lambda _: True), create=True),
            mock.patch.object(Tensor, "is_cpu", property(lambda _: False), create=True),
        ):
            case.run()
        return list(launches)

    driver.set_active(Driver())
    with mock.patch.object(jit.JITFunction, "_do_compile", compile_nothing):
        yield record


def measure(launch: Launch) -> dict[str, Any]:
    """Compile and disassemble; the row of the table."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", launch.arch, 32), options=launch.options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.check_output([tools / "cuobjdump", "--dump-resource-usage", cubin.name], text=True)
        quiet = {"text": True, "stderr": subprocess.DEVNULL}  # it warns of an ELF format of its own
        # Without its analysis of branches, which takes longer than the compilation and says nothing of instructions.
        code = subprocess.check_output([tools / "nvdisasm", "--no-dataflow", cubin.name], **quiet)
    sizes = {key: int(match[1]) for key in ("REG", "STACK", "LOCAL") if (match := re.search(rf"{key}:(\d+)", usage))}
    matrix = Counter(MATRIX.findall(code))
    return {
        "op": launch.op,
        "kernel": launch.kernel.fn.__name__,
        "case": launch.case.label,
        "tile": launch.tile(),
        "arch": launch.arch,
        "num_warps": launch.options["num_warps"],
        "num_stages": launch.options["num_stages"],
        "registers": sizes["REG"],
        "shared": compiled.metadata.shared,
        "stack": sizes["STACK"],
        "local": sizes["LOCAL"],
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "multiplies": "tt.dot" in compiled.asm["ttir"],
        "matrix": dict(sorted(matrix.items())),
        "instructions": {name: len(re.findall(rf"\b{re.escape(name)}\b", code)) for name in COUNTED},
    }


def problem(row: dict[str, Any], demands: str | None) -> str:
    """What a row must not be, or ""."""
    if row["spills"] or row["local"] or row["stack"]:
        return f"{row['spills']} spills, {row['local']} bytes of local memory, {row['stack']} of stack"
    if demands and row["multiplies"]:
        wanted = DEMANDS[demands].get(row["arch"], MATRIX.pattern)
        if not any(re.fullmatch(wanted, name) for name in row["matrix"]):
            return f"no {wanted} in the machine code"
    return ""


_LAUNCHES: list[Launch] = []  # found before the processes fork, which then need no copies of what cannot be pickled


def _measure(index: int) -> dict[str, Any]:
    try:
        return measure(_LAUNCHES[index])
    except Exception as error:
        said = str(error).strip().splitlines() or [""]
        return {"error": f"{type(error).__name__}: {said[-1]}"}


def save(file: Path, section: str, version: str, rows: list[dict[str, Any]]) -> None:
    """Replace one section of a JSON file that holds a row a line; the CUDA kernels' script writes another."""
    known = json.loads(file.read_text()) if file.is_file() else {}
    known[section] = {"version": version, "rows": rows}
    parts = []
    for name, part in sorted(known.items()):
        lines = ",\n".join(json.dumps(row) for row in part["rows"])
        parts.append(f'"{name}": {{"version": "{part["version"]}", "rows": [\n{lines}\n]}}')
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", default="80,90,100", help="compute capabilities, default %(default)s")
    parser.add_argument("--ops", default=",".join(CASES), help="default: all")
    parser.add_argument("--json", type=Path, help="write the table to this file as well, in its section 'triton'")
    parser.add_argument("--jobs", type=int, default=int(os.environ.get("MAX_JOBS") or 2))
    options = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "0"  # decides what triton.jit makes of the kernels, which are imported below
    torch.set_num_threads(1)

    import triton

    archs, start = [int(arch) for arch in re.split(r"[;,\s]+", options.archs)], time.monotonic()
    idle = []
    with recorder() as record:
        for op in options.ops.split(","):
            for case in CASES[op]():
                found = [record(op, case, arch) for arch in archs if arch >= case.oldest]
                idle += [f"{op}, {case.label}" for launches in found[:1] if not launches]
                _LAUNCHES.extend(launch for launches in found for launch in launches)
    print(f"{len(_LAUNCHES)} compilations, triton {triton.__version__}, {options.jobs} processes", flush=True)
    for case in idle:
        print(f"note: {case} launches nothing that an earlier case does not", flush=True)

    rows, problems = [], []
    header = ("kernel", "case", "arch", "warps", "stages", "registers", "shared", "spills", "matrix")
    layout = "{:<34} {:<46} {:<7}{:>5}{:>7}{:>10}{:>8}{:>7}  {}"
    print(layout.format(*header), flush=True)
    with multiprocessing.get_context("fork").Pool(options.jobs, maxtasksperchild=64) as pool:
        for launch, row in zip(_LAUNCHES, pool.imap(_measure, range(len(_LAUNCHES))), strict=True):
            name = f"{launch.kernel.fn.__name__}, {launch.case.label}, sm_{launch.arch}"
            wrong = row.get("error") or problem(row, launch.case.demands)
            if wrong:
                problems.append(f"{name}: {wrong} [{launch.tile()} num_warps={launch.options['num_warps']}]")
            if "error" in row:
                continue
            rows.append(row)
            matrix = " ".join(f"{count} {name}" for name, count in row["matrix"].items()) or "-"
            columns = (row["num_warps"], row["num_stages"], row["registers"], row["shared"], row["spills"], matrix)
            print(layout.format(row["kernel"], row["case"], f"sm_{row['arch']}", *columns), flush=True)
    for text in problems:
        print(f"error: {text}", file=sys.stderr)
    if options.json:
        save(options.json, "triton", triton.__version__, rows)
    print(f"{len(rows)} kernels, {len(problems)} problems, {time.monotonic() - start:.0f} s", flush=True)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
