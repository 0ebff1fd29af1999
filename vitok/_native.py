"""The compiled library `vitok._C`, or the reason why it is absent. Nothing else imports it directly."""

from __future__ import annotations

import importlib
import json
import os
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # noqa: F401  before _C, which finds its OpenMP symbols in the runtime that torch brings along


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


@cache
def build_facts() -> dict[str, Any]:
    """The record the build left beside the library (compilers, flags, architectures, commit); {} when there is none."""
    try:
        facts = json.loads(Path(__file__).with_name("_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
