"""A tokenizer of two blocks a stack trained on smooth random pictures, by any implementations of its ops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import vitok
from vitok.ops._registry import Op

SIZES = {
    "channels": 8, "encoder_width": 128, "encoder_heads": 2, "encoder_depth": 2, "encoder_hidden": 256,
    "decoder_width": 144, "decoder_heads": 2, "decoder_depth": 2, "decoder_hidden": 322,
}  # fmt: skip


@contextmanager
def forced(impl: str) -> Iterator[set[str]]:
    """Every op whose implementation is left open takes `impl` where it can; yields the names of the ops that did."""
    select, taken = Op.select, set()

    def choose(self: Op, wanted: str, *args: Any) -> Any:
        candidate = self.implementations.get(impl)
        if wanted != "auto" or candidate is None or candidate.missing or candidate.refuses(*args):
            return select(self, wanted, *args)
        taken.add(self.name)
        return candidate

    with mock.patch.object(Op, "select", choose):
        yield taken


def pictures(count: int, size: int, seed: int) -> Tensor:
    """uint8 [count, size, size, 3]: a few random waves a colour."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    frequency, phase = (torch.randn(count, 3, 4, generator=generator) * scale for scale in (9.0, 3.0))
    across = torch.randn(count, 3, 4, generator=generator) * 9.0
    waves = (frequency[..., None, None] * y + across[..., None, None] * x + phase[..., None, None]).sin().mean(2)
    return ((waves * 0.5 + 0.5) * 255).round().to(torch.uint8).movedim(1, -1)


def train(impl: str, steps: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[list[float], Any, set[str]]:
    """Loss of every step, the trained parameters and the ops that `impl` computed; seeded, so that runs compare."""
    torch.manual_seed(0)
    model = vitok.create_model("S-S/8", **SIZES).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    with forced(impl) as taken:
        for step in range(steps):
            batch = pictures(8, 64, step % 10).to(device)
            target = (batch.float() / 127.5 - 1).movedim(-1, 1)
            with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
                reconstruction, posterior = model(batch, seed=step, layout="channels_last")
            loss = (reconstruction.float() - target).square().mean() + 1e-3 * posterior.kl().float().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
    return losses, {name: p.detach().cpu() for name, p in model.named_parameters()}, taken


def assert_alike(found: Any, expected: Any, tolerance: float) -> None:
    """Losses within `tolerance` of each other at every step, and parameters as near as their own changes allow."""
    (losses, parameters, _), (other_losses, other_parameters, _) = found, expected
    for step, (a, b) in enumerate(zip(losses, other_losses, strict=True)):
        assert abs(a - b) <= tolerance * b, f"step {step}: loss {a:.6f} against {b:.6f}"
    for name, parameter in parameters.items():
        spread = other_parameters[name].norm() + parameter.numel() ** 0.5 * 1e-2
        assert (parameter - other_parameters[name]).norm() <= 10 * tolerance * spread, name
