"""One op, several implementations: how an implementation is named, chosen and refused.

An `Op` holds its implementations in order of preference, the reference last; where this device has been measured, the
order is that of `auto.json`, which benchmarks/auto.py makes from benchmark results. ``impl="auto"`` takes the first
that can run the arguments at hand; a name takes that one or raises `ImplementationError` with the reason, never another
one silently. Under torch.compile "auto" of a pointwise op is its reference, which the compiler fuses with what is near,
unless another was measured to beat what the compiler makes of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitok import _native
from vitok.errors import InputError

# {op: {"cpu-avx512 bfloat16": {"order": [implementation, ...], "why": what was measured}}}
_AUTO: dict[str, dict[str, dict[str, Any]]] = json.loads(Path(__file__).with_name("auto.json").read_text())
# Tried first by "auto" whatever was measured; for tests and for finding out what an implementation brings.
_FIRST = os.environ.get("VITOK_IMPL", "")
_LIBRARY = _native.library()
_CPU = f"cpu-{_LIBRARY.cpu_isa()}" if _LIBRARY else "cpu"


class ImplementationError(InputError):
    """The implementation asked for by name cannot run here, or not on these arguments."""


def _always(*_: Any) -> str:
    return ""


@dataclass(frozen=True)
class Implementation:
    """`run` computes the op. `missing` says why it cannot run on this machine at all, `refuses(*args)` why not on these
    arguments (the op's positional ones); both say "" when it can. "auto" considers it on the `devices` it is meant for.
    """

    name: str
    run: Callable[..., Any]
    missing: str = ""
    refuses: Callable[..., str] = _always
    devices: tuple[str, ...] = ("cpu", "cuda")

    def unusable(self) -> str:
        """Why it is of no use on this machine, or ""."""
        if self.missing or "cpu" in self.devices or torch.cuda.is_available():
            return self.missing
        return "it is for CUDA, and there is no CUDA device"


@dataclass(frozen=True)
class Choice:
    """One line of `vitok info`: may `implementation` of `op` be used here, and if not, why; what was measured of it."""

    op: str
    implementation: str
    usable: bool
    reason: str


OPS: dict[str, Op] = {}


class Op:
    def __init__(self, name: str, *implementations: Implementation, pointwise: bool = False) -> None:
        self.name = name
        self.pointwise = pointwise
        self.measured = _AUTO.get(name, {})
        self.implementations = {implementation.name: implementation for implementation in implementations}
        kinds = [(is_cuda, dtype) for is_cuda in (False, True) for dtype in _native.DTYPE]
        self.orders = {kind: self._order(*kind) for kind in kinds}
        self.compiled_orders = {kind: self._compiled_order(*kind) for kind in kinds}
        OPS[name] = self

    def __call__(self, impl: str, *args: Any) -> Any:
        return self.select(impl, *args).run(*args)

    def select(self, impl: str, *args: Any) -> Implementation:
        """The implementation that `impl` means for these arguments."""
        if impl == "auto":
            orders = self.compiled_orders if torch.compiler.is_compiling() else self.orders
            for candidate in self._candidates(orders, args):
                if not (candidate.missing or candidate.refuses(*args)):
                    return candidate
            raise ImplementationError(f"no implementation of {self.name} takes these arguments")
        if not isinstance(impl, str) or impl not in self.implementations:
            raise ImplementationError(
                f"{self.name} has no implementation {impl!r}; it has {', '.join(self.implementations)}"
            )
        chosen = self.implementations[impl]
        if reason := chosen.missing or chosen.refuses(*args):
            raise ImplementationError(f"{self.name}: implementation {impl!r} cannot be used: {reason}")
        return chosen

    def _candidates(
        self, orders: dict[tuple[bool, torch.dtype], tuple[Implementation, ...]], args: tuple[Any, ...]
    ) -> tuple[Implementation, ...]:
        for x in args:
            if isinstance(x, Tensor) and (order := orders.get((x.is_cuda, x.dtype))):
                return order
        return tuple(self.implementations.values())

    def _order(self, is_cuda: bool, dtype: torch.dtype) -> tuple[Implementation, ...]:
        device = "cuda" if is_cuda else "cpu"
        names = self.measured.get(_key(device, dtype), {}).get("order", self.implementations)
        chosen = [name for name in names if device in self.implementations[name].devices]
        first = [_FIRST] if _FIRST in self.implementations else []
        return tuple(self.implementations[name] for name in [*first, *chosen])

    def _compiled_order(self, is_cuda: bool, dtype: torch.dtype) -> tuple[Implementation, ...]:
        measured = self.measured.get(_key("cuda" if is_cuda else "cpu", dtype), {})
        fuses = self.pointwise and measured.get("compiled", "reference") == "reference" and not _FIRST
        return (self.implementations["reference"],) if fuses else self._order(is_cuda, dtype)

    def choices(self) -> Iterator[Choice]:
        for implementation in self.implementations.values():
            reason = implementation.unusable()
            yield Choice(self.name, implementation.name, not reason, reason)


def _key(device: str, dtype: torch.dtype) -> str:
    """What auto.json calls a device of this machine with a dtype."""
    return f"{_CPU if device == 'cpu' else device} {str(dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Preference:
    """One line of `vitok info`: the order in which "auto" tries an op's implementations for a device and dtype here."""

    op: str
    device: str
    dtype: str
    order: tuple[str, ...]
    why: str


def preferences() -> list[Preference]:
    """What "auto" follows on this machine's CPU and GPUs, for the dtypes that matter."""
    lines = []
    for op in OPS.values():
        pixels = any(key.endswith(" uint8") for key in op.measured)
        for dtype in (torch.uint8,) if pixels else (torch.bfloat16, torch.float32):
            for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
                order = tuple(i.name for i in op.orders[device == "cuda", dtype] if not i.missing)
                key = _key(device, dtype)
                why = op.measured.get(key, {}).get("why", "not measured here: the op's own order")
                where, _, name = key.partition(" ")
                lines.append(Preference(op.name, where, name, order, why))
    return lines


@contextmanager
def preferring(impl: str) -> Iterator[None]:
    """`with preferring(impl)`: "auto" tries it first in every op that has it, as VITOK_IMPL does for a process.

    For the whole process, not for one thread.
    """
    before = {op: (op.orders, op.compiled_orders) for op in OPS.values()}
    for op, (orders, _) in before.items():
        if impl in op.implementations:
            op.orders = {key: (op.implementations[impl], *order) for key, order in orders.items()}
            op.compiled_orders = op.orders
    try:
        yield
    finally:
        for op, (orders, compiled) in before.items():
            op.orders, op.compiled_orders = orders, compiled


def check_environment() -> None:
    """Raise InputError when VITOK_IMPL names no implementation of any op."""
    names = sorted({name for op in OPS.values() for name in op.implementations})
    if _FIRST and _FIRST not in names:
        raise InputError(f"VITOK_IMPL is {_FIRST!r} in the environment; it must be one of {', '.join(names)}")


def choices() -> list[Choice]:
    """Every op and implementation, usable on this machine or why not, preferred ones first within an op."""
    return [choice for op in OPS.values() for choice in op.choices()]
