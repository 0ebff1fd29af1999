"""Models small enough to run in milliseconds, pictures to run them on, and how two numbers are judged."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

# Without a GPU the Triton kernels run in Triton's interpreter, which is chosen before triton and vitok are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import vitok
from vitok import _native
from vitok.ops._registry import preferring

torch.set_num_threads(1)  # everything here is too small to share

PROCESSES = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("processes.py"))))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny() -> Callable[..., vitok.ViTok]:
    """`tiny(name, **config fields)`: a model of two narrow blocks a stack whose every parameter is random."""

    def make(name: str = "S-S/8", *, preset: str = "paper", seed: int = 0, **fields: object) -> vitok.ViTok:
        if preset == "v2" and name == "S-S/8":
            name = "B-B/8"
        sizes = {
            "channels": 4, "encoder_width": 48, "encoder_heads": 2, "encoder_depth": 2, "encoder_hidden": 80,
            "decoder_width": 96, "decoder_heads": 4, "decoder_depth": 2, "decoder_hidden": 136,
        }  # fmt: skip
        model = vitok.create_model(name, preset=preset, **(sizes | fields)).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                spread = 0.5 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
                centre = 1.0 if parameter.dim() == 1 and not key.endswith("bias") else 0.0
                parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
        return model

    return make


@pytest.fixture
def pixels() -> Callable[..., Tensor]:
    """`pixels(*shape)`: random uint8 of that shape."""

    def make(*shape: int, seed: int = 0) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of three smooth pictures with a little noise, from 24 x 24 pixels to 40 x 32."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate([(24, 24), (32, 40), (40, 32)]):
        y, x = np.mgrid[:height, :width] / 40
        waves = [np.sin((3 + i) * x + c) * np.cos((2 + c) * y + i) for c in range(3)]
        picture = 128 + 80 * np.stack(waves, -1) + rng.normal(0, 4, (height, width, 3))
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"picture_{i}.png")
    return folder


@pytest.fixture(scope="session")
def processes() -> SimpleNamespace:
    """The names of tests/processes.py."""
    return PROCESSES


@pytest.fixture
def torchrun() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`torchrun(*arguments)`: torchrun with two processes."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
        return PROCESSES.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"})

    return run


@pytest.fixture
def python() -> Callable[..., str]:
    """`python(code, **environment)`: what the code prints in a fresh interpreter; fails if it fails."""

    def run(code: str, **environment: str) -> str:
        result = PROCESSES.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"} | environment)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    return run


def _usable_isas() -> list[str]:
    library = _native.library()
    if library is None:
        return []
    current, usable = library.cpu_isa(), []
    for level in library.cpu_isas():
        try:
            library.set_cpu_isa(level)
        except ValueError:  # this machine lacks it
            continue
        usable.append(level)
    library.set_cpu_isa(current)
    return usable


_ISAS = _usable_isas()


@pytest.fixture(scope="session")
def usable_isas() -> list[str]:
    """The instruction-set levels of the native library that this machine has, the lowest first."""
    return _ISAS


@pytest.fixture(params=_ISAS or [pytest.param("", marks=pytest.mark.skip(f"no native library: {_native.reason()}"))])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test with the native kernels of every instruction-set level of this machine in turn."""
    library = _native.library()
    assert library is not None
    current = library.cpu_isa()
    library.set_cpu_isa(request.param)
    yield request.param
    library.set_cpu_isa(current)


@pytest.fixture
def prefer() -> Callable[[str], AbstractContextManager[None]]:
    """`with prefer(impl)`: "auto" tries it first in every op that has it, as VITOK_IMPL does for a whole process."""
    return preferring


@pytest.fixture
def one_sentence() -> Callable[..., None]:
    """`one_sentence(text)`: a message fit for a user: one line, no traceback, no repr of an exception."""

    def check(error: BaseException, *wanted: str) -> None:
        message = str(error)
        assert isinstance(error, vitok.InputError)
        assert message and "\n" not in message.strip() and "Traceback" not in message and len(message) < 400
        for part in wanted:
            assert part in message, message

    return check


@pytest.fixture
def judge() -> Callable[[Tensor, Tensor, Tensor], None]:
    """`judge(actual, baseline, oracle)`: as near to the float64 oracle as the eager composition in the same dtype is.

    Largest error at most twice and RMS error at most 1.5 times the baseline's, each with a floor of a few roundings, to
    which a test adds the roundings of larger numbers that cancel in the op.
    """

    def check(actual: Tensor, baseline: Tensor, oracle: Tensor, floor: float = 0.0) -> None:
        floor += 2 * torch.finfo(actual.dtype).eps * oracle.abs().max().item()
        ours, theirs = ((x.double() - oracle).abs() for x in (actual, baseline))
        assert actual.dtype == baseline.dtype and actual.shape == oracle.shape and not actual.isnan().any()
        print(f"max {ours.max():.2e} / {theirs.max():.2e}, rms {ours.square().mean().sqrt():.2e}")
        assert ours.max() <= 2 * theirs.max() + floor
        assert ours.square().mean().sqrt() <= 1.5 * theirs.square().mean().sqrt() + floor

    return check


@pytest.fixture(scope="session")
def vgg_hed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of VGG-HED weights with the real names, shapes and dtype, and random values."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, outputs, inputs in (
        ("conv1_1", 64, 3), ("conv1_2", 64, 64), ("conv2_1", 128, 64), ("conv2_2", 128, 128), ("conv3_1", 256, 128),
        ("conv3_2", 256, 256), ("conv3_3", 256, 256), ("conv4_1", 512, 256), ("conv4_2", 512, 512),
        ("conv4_3", 512, 512),
    ):  # fmt: skip
        weight = torch.randn(outputs, inputs, 3, 3, generator=generator) * (2 / (9 * inputs)) ** 0.5
        state |= {f"{name}.weight": weight.half(), f"{name}.bias": torch.randn(outputs, generator=generator).half()}
    path = tmp_path_factory.mktemp("weights") / "vgg_hed.safetensors"
    save_file(state, path)
    return path
