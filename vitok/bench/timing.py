"""How time is measured: every provider in turn, many times over, so that a slow second hits all of them alike.

On the CPU a sample is a few calls, at least a millisecond. On a GPU it is the replay of a CUDA graph of one call on
each of several sets of inputs, together larger than the cache; the host's microseconds a call are measured beside it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from vitok.ops import linear

SAMPLE_SECONDS = 1e-3
WARM_UP = 2


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the 20th, 50th and 80th percentile of `samples` samples; `host_us` is the time until
    an eager call returns, in microseconds, on a GPU."""

    p20: float
    p50: float
    p80: float
    samples: int
    host_us: float | None = None


def compare(
    providers: Mapping[str, Sequence[Callable[[], object]]], device: torch.device, seconds: float = 2.0
) -> dict[str, Timing]:
    """Time providers against each other.

    Args:
        providers: for each name one call, or one for each set of inputs (only the first is used on the CPU).
        device: where they compute.
        seconds: to spend on measuring all of them; every provider gets at least five samples, or two when five would
            take ten times as long.

    Returns: a `Timing` for each name, in the order given.
    """
    host: dict[str, float | None] = dict.fromkeys(providers)
    if device.type == "cuda":
        samplers = {name: _graph_sampler(calls) for name, calls in providers.items()}
        host |= {name: _host_microseconds(calls[0]) for name, calls in providers.items()}
    else:
        samplers = {name: _cpu_sampler(calls[0]) for name, calls in providers.items()}
    taken: dict[str, list[float]] = {name: [] for name in providers}
    names = list(providers)
    start = time.perf_counter()
    while min(map(len, taken.values())) < 5 or time.perf_counter() - start < seconds:
        if time.perf_counter() - start > 10 * seconds and min(map(len, taken.values())) >= 2:
            break
        for name in names:
            taken[name].append(samplers[name]())
        names.append(names.pop(0))
    return {name: _timing(samples, host[name]) for name, samples in taken.items()}


def copy_rate(device: torch.device, size: int = 2**28) -> float:
    """Bytes a second that a large copy reads and writes, 2 * size each time."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    timing = compare({"copy": [lambda: target.copy_(source)]}, device, seconds=0.5)["copy"]
    return 2 * size / (timing.p50 / 1e3)


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Operations a second of a square matrix product in the fastest way there is, two for each multiply-accumulate."""
    n = size or (8192 if device.type == "cuda" else 1536)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    timing = compare({"matmul": [lambda: linear(a, b)]}, device, seconds=0.5)["matmul"]
    return 2 * n**3 / (timing.p50 / 1e3)


def _timing(seconds: list[float], host_us: float | None) -> Timing:
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return Timing(1e3 * fifths[0], 1e3 * statistics.median(seconds), 1e3 * fifths[3], len(seconds), host_us)


def _cpu_sampler(call: Callable[[], object]) -> Callable[[], float]:
    for _ in range(WARM_UP):
        call()
    start = time.perf_counter()
    call()
    repeats = max(1, round(SAMPLE_SECONDS / max(time.perf_counter() - start, 1e-7)))

    def sample() -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    return sample


def _graph_sampler(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    for _ in range(WARM_UP):
        graph.replay()
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(kept: object = kept) -> float:  # the outputs live as long as the graph that writes them
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3 / len(calls)

    return sample


def _host_microseconds(call: Callable[[], object], repeats: int = 50) -> float:
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e6 * elapsed / repeats
