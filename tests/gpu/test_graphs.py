"""Every op inside a CUDA graph, forward and backward: replays compute from what the inputs hold by then."""

from __future__ import annotations

import torch


def refill(given):
    """Other numbers into the same memory; tensors whose elements share memory stay as they are."""
    with torch.no_grad():
        for x in given.tensors.values():
            if x is not None and x.is_floating_point() and x.numel() and 0 not in x.stride():
                x.mul_(-0.75)


def test_capture_and_replay(shared, make, impl, number):
    given = make(torch.bfloat16, number)
    seeds = shared["incoming"](given, shared["evaluate"](given, impl))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            shared["evaluate"](given, impl, seeds)
    torch.cuda.current_stream().wait_stream(side)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = shared["evaluate"](given, impl, seeds)
    for _ in range(2):
        refill(given)
        graph.replay()
        torch.cuda.synchronize()
        for name, x in shared["evaluate"](given, impl, seeds).items():
            assert torch.equal(captured[name], x), name
