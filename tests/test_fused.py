"""The model on its kernels: every implementation in turn, trained beside the reference, compiled, bit for bit, lean."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import vitok
from vitok import _native, ops

needs_native = pytest.mark.skipif(_native.library() is None, reason=f"no native library: {_native.reason()}")


def step(model: vitok.ViTok, pictures: Tensor, seed: int) -> Tensor:
    posterior = model.encode(pictures)
    patches = model.decode_patches(posterior.sample(seed))
    clip = pictures.movedim(1, -1).unsqueeze(1)
    distance = ops.pixel_loss(patches, clip, tubelet=model.config.tubelet, kind="l2").mean()
    return distance + 1e-3 * posterior.kl().mean()


def train(model: vitok.ViTok, pictures: Tensor, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for i in range(steps):
        loss = step(model.train(), pictures, seed=i)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@needs_native
@pytest.mark.parametrize("steps", [5, pytest.param(100, marks=pytest.mark.long)])
@pytest.mark.parametrize("preset", ["paper", "v2"])
def test_training_follows_the_reference(tiny, pixels, prefer, preset, steps):
    model, pictures = tiny(preset=preset, bottleneck="gaussian"), pixels(2, 3, 24, 20)
    other = copy.deepcopy(model)
    with prefer("reference"):
        expected = train(model, pictures, steps)
    with prefer("native"):
        actual = train(other, pictures, steps)
    assert expected[-1] < 0.9 * expected[0]
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=1e-3, atol=1e-5)
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert (ours - theirs).norm() <= 2e-2 * theirs.norm() + 1e-4


@needs_native
def test_the_backward_pass_has_the_same_bits_every_time(tiny, pixels):
    model, pictures = tiny().train(), pixels(2, 3, 24, 20)
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    try:
        first = None
        for count in (1, 2, 2, 1):
            torch.set_num_threads(count)
            model.zero_grad()
            step(model, pictures, seed=0).backward()
            gradients = [parameter.grad.clone() for parameter in model.parameters()]
            first = first or gradients
            if count == 1:  # a library matrix product may split its sums by threads; our kernels may not
                assert all(map(torch.equal, gradients, first))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


def saved_bytes(model: vitok.ViTok, call: Callable[[], Tensor]) -> int:
    """What one forward pass keeps for its backward, parameters left out, shared storage counted once."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    for parameter in model.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storages.values())


@needs_native
@pytest.mark.parametrize("preset", ["paper", "author-v1", "v2"])
def test_training_keeps_less(tiny, pixels, prefer, preset):
    model, pictures = tiny(preset=preset, bottleneck="gaussian").train(), pixels(2, 3, 64, 64)
    kept = {}
    for impl in ("native", "reference"):
        with prefer(impl):
            kept[impl] = saved_bytes(model, lambda: step(model, pictures, seed=0))
    print(preset, kept)
    assert kept["native"] < 0.8 * kept["reference"]


@pytest.mark.parametrize("every_size", [False, pytest.param(True, marks=pytest.mark.long)])
def test_compiles_whole_without_recompiling(tiny, pixels, every_size):
    """encode, decode and a training step with its backward pass, each one graph for any batch size; other sizes are
    constants or symbols too, which takes the compiler several times as long."""
    torch.compiler.reset()
    model = tiny(encoder_depth=1).train()  # the decoder has a block after another

    def encode(pictures: Tensor) -> Tensor:
        return model.encode(pictures).mean

    def decode(latents: Tensor) -> Tensor:
        return model.decode(latents)

    def training(pictures: Tensor) -> Tensor:
        return step(model, pictures, seed=3)

    for call, make in (
        (encode, lambda n: pixels(n, 3, 24, 20)),
        (decode, lambda n: torch.randn(n, 4, 3, 3)),
        (training, lambda n: pixels(n, 3, 24, 20)),
    ):
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(call, fullgraph=True, dynamic=every_size or None, backend=counter)
        first = make(2)
        torch._dynamo.mark_dynamic(first, 0)
        compiled(first)
        graphs = counter.frame_count
        for batch in (2, 3, 5):
            x = make(batch)
            actual, expected = compiled(x), call(x)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
            if call is training:
                gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in (actual, expected)]
                for ours, theirs in zip(*gradients, strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
        assert counter.frame_count == graphs, f"{call.__name__} was compiled again for another batch"


@pytest.mark.parametrize("tests", ["not compiles", pytest.param("compiles", marks=pytest.mark.long)])
@pytest.mark.parametrize("impl", ["reference", "native", "sdpa:math", pytest.param("triton", marks=pytest.mark.long)])
def test_the_models_own_tests_pass_on_every_implementation(impl, tests):
    if impl == "native" and _native.library() is None:
        pytest.skip(f"no native library: {_native.reason()}")
    file = Path(__file__).with_name("test_model.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", tests, str(file)]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=1200, env={**os.environ, "VITOK_IMPL": impl}, cwd=file.parent
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
