"""The compiled library `vitok._C`, or the reason why it is absent. Nothing else imports it directly."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # before _C, which finds its OpenMP symbols in the runtime that torch brings along
from torch import Tensor

# The library knows dtypes by name.
DTYPE = {
    torch.uint8: "uint8",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}


@cache
def _load() -> tuple[ModuleType | None, str]:
    """(library, "") or (None, reason), decided once per process."""
    wanted = os.environ.get("VITOK_NATIVE", "auto").strip().lower() or "auto"
    if wanted == "off":
        return None, "VITOK_NATIVE=off in the environment"
    if wanted != "auto":
        return None, f"VITOK_NATIVE is {wanted!r} in the environment; it must be auto or off"
    try:
        return importlib.import_module("vitok._C"), ""
    except ModuleNotFoundError:
        return None, build_facts().get("native_reason") or "the package was not built: vitok/_C is missing"
    except (ImportError, ValueError) as error:  # ValueError: VITOK_CPU_ISA names a level that is not there
        return None, f"vitok/_C does not load: {error}"


def library() -> ModuleType | None:
    """The module `vitok._C`, or None when it is switched off, was not built or does not load; see `reason`."""
    return _load()[0]


def reason() -> str:
    """Why `library` is None, as one phrase; "" when it is there."""
    return _load()[1]


def run(kernel: str, like: Tensor, *args: Any) -> None:
    """Call a kernel with addresses, sizes and strides on the device of `like`, ordered by CUDA's current stream."""
    if like.is_cuda:
        _function(kernel + "_cuda")(*args, torch.cuda.current_stream(like.device).cuda_stream)
    else:
        _function(kernel + "_cpu")(*args)


@cache
def _function(name: str) -> Callable[..., None]:
    function: Callable[..., None] = getattr(library(), name)
    return function


def refuses(tensor: Tensor, *others: Tensor | None) -> str:
    """Why no native kernel can take tensors of this device and these dtypes, or ""."""
    if tensor.is_cuda:
        # The compiler cannot trace the question; without an answer the launch would fail in CUDA's own words.
        if not torch.compiler.is_compiling() and (unsupported := _unsupported_gpu(tensor.device.index)):
            return unsupported
    elif not (tensor.is_cpu or tensor.is_meta):
        return f"there is no native kernel for device {tensor.device.type!r}"
    for x in (tensor, *others):
        if x is not None and x.dtype not in DTYPE:
            return f"there is no native kernel for {x.dtype}"
    return ""


@cache
def _unsupported_gpu(index: int | None) -> str:
    """Why the compiled CUDA code does not run on this GPU, or "".

    Code for X.Y runs on X.Z, Z >= Y, code for 90a on 9.0 alone; the newest architecture is there as PTX too, which
    later GPUs compile for themselves.
    """
    archs: list[str] = getattr(library(), "cuda_archs", list)()
    if not archs:
        return "the native library was built without CUDA"
    major, minor = torch.cuda.get_device_capability(index)
    for arch in archs:
        number = int(arch.rstrip("af"))
        exact = not arch.isdigit()
        if (number == 10 * major + minor) or (not exact and number // 10 == major and number % 10 <= minor):
            return ""
    if archs[-1].isdigit() and 10 * major + minor >= int(archs[-1]):
        return ""
    return f"the native library was built for CUDA architectures {', '.join(archs)} and this GPU is {major}{minor}"


@cache
def build_facts() -> dict[str, Any]:
    """The record the build left beside the library (compilers, flags, architectures, commit); {} when there is none."""
    try:
        facts = json.loads(Path(__file__).with_name("_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
