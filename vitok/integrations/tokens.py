"""What the adapters to other tokenizers' call styles share, and what a model of token ids offers them.

Its posterior has `ids`, int64 [B, h, w] for pictures and [B, t, h, w] for clips, and a `mode()` that is quantised; its
bottleneck has `codebook_size` and `lookup(ids)`, the latents [B, c, h, w] or [B, c, t, h, w] of ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitok.checkpoint import load
from vitok.errors import InputError
from vitok.integrations.published import Missing
from vitok.model import ViTok


class Adapter(nn.Module):
    """Holds a model, given or loaded by what `vitok.load` takes."""

    def __init__(self, model: ViTok | str | Path) -> None:
        super().__init__()
        self.model = model if isinstance(model, ViTok) else load(model)
        self.train(self.model.training)


class DiscreteAdapter(Adapter):
    """Of a model of token ids; InputError for one of continuous latents."""

    def __init__(self, model: ViTok | str | Path) -> None:
        super().__init__(model)
        if not is_discrete(self.model):
            config = self.model.config
            raise InputError(
                f"{type(self).__name__} wants a model of token ids, and the latents of {config.name} are continuous "
                f"(bottleneck {config.bottleneck!r})"
            )

    def lookup(self, ids: Tensor) -> Tensor:
        """The latents [B, c, ...] of ids [B, ...]; InputError for what are no ids of the model."""
        return lookup(self.model, ids)


def is_discrete(model: ViTok) -> bool:
    return not isinstance(model.encoder, Missing) and hasattr(model.encoder.bottleneck, "lookup")


def lookup(model: ViTok, ids: Tensor) -> Tensor:
    bottleneck: Any = model.encoder.bottleneck
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise InputError(f"token ids must be integers, got {ids.dtype}")
    if ids.device.type == "cpu" and ids.numel():  # elsewhere looking would cost a wait
        low, high = (bound.item() for bound in ids.aminmax())
        if low < 0 or high >= bottleneck.codebook_size:
            raise InputError(f"token ids must lie in 0 .. {bottleneck.codebook_size - 1}, got {low} to {high}")
    latents: Tensor = bottleneck.lookup(ids.to(model.device, torch.int64))
    return latents
