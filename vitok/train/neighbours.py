"""The start of a decoder that knows its neighbours: what heads make of what they see, by least squares.

From `vitok.train.init` each head looks at one neighbour of its token. What is best added to a token, of what its heads
gather and of the token itself, is then a linear problem, solved for one layer after the other on what the layers before
have left. It is what lapped transforms know of the blocks beside a block (Malvar, "Signal Processing with Lapped
Transforms", 1992), fitted to data.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vitok.errors import InputError
from vitok.evaluate.pca import PatchPCA
from vitok.layers import Attention, FeedForward, Norm, Places, SerialBlock
from vitok.model import ViTok
from vitok.ops import tubelet_gather
from vitok.train.init import Track, can_look_at_neighbours, untracked
from vitok.train.local_pca import fill, opened

FLOOR = 1e-4
"""A mean squared error, much above which clips weigh by its inverse, as in the pixel loss `log_l2`."""
RIDGE = 1e-5
"""On the diagonals of the normal equations, in units of their mean."""
SHRINK = 1e-2
"""Of the normal equations of a class: the part of the mean class's that is added, so that rare ones stay with all."""
AT_ONCE = 8  # clips


@torch.no_grad()
def fit_neighbours(
    model: ViTok,
    pca: PatchPCA,
    batches: Iterable[Tensor],
    classes: Tensor,
    *,
    skip: int = 0,
    track: Track = untracked,
) -> None:
    """Fit attention and feed-forward of all blocks of the decoder but the first `skip`.

    Args:
        model: as `vitok.train.init` or `vitok.train.local_pca` leaves it: tokens of its decoder hold coordinates in
            `pca`, and a constant in the last channel.
        pca: the components of those coordinates.
        batches: uint8 pixels [B, T, H, W, 3], of any sizes; pictures and clips may stand side by side.
        classes: of tokens, as maps of a token behind a norm [K, width] (`vitok.train.local_pca.matching`): 1 where it
            is of that class, 0 or less elsewhere. Feed-forward layers add a map for each to the one for all.
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
    basis = pca.components[: config.decoder_width - 1]
    true, tokens, places = [], list[Tensor](), list[Places]()
    for clips in (part for batch in batches for part in batch.split(AT_ONCE)):
        true.append((tubelet_gather(clips, tubelet=config.tubelet) - pca.mean) @ basis.T)
        codes = model.encode(clips, layout="channels_last").mode().flatten(2).transpose(1, 2)
        started, place = decoder.stack.placed(decoder.from_latents(codes), config.grid(*clips.shape[1:4]))
        tokens.append(started)
        places.append(place)
    for number in track(range(len(decoder.stack.blocks)), "blocks", "neighbours"):
        block = decoder.stack.blocks[number]
        assert isinstance(block, SerialBlock)
        if number >= skip:
            _fit_attention(block.attention_norm, block.attention, tokens, true, places)
        for x, place in zip(tokens, places, strict=True):
            x += block.attention(block.attention_norm(x)[0], place)
        if number >= skip:
            _fit_feed_forward(block.feed_forward_norm, block.feed_forward, tokens, true, classes)
        for x in tokens:
            x += block.feed_forward(block.feed_forward_norm(x)[0])


def _fit_attention(
    norm: Norm, attention: Attention, tokens: list[Tensor], true: list[Tensor], places: list[Places]
) -> None:
    """Values and projection: for each head as many directions as it has channels, those that explain most."""
    heads, width, count = attention.heads, tokens[0].shape[-1], true[0].shape[-1]
    channels = min(width // heads, count)  # of a head that are put to use

    def seen(x: Tensor, place: Places) -> Tensor:
        """By the heads, and the token itself, which the feed-forward adds; else heads would stand in for it."""
        h = norm(x)[0]
        return torch.cat((_gathered(attention, h, place).flatten(-2), h), -1)

    features = (seen(x, place) for x, place in zip(tokens, places, strict=True))
    gram, moment = (x[0] for x in _normal(features, tokens, true, torch.eye(width)[-1:]))
    whole, reads = _solved(gram, moment), []
    for head in range(heads):
        at = slice(head * width, (head + 1) * width)
        read, _ = _cut(gram[at, at], whole[at], channels)
        energy = (read * (_ridged(gram[at, at]) @ read)).sum(0) / gram[-1, -1]  # the last feature is the constant 1
        reads.append(read / energy.sqrt().clamp(min=1e-9))
    reduce = torch.block_diag(*reads, torch.eye(width).to(gram))
    writes = _solved(reduce.T @ gram @ reduce, reduce.T @ moment)[: heads * channels].unflatten(0, (heads, channels))
    values = attention.qkv.weight.view(3, heads, -1, width)[2]
    projection = attention.proj.weight.view(width, heads, -1)
    values.zero_()
    values[:, :channels] = torch.stack(reads).mT.float()
    projection[:count, :, :channels] = writes.permute(2, 0, 1).float()


def _fit_feed_forward(
    norm: Norm, layer: FeedForward, tokens: list[Tensor], true: list[Tensor], classes: Tensor
) -> None:
    """A linear map of the token for all, and what is left of a map for each class, by the hidden units there are."""
    grams, moments = _normal((norm(x)[0] for x in tokens), tokens, true, classes)
    hidden, channels = layer.down.weight.shape[1], torch.eye(classes.shape[1])
    gram, into = grams.sum(0), channels[:, : true[0].shape[-1]]
    read, write = _cut(gram, _solved(gram, moments.sum(0)), hidden)
    units = [opened(channels[-1], read.T.float(), into @ write.T.float())]
    if most := (hidden - read.shape[1]) // len(classes) if len(classes) > 1 else 0:
        for each, own, moment in zip(classes, grams, moments, strict=True):
            shrunk = own + SHRINK * gram / len(classes)
            own_read, own_write = _cut(shrunk, _solved(shrunk, moment - own @ read @ write), most)
            units.append(opened(each, own_read.T.float(), into @ own_write.T.float()))
    fill(layer, torch.ones(len(channels)), units)


def _gathered(attention: Attention, h: Tensor, places: Places) -> Tensor:
    """What each head sees of whole tokens, [B, L, heads, width]: attention with the tokens themselves for values."""
    q, k, _ = attention.qkv(h).unflatten(-1, (3, attention.heads, -1)).unbind(2)
    parts = [part.unsqueeze(2).expand_as(q) for part in h.split(q.shape[-1], -1)]
    seen = [attention.attend(torch.stack((q, k, part), 2).flatten(2), places) for part in parts]
    return torch.cat([part.unflatten(-1, (attention.heads, -1)) for part in seen], -1)


def _normal(
    features: Iterable[Tensor], tokens: list[Tensor], true: list[Tensor], classes: Tensor
) -> tuple[Tensor, Tensor]:
    """Of the least squares, for each class, from features [B, L, n], of which the last are the normed token, to what
    tokens miss, clips weighted: float64 [K, n, n] and [K, n, count]."""
    grams, moments = torch.zeros(()), torch.zeros(())
    for x, token, target in zip(features, tokens, true, strict=True):
        missing = target - token[..., : target.shape[-1]]
        weighted = x / (1 + missing.square().mean((1, 2), keepdim=True) / FLOOR)
        chosen = (x[..., -classes.shape[1] :] @ classes.T).argmax(-1)
        ours = [chosen == number for number in range(len(classes))]
        grams = grams + torch.stack([(weighted[at].T @ x[at]).double() for at in ours])
        moments = moments + torch.stack([(weighted[at].T @ missing[at]).double() for at in ours])
    return grams, moments


def _ridged(gram: Tensor) -> Tensor:
    return gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)


def _solved(gram: Tensor, moment: Tensor) -> Tensor:
    return torch.linalg.solve(_ridged(gram), moment)


def _cut(gram: Tensor, whole: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """A map [n, count] cut to the directions that explain most: factors [n, most] and [most, count]."""
    root = torch.linalg.cholesky(_ridged(gram))
    write = torch.linalg.svd(root.T @ whole, full_matrices=False)[2][:most]
    return whole @ write.T, write
