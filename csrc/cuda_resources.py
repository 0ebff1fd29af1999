"""Registers, stack, spills and shared memory of every CUDA kernel: compile each source for each architecture and tell.

Usage: python csrc/cuda_resources.py [--archs "80;90a;100"] [--json FILE] [source.cu ...]

Needs nvcc (CUDACXX or PATH) and no GPU. Prints one row per source, architecture and kernel, the worst of its template
instances; exits 1 when any instance spills or keeps a stack frame, 2 when a source does not compile or nvcc is missing.
--json writes the table to the section "cuda" of a file as well, beside the Triton kernels'.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

SOURCES = sorted(Path(__file__).resolve().parent.glob("cuda/*.cu"))


class Usage(NamedTuple):
    """Resources of one kernel instance: registers a thread, and bytes of the rest."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


def parse(log: str) -> list[tuple[str, Usage]]:
    """(mangled name, usage) of every entry point in the output of `ptxas -v`."""
    found = []
    for block in re.split(r"(?=ptxas info\s+: Compiling entry function)", log)[1:]:
        entry = re.search(r"entry function '([^']+)'", block)
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block)
        used = re.search(r"Used (\d+) registers", block)
        if not (entry and frame and used):
            raise ValueError(f"this output of ptxas -v is not understood:\n{block}")
        shared = re.search(r"(\d+) bytes smem", block)
        usage = Usage(int(used[1]), *map(int, frame.groups()), shared=int(shared[1]) if shared else 0)
        found.append((entry[1], usage))
    return found


def kernel_name(mangled: str) -> str:
    """The function's own name out of a mangled one: the last <length><identifier> of the nested name."""
    name, position = mangled, mangled.find("_ZN") + 3
    while match := re.match(r"\d+", mangled[position:]):
        start = position + match.end()
        position = start + int(match[0])
        name = mangled[start:position]
    return name


def compile_source(nvcc: str, source: Path, arch: str) -> str:
    """What ptxas says of `source` for sm_<arch>; CalledProcessError when it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        target = ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "-cubin", "-o", str(Path(folder, "out.cubin"))]
        command = [nvcc, "-std=c++17", "-O3", "-Xptxas", "-v", *target, str(source)]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


def save(file: Path, section: str, version: str, rows: list[dict[str, object]]) -> None:
    """Replace one section of a JSON file that holds a row a line."""
    known = json.loads(file.read_text()) if file.is_file() else {}
    known[section] = {"version": version, "rows": rows}
    parts = []
    for name, part in sorted(known.items()):
        lines = ",\n".join(json.dumps(row) for row in part["rows"])
        parts.append(f'"{name}": {{"version": "{part["version"]}", "rows": [\n{lines}\n]}}')
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", default=os.environ.get("VITOK_CUDA_ARCHS") or "80;90a;100")
    parser.add_argument("--json", type=Path)
    parser.add_argument("sources", nargs="*", type=Path, default=SOURCES, help="default: all of csrc/cuda")
    options = parser.parse_args()
    archs = [arch for arch in re.split(r"[;,\s]+", options.archs) if arch]
    nvcc = shutil.which(os.environ.get("CUDACXX") or "nvcc")
    if nvcc is None:
        print("error: nvcc was not found by CUDACXX or PATH.", file=sys.stderr)
        return 2
    tasks = [(source, arch) for source in options.sources for arch in archs]
    spilled, rows = False, []
    print(
        f"{'source':<22}{'arch':<9}{'kernel':<34}{'instances':>9}{'registers':>10}{'stack':>7}{'spills':>8}{'shared':>8}"
    )
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or 2)) as pool:
        logs = [pool.submit(compile_source, nvcc, *task) for task in tasks]
        for (source, arch), log in zip(tasks, logs, strict=True):
            try:
                usages = parse(log.result())
            except subprocess.CalledProcessError as error:
                print(f"{error.output}\nerror: {source.name} does not compile for sm_{arch}.", file=sys.stderr)
                return 2
            kernels: dict[str, list[Usage]] = defaultdict(list)
            for mangled, usage in usages:
                kernels[kernel_name(mangled)].append(usage)
            for kernel, instances in kernels.items():
                registers, stack, stores, loads, shared = map(max, zip(*instances, strict=True))
                spilled |= bool(stack or stores or loads)
                usage = Usage(registers, stack, stores, loads, shared)._asdict()
                rows.append(
                    {"source": source.name, "kernel": kernel, "arch": arch, "instances": len(instances), **usage}
                )
                print(
                    f"{source.name:<22}{'sm_' + arch:<9}{kernel:<34}{len(instances):>9}{registers:>10}{stack:>7}"
                    f"{stores + loads:>8}{shared:>8}",
                    flush=True,
                )
    if options.json:
        said = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
        version = re.search(r"release [\d.]+, V([\d.]+)", said)
        save(options.json, "cuda", version[1] if version else "unknown", rows)
    return int(spilled)


if __name__ == "__main__":
    sys.exit(main())
