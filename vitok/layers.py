"""The parts of a ViTok: each a few lines over `vitok.ops`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitok import ops
from vitok.config import StackConfig, ViTokConfig
from vitok.ops.linear import autocast
from vitok.positions import coordinates, rope_table, sincos_table


class Linear(nn.Linear):
    """torch's linear layer, multiplied by `vitok.ops.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class TubeletEmbed(nn.Module):
    """Pixels [B, T, H, W, 3] to tokens [B, L, width]."""

    def __init__(self, config: ViTokConfig) -> None:
        super().__init__()
        self.tubelet, self.pad = config.tubelet, config.pad
        self.weight = nn.Parameter(torch.empty(config.encoder_width, config.tubelet_elements))
        self.bias = nn.Parameter(torch.empty(config.encoder_width))

    def forward(self, pixels: Tensor, chunk: int | None = None) -> Tensor:
        if chunk is not None:
            slabs = list(_slabs(pixels.shape[:4], self.tubelet, chunk))
            shape = (len(pixels), slabs[-1][2].stop, len(self.weight))
            out = self.weight.new_empty(shape, dtype=autocast(self.weight))
            for frames, rows, at in slabs:
                out[:, at] = self(pixels[:, frames, rows])
            return out
        return ops.tubelet_embed(pixels, self.weight, self.bias, tubelet=self.tubelet, pad=self.pad)


class TubeletUnembed(nn.Module):
    """Tokens [B, L, width] to pixels [B, 3, T, H, W]."""

    def __init__(self, config: ViTokConfig) -> None:
        super().__init__()
        self.tubelet = config.tubelet
        self.weight = nn.Parameter(torch.empty(config.tubelet_elements, config.decoder_width))
        self.bias = nn.Parameter(torch.empty(3 if config.pixel_bias == "channel" else config.tubelet_elements))

    def forward(self, tokens: Tensor, size: tuple[int, int, int], chunk: int | None = None) -> Tensor:
        if chunk is not None:
            out = tokens.new_empty((tokens.shape[0], 3, *size), dtype=autocast(tokens))
            for frames, rows, at in _slabs((tokens.shape[0], *size), self.tubelet, chunk):
                part = out[:, :, frames, rows]
                part.copy_(self(tokens[:, at], tuple(part.shape[2:])))
            return out
        return ops.tubelet_unembed(tokens, self.weight, self.bias, tubelet=self.tubelet, size=size)

    def rows(self, tokens: Tensor) -> Tensor:
        """The pixels as rows [B, L, q * p * p * 3], a tubelet each."""
        bias = self.bias if len(self.bias) == len(self.weight) else self.bias.repeat(len(self.weight) // 3)
        return ops.linear(tokens, self.weight, bias)


def _slabs(shape: Sequence[int], tubelet: tuple[int, int], chunk: int) -> Iterator[tuple[slice, slice, slice]]:
    """Clips [B, T, H, W] cut between tubelets, about `chunk` tokens a slab: its frames, its rows of pixels, its tokens.

    A slab is some whole steps in time or some rows of one, at least a row, so that its tokens lie side by side.
    """
    (batch, *size), (q, p) = shape, tubelet
    t, h, w = (-(-n // step) for n, step in zip(size, (q, p, p), strict=True))
    steps, rows = max(1, chunk // (batch * h * w)), min(h, max(1, chunk // (batch * w)))
    for a in range(0, t, steps):
        for b in range(0, h, rows):
            end = min(a + steps, t) * h * w if rows == h else (a * h + min(b + rows, h)) * w
            yield slice(a * q, (a + steps) * q), slice(b * p, (b + rows) * p), slice((a * h + b) * w, end)


class Norm(nn.Module):
    """Layer norm (weight and bias) or RMS norm (weight), of a residual stream that a branch may still have to join."""

    def __init__(self, width: int, kind: str, eps: float) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if kind == "layer" else None

    def forward(self, x: Tensor, branch: Branch | None = None) -> tuple[Tensor, Tensor]:
        """(norm of the sum, sum) for the sum of x and the branch, which is x alone when there is none."""
        if branch is None:
            return ops.norm(x, self.weight, self.bias, kind=self.kind, eps=self.eps), x
        out, scale = branch
        return ops.add_norm(out, x, self.weight, self.bias, scale=scale, kind=self.kind, eps=self.eps)


class Places(NamedTuple):
    """Where the tokens of a sequence are, and which of them see each other."""

    rope: Tensor | None
    """[2, L, head_dim / 2], see `vitok.positions.rope_table`."""
    cu_seqlens: Tensor | None = None
    """[segments + 1], see `vitok.ops.attention`; None where all tokens are of one picture or clip."""
    window: int | None = None
    """How many tokens away a token still sees; None for any."""


class Attention(nn.Module):
    """Multi-head self-attention; rows of `qkv` are ordered q | k | v, each heads x head_dim."""

    def __init__(self, config: ViTokConfig, stack: StackConfig) -> None:
        super().__init__()
        self.heads, self.eps = stack.heads, config.norm_eps
        self.qkv = Linear(stack.width, 3 * stack.width, bias=config.qkv_bias)
        self.proj = Linear(stack.width, stack.width, bias=config.proj_bias)
        self.q_norm = nn.Parameter(torch.ones(stack.head_dim)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(stack.head_dim)) if config.qk_norm else None

    def forward(self, x: Tensor, places: Places) -> Tensor:
        return self.proj(self.attend(self.qkv(x), places))

    def attend(self, qkv: Tensor, places: Places) -> Tensor:
        """The packed projection [B, L, 3 * width] to what the heads gather, [B, L, width]; only here do tokens meet."""
        rope, cu_seqlens, window = places
        heads = qkv.unflatten(-1, (3, self.heads, -1))
        out = ops.attention(heads, self.q_norm, self.k_norm, rope, eps=self.eps, window=window, cu_seqlens=cu_seqlens)
        return out.flatten(-2)


class FeedForward(nn.Module):
    """Gated feed-forward; rows of `gate_up` are ordered gate | up."""

    def __init__(self, config: ViTokConfig, stack: StackConfig) -> None:
        super().__init__()
        self.gate = config.gate
        self.gate_up = Linear(stack.width, 2 * stack.hidden, bias=config.mlp_bias)
        self.down = Linear(stack.hidden, stack.width, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ops.gated_mlp_act(self.gate_up(x), gate=self.gate))


# What a block hands on: its last branch and the branch's LayerScale, not yet added to the residual stream, so that the
# addition is one pass with the norm that follows, in the next block.
#
# A block is attention between two halves that work on every token by itself: `enter` up to the packed projection and
# `leave` from what the heads gathered. `Stack` runs the halves over some tokens at a time to bound memory.
Branch = tuple[Tensor, Tensor | None]


class SerialBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ViTokConfig, stack: StackConfig) -> None:
        super().__init__()
        self.attention_norm = Norm(stack.width, config.norm, config.norm_eps)
        self.attention = Attention(config, stack)
        self.attention_scale = _layer_scale(config, stack)
        self.feed_forward_norm = Norm(stack.width, config.norm, config.norm_eps)
        self.feed_forward = FeedForward(config, stack)
        self.feed_forward_scale = _layer_scale(config, stack)

    def forward(self, x: Tensor, branch: Branch | None, places: Places) -> tuple[Tensor, Branch]:
        h, x = self.attention_norm(x, branch)
        h, x = self.feed_forward_norm(x, (self.attention(h, places), self.attention_scale))
        return x, (self.feed_forward(h), self.feed_forward_scale)

    def enter(self, x: Tensor, branch: Branch | None) -> tuple[Tensor, Tensor]:
        h, x = self.attention_norm(x, branch)
        return self.attention.qkv(h), x

    def leave(self, x: Tensor, attended: Tensor) -> tuple[Tensor, Branch]:
        h, x = self.feed_forward_norm(x, (self.attention.proj(attended), self.attention_scale))
        return x, (self.feed_forward(h), self.feed_forward_scale)


class ParallelBlock(nn.Module):
    """x + attention(norm(x)) + feed_forward(norm(x)), one norm for both (arXiv:2302.05442)."""

    def __init__(self, config: ViTokConfig, stack: StackConfig) -> None:
        super().__init__()
        self.norm = Norm(stack.width, config.norm, config.norm_eps)
        self.attention = Attention(config, stack)
        self.feed_forward = FeedForward(config, stack)
        self.scale = _layer_scale(config, stack)

    def forward(self, x: Tensor, branch: Branch | None, places: Places) -> tuple[Tensor, Branch]:
        h, x = self.norm(x, branch)
        return x, (self.attention(h, places) + self.feed_forward(h), self.scale)

    def enter(self, x: Tensor, branch: Branch | None) -> tuple[Tensor, Tensor]:
        h, x = self.norm(x, branch)
        return self.attention.qkv(h), x

    def leave(self, x: Tensor, attended: Tensor) -> tuple[Tensor, Branch]:
        h, _ = self.norm(x)  # once more: keeping it would take as much memory as x
        return x, (self.attention.proj(attended) + self.feed_forward(h), self.scale)


Grid = tuple[int, int, int]  # tokens in time, height and width


class Stack(nn.Module):
    """Transformer blocks with positions and a final norm: tokens [B, L, width] of a (t, h, w) grid, same shape out.

    `packed` does so for tokens of several grids in one pass. With a `chunk`, everything outside attention works on so
    many tokens at a time and in place of the tokens given: bounded memory, the same numbers but for rounding.
    """

    def __init__(self, config: ViTokConfig, stack: StackConfig) -> None:
        super().__init__()
        self.config, self.stack = config, stack
        block = SerialBlock if config.block == "serial" else ParallelBlock
        self.blocks = nn.ModuleList(block(config, stack) for _ in range(stack.depth))
        self.norm = Norm(stack.width, config.norm, config.norm_eps) if config.final_norm else None

    def forward(self, x: Tensor, grid: Grid, chunk: int | None = None) -> Tensor:
        return self._run(*self.placed(x, grid), chunk)

    def placed(self, x: Tensor, grid: Grid) -> tuple[Tensor, Places]:
        """Tokens as the first block takes them, with their positions added if the config says so, and their places."""
        rope, absolute = self._tables(grid, x.device)
        return _added(x, absolute), Places(rope, window=self.config.window)

    def packed(self, tokens: Sequence[Tensor], grids: Sequence[Grid], chunk: int | None = None) -> list[Tensor]:
        """What `forward` makes of each [B, L, width] with its grid: all sequences one behind the other, none padded."""
        device = tokens[0].device
        every = [grid for x, grid in zip(tokens, grids, strict=True) for _ in x]  # one a sequence
        known = {grid: self._tables(grid, device) for grid in set(every)}
        ropes, absolutes = zip(*(known[grid] for grid in every), strict=True)
        rope = None if ropes[0] is None else torch.cat(ropes, 1)
        absolute = None if absolutes[0] is None else torch.cat(absolutes)
        ends = torch.tensor([0, *accumulate(map(prod, every))], dtype=torch.int32, device=device)
        together = _added(torch.cat([x.flatten(0, 1) for x in tokens])[None], absolute)
        places = Places(rope, ends, self.config.window)
        out = self._run(together, places, chunk)[0].split([x.shape[0] * x.shape[1] for x in tokens])
        return [y.unflatten(0, x.shape[:2]) for x, y in zip(tokens, out, strict=True)]

    def _tables(self, grid: Grid, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Rotary and added positions of a grid, None for those that the config has not."""
        coords = coordinates(grid, device)
        rope = rope_table(coords, grid, self.stack.head_dim, self.config.rope, self.config.rope_theta)
        return rope, sincos_table(coords, self.stack.width) if self.config.absolute == "sincos" else None

    def _run(self, x: Tensor, places: Places, chunk: int | None) -> Tensor:
        if chunk is not None:
            return self._run_chunks(x, places, chunk)
        branch = None
        for block in self.blocks:
            x, branch = block(x, branch, places)
        return self._last(x, branch)

    def _run_chunks(self, x: Tensor, places: Places, chunk: int) -> Tensor:
        """The same in place: beside x only one packed projection and what one attention gathers are ever whole."""
        rows = x.flatten(0, 1)
        qkv = x.new_empty((len(rows), 3 * x.shape[-1]), dtype=autocast(x))
        attended = None
        for done, block in pairwise((None, *self.blocks, None)):
            for at in (slice(i, i + chunk) for i in range(0, len(rows), chunk)):
                part, branch = rows[at], None
                if attended is not None:
                    part, branch = done.leave(part, attended[at])
                if block is None:
                    rows[at] = self._last(part, branch)
                    continue
                qkv[at], rows[at] = block.enter(part, branch)
            attended = None  # before the next is made
            if block is not None:
                attended = block.attention.attend(qkv.unflatten(0, x.shape[:2]), places).flatten(0, 1)
        return rows.view(x.shape)

    def _last(self, x: Tensor, branch: Branch | None) -> Tensor:
        return joined(x, branch) if self.norm is None else self.norm(x, branch)[0]


def _layer_scale(config: ViTokConfig, stack: StackConfig) -> nn.Parameter | None:
    return None if config.layer_scale is None else nn.Parameter(torch.full((stack.width,), float(config.layer_scale)))


def _added(x: Tensor, absolute: Tensor | None) -> Tensor:
    return x if absolute is None else x + absolute.to(x.dtype)


def joined(x: Tensor, branch: Branch | None) -> Tensor:
    """The residual stream with the branch that a block left to be added."""
    if branch is None:
        return x
    out, gamma = branch
    return x + (out if gamma is None else out * gamma)
