"""Registers, stack and shared memory of every CUDA kernel in the built library, for every architecture in it.

Usage: python csrc/cuda_resources.py [--json FILE]

Reads the compiled library with the CUDA toolkit's cuobjdump or the one in Triton's wheel; needs no GPU. Prints a row a
kernel and architecture, the worst of its template instances; exits with 1 when one keeps local memory or a stack frame,
which is where registers spill to, or an architecture is missing, and with 2 when the library holds no CUDA kernels.
--json writes the table to the section "cuda" of a file as well, beside the Triton kernels'.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from vitok import _native
from vitok.kernels.resources import save


class Usage(NamedTuple):
    """Resources of one kernel instance: registers a thread, and bytes of the rest."""

    registers: int
    stack: int
    local: int
    shared: int


def find_cuobjdump() -> str | None:
    """cuobjdump from PATH or Triton's wheel, or None."""
    triton = importlib.util.find_spec("triton")
    wheel = triton and triton.origin and Path(triton.origin).parent / "backends" / "nvidia" / "bin"
    return shutil.which("cuobjdump") or (shutil.which("cuobjdump", path=str(wheel)) if wheel else None)


def kernel_name(mangled: str) -> str:
    """The function's own name out of a mangled one: the last <length><identifier> of the nested name."""
    name, position = mangled, mangled.find("_ZN") + 3
    while match := re.match(r"\d+", mangled[position:]):
        start = position + match.end()
        position = start + int(match[0])
        name = mangled[start:position]
    return name


def parse(dump: str) -> dict[tuple[str, str], list[Usage]]:
    """(kernel, architecture) -> usage of each instance, out of `cuobjdump --dump-resource-usage`."""
    found: dict[tuple[str, str], list[Usage]] = defaultdict(list)
    arch = ""
    function = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
    for line in re.sub(r":\n\s+REG", ": REG", dump).splitlines():
        if match := re.match(r"arch = sm_(\w+)", line.strip()):
            arch = match[1]
        elif match := function.search(line):
            registers, stack, shared, local = map(int, match.groups()[1:])
            found[kernel_name(match[1]), arch].append(Usage(registers, stack, local, shared))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    library, facts, tool = _native.library(), _native.build_facts(), find_cuobjdump()
    if library is None or not facts["cuda"]:
        reason = _native.reason() if library is None else facts["cuda_reason"]
        print(f"error: the built library holds no CUDA kernels: {reason}.", file=sys.stderr)
        return 2
    if tool is None:
        print("error: cuobjdump was found neither on PATH nor in an installed Triton.", file=sys.stderr)
        return 2
    command = [tool, "--dump-resource-usage", library.__file__]
    found = parse(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    rows, problems = [], []
    print(f"{'kernel':<34}{'arch':<9}{'instances':>9}{'registers':>10}{'stack':>7}{'local':>7}{'shared':>8}")
    for kernel in sorted({kernel for kernel, _ in found}):
        for arch in facts["cuda_archs"]:
            instances = found.get((kernel, arch), [])
            if not instances:
                problems.append(f"{kernel} was not compiled for sm_{arch}")
                continue
            usage = Usage(*map(max, zip(*instances, strict=True)))
            if usage.stack or usage.local:
                problems.append(f"{kernel} for sm_{arch}: {usage.stack} bytes of stack, {usage.local} of local memory")
            rows.append({"kernel": kernel, "arch": arch, "instances": len(instances), **usage._asdict()})
            print(
                f"{kernel:<34}{'sm_' + arch:<9}{len(instances):>9}{usage.registers:>10}{usage.stack:>7}"
                f"{usage.local:>7}{usage.shared:>8}"
            )
    for problem in problems or ([] if rows else ["no kernel was found in the library"]):
        print(f"error: {problem}.", file=sys.stderr)
    if options.json:
        save(options.json, "cuda", facts["cuda_version"], rows)
    return int(bool(problems) or not rows)


if __name__ == "__main__":
    sys.exit(main())
