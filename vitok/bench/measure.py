"""How ops are measured: every implementation against the eager composition and its peers, a row each.

A provider whose numbers differ from those of the eager composition in float32 prints no time, and one that fails prints
why.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from vitok.bench.machine import FACTS
from vitok.bench.ops import Case
from vitok.bench.rows import LOST, Rows
from vitok.bench.timing import compare, timing_stream, usable

COLUMNS = (
    "case", "op", "shape", "dtype", "input_dtype", "direction", "provider", "ms_p20", "ms_p50", "ms_p80", "samples",
    "host_us", "ratio_to_eager", "gb_per_s", "percent_of_copy", "gflop_per_s", "percent_of_matmul", "refused", *FACTS,
)  # fmt: skip
L2_BYTES = 64 * 2**20
Rates = Callable[[torch.dtype], tuple[float, float]]
"""rates(dtype): bytes a second of a copy, operations a second of a matrix product."""


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> list[tuple[Any, ...]]:
    """One set of inputs, on a GPU as many as three times its cache holds."""
    generator = torch.Generator().manual_seed(0)
    first = case.inputs(device, dtype, generator)
    if device.type == "cpu":
        return [first]
    size = sum(x.numel() * x.element_size() for x in first if isinstance(x, Tensor))
    return [first, *(case.inputs(device, dtype, generator) for _ in range(min(15, 3 * L2_BYTES // size)))]


def forward_call(provider: Callable[..., Any], inputs: tuple[Any, ...]) -> Callable[[], Any]:
    return partial(torch.inference_mode()(provider), *inputs)


def backward_call(provider: Callable[..., Any], inputs: tuple[Any, ...]) -> Callable[[], tuple[Tensor, ...]]:
    """The gradients of all float inputs but the position table, the graph kept from one forward."""
    leaves = [x.detach().clone().requires_grad_() if differentiable(x) else x for x in inputs]
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    out = provider(*leaves)
    outs = (out,) if isinstance(out, Tensor) else out
    # From a generator of their own, so that every provider gets the same incoming gradients.
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in outs]
    return partial(torch.autograd.grad, outs, wanted, gradients, retain_graph=True, allow_unused=True)


def differentiable(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and not (x.dim() == 3 and x.shape[0] == 2)


def agrees(actual: Any, expected: Any, tolerance: float) -> bool:
    """Largest error within `tolerance` of the largest expected value, for each tensor; fp32 a hundred times closer."""
    for a, e in zip(*((x,) if isinstance(x, Tensor) else x for x in (actual, expected)), strict=True):
        if a is None or e is None:
            continue
        bound = tolerance * (1.0 if a.dtype == torch.bfloat16 else 0.01) * e.abs().max().double()
        if not torch.isfinite(a).all() or (a.double() - e.double()).abs().max() > bound:
            return False
    return True


def reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def measure(
    case: Case, dtype: torch.dtype, direction: str, device: torch.device, rates: Rates, rows: Rows, seconds: float
) -> bool:
    """Add a row for every provider of a case, timed for so many seconds each.

    Returns: whether this process can go on. If not, the one row added is of the provider after which it cannot.
    """
    # Backward calls keep the graph, which a compiled one refuses when it may overwrite what the forward saved.
    with timing_stream(device), torch._functorch.config.patch(donated_buffer=False):
        return _measure(case, dtype, direction, device, rates, rows, seconds)


def _measure(
    case: Case, dtype: torch.dtype, direction: str, device: torch.device, rates: Rates, rows: Rows, seconds: float
) -> bool:
    key = {"case": case.name, "dtype": str(dtype).removeprefix("torch."), "direction": direction}
    refused: dict[str, str] = rows.lost(key)
    inputs = make_inputs(case, dtype, device)
    what = {**key, "op": case.op, "shape": case.shape, "input_dtype": str(inputs[0][0].dtype).removeprefix("torch.")}
    make = forward_call if direction == "forward" else backward_call
    # Judged by the eager composition in float32: in bfloat16 torch's own weight gradients are off by several percent.
    wide = tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs[0])
    expected = make(case.providers[case.eager], wide)()
    calls: dict[str, list[Callable[[], object]]] = {}

    def broken(name: str, error: Exception) -> bool:
        """Note why a provider has no time; whether it also made the process useless."""
        calls.pop(name, None)
        refused[name] = reason(error)
        if usable(device):
            return False
        refused[name] = LOST + refused[name]
        rows.replace(
            key, [{**what, "provider": n, "refused": why} for n, why in refused.items() if why.startswith(LOST)]
        )
        return True

    for name, provider in case.providers.items():
        if name in refused:
            continue
        try:
            result = make(provider, inputs[0])()
            if name not in (case.eager, *case.different) and not agrees(result, expected, case.tolerance):
                refused[name] = "its numbers are not those of the eager composition"
                continue
            calls[name] = [make(provider, one) for one in inputs]
            if device.type == "cuda":
                torch.cuda.synchronize()  # what its kernels did wrong shows here, and not in the next provider
        except Exception as error:
            if broken(name, error):
                return False
    timings, failed = compare(calls, device, seconds=len(calls) * seconds)
    for name, raised in failed.items():
        if broken(name, raised):
            return False
    if case.eager not in timings:
        refused = {name: "there is no time of the eager composition" for name in timings} | refused
        timings = {}
    copy, matmul = rates(dtype)
    least = case.bytes if direction == "forward" else case.backward_bytes
    size, flops = least(dtype.itemsize), case.flops if direction == "forward" else case.backward_flops
    added: list[dict[str, object]] = []
    for name, timing in timings.items():
        row: dict[str, object] = {"ms_p20": timing.p20, "ms_p50": timing.p50, "ms_p80": timing.p80}
        row |= {"samples": timing.samples, "host_us": timing.host_us}
        row |= {"ratio_to_eager": timings[case.eager].p50 / timing.p50}
        if size:
            rate = size / (timing.p50 / 1e3)
            row |= {"gb_per_s": rate / 1e9, "percent_of_copy": 100 * rate / copy}
        if flops:
            rate = flops / (timing.p50 / 1e3)
            row |= {"gflop_per_s": rate / 1e9, "percent_of_matmul": 100 * rate / matmul}
        added.append({**what, "provider": name, **row})
    added += [{**what, "provider": name, "refused": why} for name, why in refused.items()]
    rows.replace(key, added)
    return True
