"""Build of the package: Python by setuptools, the native library vitok._C by CMake and Ninja.

Switches come from the environment and are described in docs/build.md. What was built, with what, or why it was not, is
written to vitok/_build.json beside the library.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "80;90a;100"


def switch(name: str, allowed: tuple[str, ...]) -> str:
    """The value of an environment switch, by default the first allowed one; one sentence and exit for any other."""
    value = os.environ.get(name, "").strip().lower() or allowed[0]
    if value not in allowed:
        raise SystemExit(f"error: {name} is {value!r}; it must be one of {', '.join(allowed)}.")
    return value


def cuda_archs() -> list[str]:
    """Architectures to compile for, for example ["80", "90a", "100"]."""
    text = os.environ.get("VITOK_CUDA_ARCHS", "").strip() or DEFAULT_ARCHS
    archs = [arch for arch in re.split(r"[;,\s]+", text) if arch]
    if not archs or not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in archs):
        raise SystemExit(f"error: VITOK_CUDA_ARCHS is {text!r}; it must be a list such as '{DEFAULT_ARCHS}'.")
    return archs


def jobs() -> list[str]:
    """Ninja's limit on parallel compilers; none given means as many as there are processors."""
    text = os.environ.get("MAX_JOBS", "").strip()
    if text and not re.fullmatch(r"[1-9]\d*", text):
        raise SystemExit(f"error: MAX_JOBS is {text!r}; it must be a whole number from 1.")
    return ["--parallel", text] if text else []


def commit() -> str:
    """The git commit of this source, "-dirty" when edited; from the file an sdist carries, or "unknown"."""
    carried = ROOT / "COMMIT"
    if carried.is_file():
        return carried.read_text().strip()
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if result.returncode == 0:
            return result.stdout.strip()
    return "unknown"


def find_cxx() -> str | None:
    """A C++ compiler as CMake would choose it, or None."""
    chosen = os.environ.get("CXX", "").split()
    return next(filter(None, map(shutil.which, chosen[:1] or ["c++", "g++", "clang++"])), None)


def find_nvcc() -> str | None:
    """nvcc from CUDACXX, PATH, CUDA_HOME or CUDA_PATH, in this order, or None."""
    folders = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [os.environ.get("CUDACXX") or "nvcc", *(str(Path(folder, "bin", "nvcc")) for folder in folders)]
    return next(filter(None, map(shutil.which, candidates)), None)


def find_tool(name: str, folder_attribute: str) -> str:
    """cmake or ninja: of the build environment's package when there, else from PATH."""
    try:
        folder = getattr(import_module(name), folder_attribute, None)
    except ImportError:
        folder = None
    found = (folder and shutil.which(name, path=folder)) or shutil.which(name)
    if not found:
        raise SetupError(f"{name} was not found; install the package {name} or build with pip's ordinary isolation.")
    return found


class CompileError(SetupError):
    """CMake or a compiler failed; the message ends with what it said last."""


def run(command: list[str]) -> None:
    """Run a build step with its output shown; CompileError with the telling lines when it fails."""
    print("+", " ".join(command), flush=True)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.strip())
    if process.wait():
        first = next((n for n, line in enumerate(lines) if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE)), -3)
        raise CompileError(" ".join(filter(None, lines[first:][:3])) or f"{command[0]} failed without output")


def write_facts(folder: Path, facts: dict[str, object]) -> None:
    """_build.json beside the library; no date and no absolute path, so that equal builds give equal files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build.json").write_text(json.dumps({"commit": commit(), **facts}, indent=2) + "\n")


class BuildNative(build_ext):
    """Compiles vitok._C and puts it with _build.json into the wheel, or beside the sources for an editable install."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        target = ROOT / "vitok" if in_place else Path(self.build_lib, "vitok").resolve()
        target.mkdir(parents=True, exist_ok=True)
        for stale in target.glob("_C.*.so"):
            stale.unlink()
        reason = unbuildable()
        if reason:
            print(f"vitok: no native library: {reason}", flush=True)
            write_facts(target, {"native": False, "native_reason": reason, "cuda": False})
            return
        build = Path(self.build_temp).resolve()
        wanted, nvcc = switch("VITOK_CUDA", ("auto", "on", "off")), find_nvcc()
        cuda_reason = ""
        if wanted == "off":
            cuda_reason = "VITOK_CUDA=off at build time"
        elif not nvcc:
            cuda_reason = "nvcc was not found by CUDACXX, PATH, CUDA_HOME or CUDA_PATH"
            if wanted == "on":
                raise SetupError(f"VITOK_CUDA=on, but {cuda_reason}.")
        else:
            try:
                facts = self.compile(build / "cuda", nvcc)
            except CompileError as error:
                # File names without their folders: the reason is recorded, and equal builds shall record the same.
                said = re.sub(r"(?<![\w.:/])/(?:[^/\s:]+/)+", "", str(error))
                cuda_reason = f"compiling for CUDA failed: {said}"
                if wanted == "on":
                    raise SetupError(f"VITOK_CUDA=on, but {cuda_reason}") from error
        if cuda_reason:
            print(f"vitok: no CUDA kernels: {cuda_reason}", flush=True)
            build /= "cpu"
            facts = self.compile(build, None)
        else:
            build /= "cuda"
        for library in (build / "module").glob("_C.*"):
            shutil.copy2(library, target / library.name)
        archs = [] if cuda_reason else cuda_archs()
        cuda = {"cuda": not cuda_reason, "cuda_reason": cuda_reason, "cuda_archs": archs}
        write_facts(target, {"native": True, "native_reason": "", **facts, **cuda})

    def compile(self, build: Path, nvcc: str | None) -> dict[str, object]:
        """Configure and build in the folder `build`; returns CMake's record of the compilers."""
        cmake = find_tool("cmake", "CMAKE_BIN_DIR")
        try:
            pybind11_dir = import_module("pybind11").get_cmake_dir()
        except ImportError:
            raise SetupError("pybind11 was not found; install it or build with pip's ordinary isolation.") from None
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": find_tool("ninja", "BIN_DIR"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11_dir,
            "VITOK_CUDA": "ON" if nvcc else "OFF",
        }
        if nvcc:
            options |= {"CMAKE_CUDA_COMPILER": nvcc, "VITOK_CUDA_ARCHS": ";".join(cuda_archs())}
        shutil.rmtree(build / "module", ignore_errors=True)
        # A build environment has another path each time, so nothing cached from the one before may stay.
        configure = [cmake, "--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
        run([*configure, *(f"-D{name}={value}" for name, value in options.items())])
        run([cmake, "--build", str(build), *jobs()])
        facts: dict[str, object] = json.loads((build / "facts.json").read_text())
        return facts


def unbuildable() -> str:
    """Why the native library cannot or shall not be built here, or ""."""
    if switch("VITOK_NATIVE", ("auto", "off")) == "off":
        return "VITOK_NATIVE=off at build time"
    if sys.platform == "win32":
        return "Windows compilers are not supported"
    if not find_cxx():
        return "no C++ compiler was found by CXX or as c++, g++ or clang++"
    return ""


class BuildPython(build_py):
    """Copies the Python files; for a build without native library also leaves the record of why."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)  # an earlier build's modules may exist no longer
        super().run()
        if self.distribution.ext_modules:
            return
        target = ROOT / "vitok" if self.editable_mode else Path(self.build_lib, "vitok").resolve()
        for stale in target.glob("_C.*.so"):
            stale.unlink()
        write_facts(target, {"native": False, "native_reason": unbuildable(), "cuda": False})


class SourceArchive(sdist):
    """Adds the file COMMIT, because an unpacked archive has no git to ask."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        Path(base_dir, "COMMIT").write_text(commit() + "\n")


# Every switch is read before anything is done, so that a misspelt one is noticed whatever the build would have used.
switch("VITOK_CUDA", ("auto", "on", "off"))
cuda_archs()
jobs()

setup(
    packages=[*find_packages(include=["vitok", "vitok.*"]), "vitok.kernels"],
    package_dir={"vitok.kernels": "kernels"},
    include_package_data=False,
    package_data={"vitok": ["py.typed", "ops/auto.json", "weights/**"]},
    # A wheel without the library is tagged as pure Python.
    ext_modules=[] if unbuildable() else [Extension("vitok._C", sources=[])],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython, "sdist": SourceArchive},
)
