"""One op, several implementations: how an implementation is named, chosen and refused.

An `Op` holds its implementations in order of preference, the reference last. ``impl="auto"`` takes the first that can
run the arguments at hand; a name takes that one or raises `ImplementationError` with the reason, never another one
silently. Under torch.compile a pointwise op's "auto" is its reference, which the compiler fuses with its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vitok.errors import InputError


class ImplementationError(InputError):
    """The implementation asked for by name cannot run here, or not on these arguments."""


def _always(*_: Any) -> str:
    return ""


@dataclass(frozen=True)
class Implementation:
    """`run` computes the op. `missing` says why it cannot run on this machine at all, `refuses(*args)` why not on these
    arguments (the op's positional ones); both say "" when it can."""

    name: str
    run: Callable[..., Any]
    missing: str = ""
    refuses: Callable[..., str] = _always


@dataclass(frozen=True)
class Choice:
    """One line of `vitok info`: may `implementation` of `op` be used here, and if not, why."""

    op: str
    implementation: str
    usable: bool
    reason: str


OPS: dict[str, Op] = {}


class Op:
    def __init__(self, name: str, *implementations: Implementation, pointwise: bool = False) -> None:
        self.name = name
        self.pointwise = pointwise
        self.implementations = {implementation.name: implementation for implementation in implementations}
        OPS[name] = self

    def __call__(self, impl: str, *args: Any) -> Any:
        return self.select(impl, *args).run(*args)

    def select(self, impl: str, *args: Any) -> Implementation:
        """The implementation that `impl` means for these arguments."""
        if impl == "auto":
            if self.pointwise and torch.compiler.is_compiling():
                return self.implementations["reference"]
            on_cpu = getattr(args[0], "is_cpu", False)
            for candidate in self.implementations.values():
                # On the CPU Triton is its interpreter, which is for tests and never the better choice.
                if not (candidate.missing or (on_cpu and candidate.name == "triton") or candidate.refuses(*args)):
                    return candidate
            raise ImplementationError(f"no implementation of {self.name} takes these arguments")
        if impl not in self.implementations:
            raise ImplementationError(
                f"{self.name} has no implementation {impl!r}; it has {', '.join(self.implementations)}"
            )
        chosen = self.implementations[impl]
        if reason := chosen.missing or chosen.refuses(*args):
            raise ImplementationError(f"{self.name}: implementation {impl!r} cannot be used: {reason}")
        return chosen

    def choices(self) -> Iterator[Choice]:
        for implementation in self.implementations.values():
            yield Choice(self.name, implementation.name, not implementation.missing, implementation.missing)


def choices() -> list[Choice]:
    """Every op and implementation, usable on this machine or why not, preferred ones first within an op."""
    return [choice for op in OPS.values() for choice in op.choices()]
