"""CUDA graphs of a function, one for each shape it meets: a replayed call costs one launch instead of hundreds."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

KEPT = 16
"""Graphs that are kept, those used last."""

MAX_BATCH = 8
"""Up to which a batch is filled to the next power of two and replayed. Larger ones keep a GPU busy by themselves."""

WARM_UP = 3


class Graphs:
    """Calls functions of a batch through CUDA graphs. Results are copies; calls from threads take turns."""

    def __init__(self) -> None:
        self._known: OrderedDict[Any, _Captured] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, run: Callable[..., Tensor], x: Tensor, *rest: Any, reads: Mapping[Any, Any]) -> Tensor:
        """run(x, *rest) for x [B, ...] on a CUDA device and hashable others; a sample's result must not depend on B.

        `reads` holds, once `run` has run, the tensors besides x that it may forget while a graph still reads them.
        """
        batch = x.shape[0]
        if batch > MAX_BATCH:
            return run(x, *rest)
        bucket = 1 << (batch - 1).bit_length()
        key = (run.__qualname__, bucket, x.shape[1:], x.dtype, rest)
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
            else:
                self._known[key] = _capture(run, x.new_zeros((bucket, *x.shape[1:])), rest, reads)
                while len(self._known) > KEPT:
                    self._known.popitem(last=False)
            captured = self._known[key]
            captured.given[:batch].copy_(x)
            captured.graph.replay()
            return captured.made[:batch].clone()


class _Captured(NamedTuple):
    """A graph, the memory it reads x from and leaves the result in, and what else it reads."""

    graph: torch.cuda.CUDAGraph
    given: Tensor
    made: Tensor
    reads: dict[Any, Any]


def _capture(run: Callable[..., Tensor], given: Tensor, rest: tuple[Any, ...], reads: Mapping[Any, Any]) -> _Captured:
    side = torch.cuda.Stream(given.device)
    side.wait_stream(torch.cuda.current_stream(given.device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run(given, *rest)
    torch.cuda.current_stream(given.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = run(given, *rest)
    return _Captured(graph, given, made, dict(reads))
