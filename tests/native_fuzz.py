"""Fuzz the native library: public ops on random valid arguments, its own functions on invalid ones.

    csrc/sanitize.sh [--seconds 60] [--seed 0]       the way to run it: under the sanitizers, which end the process
    python tests/native_fuzz.py --op norm --seed 3   without them, only results and refusals are checked

Every op runs with impl="native", forward and backward, at every instruction set level, and is compared with the
reference in float64; `packed_linear` is a kernel without an op of its own, compared with its formula. Calls of the
library that this makes are repeated with one broken argument and must be refused by a ValueError or TypeError.
`fuzz.log` in the current folder names the case that was running last.
"""

from __future__ import annotations

import argparse
import random
import runpy
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from vitok import _native
from vitok.ops import ImplementationError, _packed_native

ROOT = Path(__file__).resolve().parents[1]
CASES = runpy.run_path(str(ROOT / "tests" / "op_cases.py"))
# What the result of a native kernel may differ from float64, relative to the largest element.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
WRONG_TYPES: tuple[Any, ...] = (None, "x", 1.5, object(), (1,), 2**64, -(2**64))


class Fuzz:
    def __init__(self, seed: int, log: Path) -> None:
        self.rng, self.library = random.Random(seed), _native.library()
        assert self.library is not None, _native.reason()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.log = log.open("w", buffering=1)
        self.levels = []
        for level in self.library.cpu_isas():
            try:
                self.library.set_cpu_isa(level)
            except ValueError:
                continue
            self.levels.append(level)
        self.run = _native.run
        _native.run = self.recorded

    def recorded(self, kernel: str, like: torch.Tensor, *args: Any) -> None:
        self.calls.append((kernel, args))
        self.run(kernel, like, *args)
        # Now, while the memory that the call was given is still there.
        if self.rng.random() < 0.2:
            self.broken(kernel, args)
            self.run(kernel, like, *args)  # a broken call that was taken has written other results

    def fail(self, text: str) -> None:
        self.failures.append(text)
        print(f"failure: {text}", flush=True)

    def valid(self, op: str) -> None:
        """One random case: native against float64."""
        dtype, level = self.rng.choice(list(TOLERANCE)), self.rng.choice(self.levels)
        parameters = CASES["random_parameters"](op, self.rng)
        case = f"{op} {dtype} {level} {parameters}"
        print(case, file=self.log)
        self.library.set_cpu_isa(level)
        given = CASES["sample"](op, dtype, **parameters)
        try:
            found = CASES["evaluate"](given, "native")
        except ImplementationError:
            self.counts[f"{op} refused"] += 1
            return
        self.counts[op] += 1
        expected = CASES["evaluate"](CASES["in_float64"](given), "reference")
        for name, x in expected.items():
            if name not in found or found[name].shape != x.shape:
                self.fail(f"{case}: {name} is {found.get(name, torch.empty(0)).shape}, not {x.shape}")
            elif x.numel():
                scale = max(1.0, x.abs().max().item())
                error = (found[name].double() - x.double()).abs().max().item() / scale
                if not error <= max(TOLERANCE[given.dtype], TOLERANCE.get(found[name].dtype, 0.0)):
                    # Some cases are worse than others, like a layer norm of two elements that are nearly equal.
                    eager = CASES["evaluate"](given, "reference")[name].double()
                    if not error <= 2 * (eager - x.double()).abs().max().item() / scale:
                        self.fail(f"{case}: {name} is off by {error:.1e}")

    def packed_linear(self) -> None:
        """One random product of rows with a packed weight against its formula in float64."""
        rng = self.rng
        dtype, packed = rng.choice(list(TOLERANCE)[1:]), rng.choice(list(_packed_native.ELEMENTS))
        level, norm, gate = (
            rng.choice(self.levels),
            rng.choice([None, "rms", "layer"]),
            rng.choice([None, "silu", "gelu"]),
        )
        rows, inner = (
            rng.choice([0, 1, 2, 11, 12, 13, 25, 145, 290]),
            rng.choice([1, 2, 3, 5, 16, 33, 64, 65, 130, 300]),
        )
        width = rng.choice([1, 2, 15, 16, 17, 31, 32, 33, 65])
        columns = width if gate is None else 2 * width
        case = f"packed_linear {dtype} {packed} {level} {norm} {gate} {rows} x {inner} x {columns}"
        print(case, file=self.log)
        self.library.set_cpu_isa(level)
        generator = torch.Generator().manual_seed(rng.randrange(1000))
        # The rows end where their memory ends, so that what is read past them is seen.
        x = torch.randn(rows, inner + 3, generator=generator).to(dtype)[:, 3:]
        weight = torch.randn(columns, inner, generator=generator) * inner**-0.5
        bias = torch.randn(columns, generator=generator).to(dtype) if rng.random() < 0.5 else None
        residual = torch.randn(rows, width, generator=generator).to(dtype) if rng.random() < 0.5 else None
        made = _packed_native.pack(weight, bias, packed, gate is not None)
        found = _packed_native.run(x, made, columns, packed, norm=norm, gate=gate, residual=residual)
        self.counts["packed_linear"] += 1
        wide = x.double()
        if norm is not None:
            wide = wide - wide.mean(-1, keepdim=True) if norm == "layer" else wide
            wide = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        y = wide @ weight.double().t() + (0 if bias is None else bias.double())
        if gate is not None:
            left, right = y.chunk(2, -1)
            y = (torch.nn.functional.silu(left) if gate == "silu" else torch.nn.functional.gelu(left)) * right
        y = y if residual is None else y + residual.double()
        tolerance = max(TOLERANCE[dtype], {torch.int8: 0.1, torch.bfloat16: 3e-2}.get(packed, 0.0))
        # The layer norm of few elements magnifies the roundings of those that are nearly equal.
        if rows and inner > 5 and not (found - y).abs().max() <= tolerance * max(1.0, y.abs().max().item()):
            self.fail(f"{case}: off by {(found - y).abs().max():.1e}")
        if found.shape != y.shape or found.isnan().any():
            self.fail(f"{case}: {list(found.shape)}, NaN {bool(found.isnan().any())}")

    def broken(self, kernel: str, args: tuple[Any, ...]) -> None:
        """The call once more with one argument that is wrong in its type, its sign or its size, or absent."""
        at = self.rng.randrange(len(args))
        name, value = f"argument {at}", args[at]
        address = isinstance(value, int) and value > 2**32
        must_raise = True
        wrong: Any
        if self.rng.random() < 0.5:
            kinds: tuple[Any, ...] = WRONG_TYPES
            if isinstance(value, float):  # any number will do
                kinds = (None, "x", (1,))
            wrong = self.rng.choice([x for x in kinds if not (isinstance(value, tuple) and isinstance(x, tuple))])
        elif isinstance(value, bool):
            wrong = 1
        elif isinstance(value, str):
            wrong = self.rng.choice(["", "int32", "float8", "Float32"])
        elif isinstance(value, (tuple, torch.Size)):
            wrong = self.rng.choice([value[:-1], (*value, 1), tuple(2**63 for _ in value), tuple(-1 for _ in value)])
        elif address:
            wrong, must_raise = 0, False  # an absent tensor may be allowed
        elif isinstance(value, int):
            # No size or stride can be this, but other numbers can.
            wrong = self.rng.choice([-1, -(2**62)])
            must_raise = False
        else:
            return
        print(f"    {kernel}({name}={wrong!r}) of {args}", file=self.log)
        self.counts["broken calls"] += 1
        try:
            getattr(self.library, kernel + "_cpu")(*args[:at], wrong, *args[at + 1 :])
        except (ValueError, TypeError) as error:
            if kernel not in str(error) or "\n" in str(error):
                self.fail(f"{kernel}({name}={wrong!r}): the message is {str(error)!r}")
        else:
            self.counts["taken nevertheless"] += 1
            if must_raise:
                self.fail(f"{kernel}({name}={wrong!r}) was not refused")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--op", action="append", choices=[*CASES["CASES"], "packed_linear"])
    options = parser.parse_args()
    torch.set_num_threads(2)
    fuzz, end = Fuzz(options.seed, Path("fuzz.log")), time.monotonic() + options.seconds
    print(f"levels {', '.join(fuzz.levels)}, seed {options.seed}", flush=True)
    wanted = options.op or [*CASES["CASES"], "packed_linear"]
    while time.monotonic() < end:
        for op in wanted:
            fuzz.packed_linear() if op == "packed_linear" else fuzz.valid(op)
    print(", ".join(f"{count} {name}" for name, count in sorted(fuzz.counts.items())))
    unrun = [op for op in wanted if not fuzz.counts[op]]
    for op in unrun:
        print(f"failure: {op} never ran natively")
    print(f"{len(fuzz.failures) + len(unrun)} failures")
    return int(bool(fuzz.failures or unrun))


if __name__ == "__main__":
    sys.exit(main())
