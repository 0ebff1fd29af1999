"""The start of a decoder that knows its neighbours: what heads make of what they see, by least squares.

From `vitok.train.init` each head looks at one neighbour of its token. What is best added to a token, of what its heads
gather and of the token itself, is then a linear problem, solved for one layer after the other on what the layers before
have left. It is what lapped transforms know of the blocks beside a block (Malvar, "Signal Processing with Lapped
Transforms", 1992), fitted to data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitok.errors import InputError
from vitok.evaluate.pca import PatchPCA
from vitok.layers import Attention, FeedForward, Norm, Places, SerialBlock
from vitok.model import ViTok
from vitok.ops import tubelet_gather
from vitok.train.init import can_look_at_neighbours
from vitok.train.local_pca import fill, opened

FLOOR = 1e-4
"""A mean squared error, much above which clips weigh by its inverse, as in the pixel loss `log_l2`."""
RIDGE = 1e-5
"""On the diagonals of the normal equations, in units of their mean."""
AT_ONCE = 8  # clips


@torch.no_grad()
def fit_neighbours(model: ViTok, pca: PatchPCA, batches: Sequence[Tensor], *, skip: int = 0) -> None:
    """Fit attention and feed-forward of all blocks of the decoder but the first `skip`.

    Args:
        model: as `vitok.train.init` or `vitok.train.local_pca` leaves it: tokens of its decoder hold coordinates in
            `pca`, and a constant in the last channel.
        pca: the components of those coordinates.
        batches: uint8 pixels [B, T, H, W, 3], of any sizes; pictures and clips may stand side by side.
        skip: blocks whose tokens are no coordinates yet.

    Raises InputError unless blocks are serial and heads look at neighbours, which takes qk-norm and rotary positions
    by axis.
    """
    decoder, config = model.decoder, model.config
    if config.block != "serial" or not can_look_at_neighbours(config):
        raise InputError(
            f"to fit neighbours the model needs block 'serial', qk_norm true and rope '2d' or '3d', got "
            f"{config.block!r}, {str(config.qk_norm).lower()} and {config.rope!r}"
        )
    clips = [part for batch in batches for part in batch.split(AT_ONCE)]
    count = min(len(pca.components), config.decoder_width - 1)
    basis = pca.components[:count]
    true = [(tubelet_gather(clip, tubelet=config.tubelet) - pca.mean) @ basis.T for clip in clips]
    codes = [model.encode(clip, layout="channels_last").mode().flatten(2).transpose(1, 2) for clip in clips]
    grids = [config.grid(*clip.shape[1:4]) for clip in clips]
    placed = [decoder.stack.placed(decoder.from_latents(x), grid) for x, grid in zip(codes, grids, strict=True)]
    tokens, places = [x for x, _ in placed], [place for _, place in placed]
    for number, block in enumerate(decoder.stack.blocks):
        assert isinstance(block, SerialBlock)
        if number >= skip:
            missing = [target - x[..., :count] for target, x in zip(true, tokens, strict=True)]
            _fit_attention(block.attention_norm, block.attention, tokens, missing, places)
        tokens = [
            x + block.attention(block.attention_norm(x)[0], place) for x, place in zip(tokens, places, strict=True)
        ]
        if number >= skip:
            missing = [target - x[..., :count] for target, x in zip(true, tokens, strict=True)]
            _fit_feed_forward(block.feed_forward_norm, block.feed_forward, tokens, missing)
        tokens = [x + block.feed_forward(block.feed_forward_norm(x)[0]) for x in tokens]


def _fit_attention(
    norm: Norm, attention: Attention, tokens: list[Tensor], missing: list[Tensor], places: list[Places]
) -> None:
    """Values and projection: for each head as many directions as it has channels, those that explain most."""
    heads, width, count = attention.heads, tokens[0].shape[-1], missing[0].shape[-1]
    channels = min(width // heads, count)  # of a head that are put to use
    normed = [norm(x)[0] for x in tokens]
    features = [
        torch.cat((_gathered(attention, h, place).flatten(-2), h), -1) for h, place in zip(normed, places, strict=True)
    ]  # the token itself as well, which the feed-forward adds; else heads would stand in for it
    gram, moment = _normal(features, missing)
    whole = _solved(gram, moment)
    reads = []
    for head in range(heads):
        at = slice(head * width, (head + 1) * width)
        root = torch.linalg.cholesky(_ridged(gram[at, at]))
        directions = torch.linalg.svd(root.T @ whole[at], full_matrices=False)[2][:channels]
        read = whole[at] @ directions.T  # [width, channels]
        scale = ((read * (gram[at, at] @ read)).sum(0) / gram[-1, -1]).sqrt()  # the last feature is the constant 1
        reads.append(read / scale.clamp(min=1e-9))
    reduce = torch.block_diag(*reads, torch.eye(width).to(gram))
    writes = _solved(reduce.T @ gram @ reduce, reduce.T @ moment)[: heads * channels].unflatten(0, (heads, channels))
    values = attention.qkv.weight.view(3, heads, -1, width)[2]
    projection = attention.proj.weight.view(width, heads, -1)
    values.zero_()
    values[:, :channels] = torch.stack(reads).mT.float()
    projection[:count, :, :channels] = writes.permute(2, 0, 1).float()


def _fit_feed_forward(norm: Norm, layer: FeedForward, tokens: list[Tensor], missing: list[Tensor]) -> None:
    """A linear map of the token, by hidden units whose gates the constant holds open."""
    features = [norm(x)[0] for x in tokens]
    linear = _solved(*_normal(features, missing)).T.float()
    channels = torch.eye(linear.shape[1])
    read = channels[: layer.down.weight.shape[1]]  # as many as there are hidden units
    fill(layer, torch.ones(len(channels)), [opened(channels[-1], read, channels[: len(linear)].T @ linear @ read.T)])


def _gathered(attention: Attention, h: Tensor, places: Places) -> Tensor:
    """What each head sees of whole tokens, [B, L, heads, width]: attention with the tokens themselves for values."""
    q, k, _ = attention.qkv(h).unflatten(-1, (3, attention.heads, -1)).unbind(2)
    parts = [part.unsqueeze(2).expand_as(q) for part in h.split(q.shape[-1], -1)]
    seen = [attention.attend(torch.stack((q, k, part), 2).flatten(2), places) for part in parts]
    return torch.cat([part.unflatten(-1, (attention.heads, -1)) for part in seen], -1)


def _normal(features: list[Tensor], missing: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Of the least squares from features [B, L, n] to what is missing [B, L, count], clips weighted: float64 [n, n]
    and [n, count]."""
    n, count = features[0].shape[-1], missing[0].shape[-1]
    gram, moment = torch.zeros(n, n).double(), torch.zeros(n, count).double()
    for x, target in zip(features, missing, strict=True):
        weight = 1 / (1 + target.square().mean((1, 2), keepdim=True).double() / FLOOR)
        weighted = (x * weight).flatten(0, 1)
        gram += weighted.T @ x.flatten(0, 1).double()
        moment += weighted.T @ target.flatten(0, 1).double()
    return gram, moment


def _ridged(gram: Tensor) -> Tensor:
    return gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)


def _solved(gram: Tensor, moment: Tensor) -> Tensor:
    return torch.linalg.solve(_ridged(gram), moment)
