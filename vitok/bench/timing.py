"""How time is measured: every provider in turn, many times over, so that a slow second hits all of them alike.

On the CPU a sample is a few calls, at least a millisecond. On a GPU it is the replay of a CUDA graph of one call on
each of several sets of inputs, together larger than the cache; the host's microseconds a call are measured beside it.
Gradients are captured only on the stream on which their forward ran, so both belong inside `timing_stream`. Whole
models are timed as they are called, to the end of the GPU's work: some bring graphs of their own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from vitok.ops import linear

SAMPLE_SECONDS = 1e-3
WARM_UP = 2
SLOW_SECONDS = 0.5  # beside which warming up is nothing


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the 20th, 50th, 80th and 95th percentile of `samples` samples; `host_us` is the time
    until an eager call returns, in microseconds, on a GPU."""

    p20: float
    p50: float
    p80: float
    p95: float
    samples: int
    host_us: float | None = None


@contextmanager
def timing_stream(device: torch.device) -> Iterator[None]:
    """Make the one stream of a GPU on which calls are warmed up and captured the current one; nothing on the CPU.

    What a call keeps from before, such as the graph of autograd, has to be made inside too: its nodes go back to the
    stream on which they were made, and a capture of another stream ends there.
    """
    if device.type != "cuda":
        yield
        return
    side = _side_stream()
    outer = torch.cuda.current_stream()
    side.wait_stream(outer)
    try:
        with torch.cuda.stream(side):
            yield
    finally:
        outer.wait_stream(side)


def compare(
    providers: Mapping[str, Sequence[Callable[[], object]]],
    device: torch.device,
    seconds: float = 2.0,
    graph: bool = True,
) -> tuple[dict[str, Timing], dict[str, Exception]]:
    """Time providers against each other.

    Args:
        providers: for each name one call, or one for each set of inputs (only the first is used on the CPU). On a GPU
            they have been made inside `timing_stream`.
        device: where they compute.
        seconds: to spend on measuring all of them; every provider gets at least five samples, or two when five would
            take ten times as long.
        graph: on a GPU, time the replay of captured calls; False times the calls themselves, which have run before.

    Returns: a `Timing` for each name, in the order given, and what was raised by those that have none.
    """
    samplers: dict[str, Callable[[], float]] = {}
    first: dict[str, list[float]] = {}
    host: dict[str, float | None] = {}
    failed: dict[str, Exception] = {}
    captured = graph and device.type == "cuda"
    with timing_stream(device) if captured else nullcontext():
        for name, calls in providers.items():
            try:
                samplers[name], first[name] = (
                    (_graph_sampler(calls), []) if captured else _wall_sampler(calls[0], device)
                )
                host[name] = _host_microseconds(calls[0]) if captured else None
            except Exception as error:
                failed[name] = error
        names = [name for name in samplers if name not in failed]
        taken = {name: first[name] for name in names}
        start = time.perf_counter()
        while names and not _enough(min(len(taken[name]) for name in names), time.perf_counter() - start, seconds):
            for name in tuple(names):
                try:
                    taken[name].append(samplers[name]())
                except Exception as error:
                    failed[name] = error
                    names.remove(name)
            names = names[1:] + names[:1]
    return {name: timing(taken[name], host[name]) for name in taken if name not in failed}, failed


def usable(device: torch.device) -> bool:
    """Whether this process can go on measuring on the device. After an access outside a tensor no kernel runs any more,
    and a capture that was broken off can leave torch's random numbers or memory as if it were still going on."""
    if device.type != "cuda":
        return True
    try:
        with timing_stream(device):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=_side_stream()):
                drawn = torch.rand(1, device=device)
            graph.replay()
            return bool(torch.isfinite(drawn + torch.rand(1, device=device)))
    except RuntimeError:
        return False


def copy_rate(device: torch.device, size: int = 2**28) -> float:
    """Bytes a second that a large copy reads and writes, 2 * size each time."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device)


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Operations a second of `product`."""
    call, operations = product(device, dtype, size)
    return operations / _seconds(call, device)


def product(device: torch.device, dtype: torch.dtype, size: int | None = None) -> tuple[Callable[[], Tensor], int]:
    """A square matrix product in the fastest way there is, and its operations, two for each multiply-accumulate."""
    n = size or (8192 if device.type == "cuda" else 1536)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    multiply = F.linear if device.type == "cuda" else linear
    return torch.inference_mode()(lambda: multiply(a, b)), 2 * n**3


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    timings, failed = compare({"": [call]}, device, seconds=0.5)
    for error in failed.values():
        raise error
    return timings[""].p50 / 1e3


@cache
def _side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def _enough(samples: int, elapsed: float, seconds: float) -> bool:
    return (samples >= 5 and elapsed >= seconds) or (samples >= 2 and elapsed > 10 * seconds)


def timing(seconds: list[float], host_us: float | None = None) -> Timing:
    parts = [1e3 * part for part in statistics.quantiles(seconds, n=20, method="inclusive")]
    return Timing(parts[3], 1e3 * statistics.median(seconds), parts[15], parts[18], len(seconds), host_us)


def _wall_sampler(call: Callable[[], object], device: torch.device) -> tuple[Callable[[], float], list[float]]:
    """What takes a sample, and the samples that warming up gave: of a slow call, its first."""

    def seconds(repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    for _ in range(WARM_UP + 1):
        once = seconds(1)
        if once > SLOW_SECONDS:
            break
    repeats = max(1, round(SAMPLE_SECONDS / max(once, 1e-7)))
    return lambda: seconds(repeats), [once] if once > SLOW_SECONDS else []


def _graph_sampler(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
    """Inside `timing_stream`."""
    for _ in range(WARM_UP):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    first: list[Exception] = []
    try:
        with torch.cuda.graph(graph, stream=_side_stream()):
            try:
                kept = [call() for call in calls]
            except Exception as error:
                first.append(error)
                raise
    except Exception as error:  # ending a capture that failed raises once more, and says less
        raise (first or [error])[0] from None
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
