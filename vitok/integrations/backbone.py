"""The encoder as a feature extractor, with the methods of timm's models: for detectors, probes and distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitok.checkpoint import load
from vitok.errors import InputError
from vitok.inference import FastViTok
from vitok.layers import Stack, joined
from vitok.model import ViTok, as_clip, check_range

FORMATS = ("NCHW", "NLC")


def backbone(model: ViTok | str | Path) -> Backbone:
    """The encoder of a model, or of what `vitok.load` takes, whose decoder is then never read from the disk.

    It shares the weights of a model that is given. Raises InputError for one made by `for_inference`.
    """
    if isinstance(model, FastViTok):
        raise InputError("a model made by for_inference has no features between its blocks; use the one it was made of")
    return Backbone(model if isinstance(model, ViTok) else load(model))


class Backbone(nn.Module):
    """Tubelet embedding, blocks and final norm of an encoder, without its bottleneck.

    Takes pictures [B, 3, H, W] and clips [B, 3, T, H, W] of any size, float in [-1, 1] (mean and standard deviation 0.5
    in torchvision's terms) or uint8. Attributes as timm's: `num_features`, the width of the tokens, `feature_info`, one
    dict a block with num_chs, reduction and module, and `num_prefix_tokens`, none.
    """

    num_prefix_tokens = 0

    def __init__(self, model: ViTok) -> None:
        super().__init__()
        self.config = model.config
        self.embed = model.encoder.embed
        # A stack of its own around the same blocks, so that pruning leaves the model whole.
        self.stack = Stack(self.config, replace(self.config.encoder, depth=0))
        self.stack.blocks, self.stack.norm = model.encoder.stack.blocks[:], model.encoder.stack.norm
        self.num_features = self.config.encoder_width
        self.grad_checkpointing = False
        self.train(model.training)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        return [
            {"num_chs": self.num_features, "reduction": self.config.patch, "module": f"stack.blocks.{i}", "index": i}
            for i in range(len(self.stack.blocks))
        ]

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens [B, L, num_features] after all blocks and the final norm, in row-major (t, y, x) order."""
        return self._run(x, set(), len(self.stack.blocks), norm=False)[0]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Tokens after some of the blocks.

        Args:
            indices: of the blocks, negative ones from the end; the last so many for a number; None for all.
            norm: put the final norm on each of them too.
            stop_early: leave out the blocks after the last of them.
            output_fmt: "NCHW" for [B, num_features, h, w], with the time axis of clips [B, num_features, t, h, w];
                "NLC" for [B, L, num_features].
            intermediates_only: without the tokens that `forward_features` gives.

        Returns: intermediates in the order of the blocks, or (final tokens [B, L, num_features], intermediates).
        Raises InputError for blocks that there are not and an unknown format.
        """
        if output_fmt not in FORMATS:
            raise InputError(f"output_fmt must be one of {', '.join(FORMATS)}, got {output_fmt!r}")
        taken = set(self._blocks(indices))
        end = 1 + max(taken) if stop_early else len(self.stack.blocks)
        final, found = self._run(x, taken, end, norm)
        if output_fmt == "NCHW":
            grid = self.config.grid(1, *x.shape[-2:])[1:] if x.dim() == 4 else self.config.grid(*x.shape[-3:])
            found = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in found]
        return found if intermediates_only else (final, found)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last of `indices` and, with `prune_norm`, the final norm; returns the indices.

        The model that the weights are shared with stays whole. There is no head to prune.
        """
        taken = self._blocks(indices)
        self.stack.blocks = self.stack.blocks[: 1 + max(taken)]
        if prune_norm:
            self.stack.norm = None
        return taken

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of blocks for backward, and compute the rest once more there."""
        self.grad_checkpointing = enable

    def _blocks(self, indices: int | Sequence[int] | None) -> list[int]:
        count = len(self.stack.blocks)
        if isinstance(indices, int):
            wanted = list(range(count - indices, count))
        else:
            wanted = [i + count if i < 0 else i for i in (range(count) if indices is None else indices)]
        if not wanted or not all(0 <= i < count for i in wanted):
            raise InputError(f"indices must be of the {count} blocks, or how many of the last, got {indices!r}")
        return wanted

    def _run(self, x: Tensor, taken: set[int], end: int, norm: bool) -> tuple[Tensor, list[Tensor]]:
        clip, _ = as_clip(x, "channels_first")
        check_range(clip)
        tokens = self.embed(clip)
        tokens, places = self.stack.placed(tokens, self.config.grid(*clip.shape[1:4]))
        last, branch, found = self.stack.norm, None, []
        for i, block in enumerate(self.stack.blocks[:end]):
            if self.grad_checkpointing and torch.is_grad_enabled():
                tokens, branch = checkpoint(block, tokens, branch, places, use_reentrant=False)
            else:
                tokens, branch = block(tokens, branch, places)
            if i in taken:
                found.append(last(tokens, branch)[0] if norm and last is not None else joined(tokens, branch))
        return joined(tokens, branch) if last is None else last(tokens, branch)[0], found
