"""Source archive, wheels and build switches, tried on a fresh git repository that holds a copy of this source."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROCESSES = runpy.run_path(str(ROOT / "tests" / "processes.py"))
SWITCHES = ("VITOK_NATIVE", "VITOK_CUDA", "VITOK_CUDA_ARCHS", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "CXX")


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run with only the given build switches set; two compilers at once at most."""
    inherited = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    everything = {**inherited, "MAX_JOBS": "2", **environment}
    return PROCESSES["run"](command, limit=1500, cwd=cwd, env=everything)


def build(source: Path, out: Path, *kind: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m build` with the tools of this environment."""
    for tool in ("build", "pybind11", "cmake", "ninja"):
        pytest.importorskip(tool, reason=f"packages are built offline with {tool}, of the extras test and native")
    return run(sys.executable, "-m", "build", "--no-isolation", *kind, "--outdir", out, source, cwd=out, **environment)


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what git would hold, committed, so that no test writes into the working tree."""
    folder = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__", "*.egg-info")
    for name in ("csrc", "kernels", "vitok", "tests", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith(".") and file.name != "COMMIT":
            shutil.copy2(file, folder / file.name)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "source"]):
        result = run(*git, *command, cwd=folder)
        assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def commit(source) -> str:
    return run("git", "rev-parse", "HEAD", cwd=source).stdout.strip()


@pytest.fixture(scope="module")
def broken_nvcc(tmp_path_factory) -> Path:
    script = tmp_path_factory.mktemp("cuda") / "nvcc"
    script.write_text("#!/bin/sh\necho 'nvcc error: this compiler is broken' >&2\nexit 1\n")
    script.chmod(0o755)
    return script


@pytest.fixture(scope="module")
def packages(source, broken_nvcc, tmp_path_factory) -> Path:
    """The source archive, and the wheel that is built from it. CUDA is tried with a compiler that fails."""
    out = tmp_path_factory.mktemp("dist")
    result = build(source, out, CUDACXX=str(broken_nvcc))
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return out


@pytest.mark.long
def test_source_archive(packages, commit):
    (archive,) = packages.glob("vitok-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        carried = tar.extractfile(f"{archive.name.removesuffix('.tar.gz')}/COMMIT").read().decode().strip()
    assert names >= {
        "CMakeLists.txt", "csrc/bindings.cpp", "csrc/cuda/tubelet_gather.cu", "csrc/common/formulas.h", "LICENSE",
        "NOTICE", "kernels/tubelet_gather.py", "vitok/_native.py", "tests/test_packaging.py",
    }  # fmt: skip
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build.json"))]
    assert carried == commit


@pytest.mark.long
def test_wheel_from_the_source_archive(packages, commit):
    (wheel,) = packages.glob("vitok-*.whl")
    files = contents(wheel)
    assert "vitok/kernels/__init__.py" in files and "vitok/kernels/tubelet_gather.py" in files
    (library,) = (name for name in files if re.fullmatch(r"vitok/_C\..*\.so", name))
    assert f"cp{sys.version_info.major}{sys.version_info.minor}" in wheel.name
    assert not [name for name in files if re.match(r"(tests|csrc|kernels|docs|build)/", name) or name.endswith(".cpp")]
    weights = {f"vitok/{file.relative_to(ROOT / 'vitok').as_posix()}" for file in (ROOT / "vitok/weights").rglob("*")
               if file.is_file() and "__pycache__" not in file.parts}  # fmt: skip
    assert weights <= set(files)
    (metadata,) = (text.decode() for name, text in files.items() if name.endswith(".dist-info/METADATA"))
    assert "License-Expression: Apache-2.0" in metadata
    assert {name.rpartition("/licenses/")[2] for name in files if "/licenses/" in name} == {"LICENSE", "NOTICE"}
    required = set(re.findall(r"^Requires-Dist: ([\w.-]+)(?!.*extra ==)", metadata, re.M))
    assert required == {"torch", "numpy", "safetensors", "pillow", "click", "rich"}
    (entry,) = (text.decode() for name, text in files.items() if name.endswith("entry_points.txt"))
    assert "vitok = vitok.cli:main" in entry

    facts = json.loads(files["vitok/_build.json"])
    assert facts["native"] is True and facts["commit"] == commit
    assert facts["cuda"] is False and facts["cuda_archs"] == []
    assert facts["cuda_reason"].startswith("compiling for CUDA failed:")
    assert not re.search(rb"/(home|tmp|root|work)/", files["vitok/_build.json"])
    assert str(packages.parent).encode() not in files[library], "the library must not hold the paths of its build"


@pytest.mark.long
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"VITOK_NATIVE": "off"}, "VITOK_NATIVE=off at build time"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler was found by CXX or as c++, g++ or clang++"),
    ],
)
def test_wheel_without_the_library(source, tmp_path, environment, reason):
    result = build(source, tmp_path, "--wheel", **environment)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    wheel = tmp_path / "vitok-0.1.0-py3-none-any.whl"
    files = contents(wheel)
    assert not [name for name in files if name.endswith(".so")]
    assert json.loads(files["vitok/_build.json"])["native_reason"] == reason

    target = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel]
    pip = run(*install, cwd=tmp_path)
    assert pip.returncode == 0, pip.stderr
    code = "import vitok; from vitok import _native as n; print(vitok.__file__, n.library(), n.reason(), sep='|')"
    # Without site (-S) there is no editable install of this environment to find the library after all.
    path = os.pathsep.join([str(target), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    imported = run(sys.executable, "-S", "-c", code, cwd=tmp_path, PYTHONPATH=path)
    assert imported.stdout.strip() == f"{target / 'vitok' / '__init__.py'}|None|{reason}", imported.stderr


@pytest.mark.long
def test_cuda_on_without_nvcc_is_an_error(source, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "c++").symlink_to(shutil.which("c++") or "/usr/bin/c++")
    result = build(source, tmp_path, "--wheel", VITOK_CUDA="on", PATH=str(tools))
    assert result.returncode != 0
    sentence = "VITOK_CUDA=on, but nvcc was not found by CUDACXX, PATH, CUDA_HOME or CUDA_PATH."
    assert sentence in result.stdout + result.stderr
    assert not list(tmp_path.glob("*.whl"))


@pytest.mark.long
def test_cuda_on_with_a_failing_nvcc_is_an_error(source, tmp_path, broken_nvcc):
    result = build(source, tmp_path, "--wheel", VITOK_CUDA="on", CUDACXX=str(broken_nvcc))
    assert result.returncode != 0
    assert "VITOK_CUDA=on, but compiling for CUDA failed: " in result.stdout + result.stderr
    assert not list(tmp_path.glob("*.whl"))


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"VITOK_CUDA": "maybe"}, "error: VITOK_CUDA is 'maybe'; it must be one of auto, on, off."),
        ({"VITOK_NATIVE": "on"}, "error: VITOK_NATIVE is 'on'; it must be one of auto, off."),
        ({"VITOK_CUDA_ARCHS": "x"}, "error: VITOK_CUDA_ARCHS is 'x'; it must be a list such as '80;90a;100'."),
        ({"MAX_JOBS": "0"}, "error: MAX_JOBS is '0'; it must be a whole number from 1."),
    ],
)
def test_unknown_switch_values_are_one_sentence(environment, sentence):
    pytest.importorskip("setuptools")
    result = run(sys.executable, ROOT / "setup.py", "--version", cwd=ROOT, **environment)
    assert result.returncode != 0
    assert result.stderr.strip() == sentence


def test_torch_is_no_build_requirement():
    text = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"^requires = \[(.*)\]", text, re.M)
    assert requires and "torch" not in requires[1] and "pybind11" in requires[1]


@pytest.mark.long
def test_an_installed_wheel_passes_the_core_of_the_suite(packages, tmp_path):
    """With no source tree in sight; the kernels' own interpreter tests need no second run."""
    (wheel,) = packages.glob("vitok-*.whl")
    site = tmp_path / "site"
    pip = run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel, cwd=tmp_path)
    assert pip.returncode == 0, pip.stderr
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "pyproject.toml", tmp_path)
    where = run(sys.executable, "-c", "import vitok; print(vitok.__file__)", cwd=tmp_path, PYTHONPATH=str(site))
    assert where.stdout.strip() == str(site / "vitok" / "__init__.py"), where.stderr
    core = ["tests/test_model.py", "tests/test_native.py", "tests/test_checkpoint.py", "tests/ops"]
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not long", "-k", "not triton"]
    result = run(*pytest_, *core, cwd=tmp_path, PYTHONPATH=str(site))
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert re.search(r"\d{3,} passed", result.stdout), result.stdout[-1000:]
