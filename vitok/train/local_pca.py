"""Starting a ViTok as several linear tokenizers at once, of which every tubelet takes the one that suits it.

One basis cannot serve what stands still, what moves and what is smooth equally well. Local PCA has several, and codes a
tubelet by the one that keeps most of it (Kambhatla and Leen, "Dimension reduction by local principal component
analysis", Neural Computation 9, 1997). The feed-forward layers of a ViTok can do that to rounding: those of the encoder
choose and code, the decoder's first decodes. Training begins there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vitok.bottlenecks import GaussianBottleneck
from vitok.config import ViTokConfig
from vitok.errors import InputError
from vitok.evaluate.pca import PatchPCA, fit_pca
from vitok.layers import FeedForward, Norm, Stack
from vitok.model import ViTok
from vitok.ops import tubelet_gather
from vitok.train.init import Track, best_logvar, can_look_at_neighbours, look_at_neighbours, silence, untracked

SAMPLE = 1 << 17
"""Tubelets that bases are fitted on, about."""
ROUNDS = 20
"""Of choosing a basis for each tubelet and fitting each basis to its tubelets."""
GREY = 3e-4
"""A mean squared error, of pixels in [-1, 1], below which tubelets weigh alike in a fit: 1.6 grey levels of 255."""
CONSTANT = 3000.0
"""What norms divide by, in units of all a token's coordinates: so large that content does not change it."""
STEEP = 1000.0
"""Bases are mixed where the energies they keep, sums over a tubelet, differ by less than 1 / STEEP."""
SHARP = 10.0
"""Factor on the argument of SiLU that makes it a ramp: silu(SHARP x) / SHARP is max(x, 0) but for 0.028 near zero."""
OPEN = 8.0
"""The argument of SiLU in the decoder's gates that are open: small, as what Adam changes is multiplied by it."""


class LocalPCA(NamedTuple):
    """`bases` [K, c, k]: orthonormal rows, in coordinates of `pca` (k components); the first is its first c components
    and the others are turned to be as near to the first as they can. `coordinates` [N, k] of tubelets that were seen.
    """

    pca: PatchPCA
    bases: Tensor
    coordinates: Tensor

    def choose(self, coordinates: Tensor) -> Tensor:
        """The number of the basis that keeps most of each tubelet: [N, k] to int64 [N]."""
        return torch.stack([(coordinates @ basis.T).square().sum(1) for basis in self.bases]).argmax(0)

    def code(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates [N, k] in the chosen bases: (codes [N, c], numbers of the bases [N])."""
        chosen = self.choose(coordinates)
        codes = coordinates.new_empty(len(coordinates), self.bases.shape[1])
        for number, basis in enumerate(self.bases):
            codes[chosen == number] = coordinates[chosen == number] @ basis.T
        return codes, chosen


class Units(NamedTuple):
    """Hidden units of a feed-forward layer, as maps of a token's channels: `down` @ (act(`gate` @ x) * (`up` @ x)).

    `gate` and `up` [n, width], `down` [width, n]. Two units make a product exactly, as act(x) - act(-x) = x.
    """

    gate: Tensor
    up: Tensor
    down: Tensor


def opened(gate: Tensor, up: Tensor, down: Tensor) -> Units:
    """Units that add `down` @ `up` @ x where `gate` [width] @ x is 1, and nothing where it is 0 or -1 and less."""
    act = torch.nn.functional.silu(torch.tensor(OPEN))
    return Units((OPEN * gate).expand_as(up), up, down / act)


def count_flags(bases: int) -> int:
    """Channels that say which basis a tubelet takes: the bits of its number."""
    return (bases - 1).bit_length()


def matching(width: int, components: int, bases: int) -> Tensor:
    """Maps of a token of the decoder behind a norm, [bases, width]: 1 where it takes that basis, else 0 or less."""
    bits = _bits(bases)
    flags, _, one = torch.eye(width)[components:].split((bits.shape[1], width - components - bits.shape[1] - 1, 1))
    return (2 * bits - 1) @ flags - (bits.sum(1, keepdim=True) - 1) * one


def _bits(bases: int) -> Tensor:
    return (torch.arange(bases)[:, None] >> torch.arange(count_flags(bases)) & 1).float()


def count_components(config: ViTokConfig, bases: int) -> int:
    """How many coordinates a token has room for, beside a constant and what choosing among `bases` takes.

    Raises InputError when the model cannot hold so many bases.
    """
    flags = count_flags(bases)
    count = min(config.encoder_width - 2 * bases - flags, config.decoder_width - 1 - flags, config.tubelet_elements)
    _check(config, bases, config.channels - flags, count)
    return count


def fit_local_pca(
    batch: Callable[[int], Tensor],
    batches: int,
    tubelet: tuple[int, int],
    components: int,
    bases: int,
    channels: int,
    track: Track = untracked,
) -> LocalPCA:
    """Fit `bases` bases of `channels` components each, inside the first `components` principal components.

    A tubelet weighs one over the root of its error, between what mean squared error and what PSNR would have.

    Args:
        batch: gives uint8 pixels [B, T, H, W, 3] of a number below `batches`, the same whenever it is asked.
    """
    pca = fit_pca(map(batch, track(range(batches), "batches", "PCA")), tubelet, components)
    total = batches * batch(0).numel() // len(pca.mean)
    coordinates, energies = [], []
    apart = -(-total // SAMPLE) | 1  # odd, so that they are no columns of tubelets
    for number in track(range(batches), "batches", "tubelets for bases"):
        rows = tubelet_gather(batch(number), tubelet=tubelet).flatten(0, 1)[::apart] - pca.mean
        coordinates.append(rows @ pca.components.T)
        energies.append(rows.square().sum(1))
    z, energy = torch.cat(coordinates), torch.cat(energies)
    kept = z[:, :channels].square().sum(1)[None]
    chosen = torch.empty(len(z), dtype=torch.int64)
    for number, part in enumerate((energy - kept[0]).argsort().chunk(bases)):
        chosen[part] = number
    for _ in track(range(ROUNDS), "rounds", "bases"):
        error = energy - kept.max(0).values
        weight = (error.clamp(min=0) + GREY * len(pca.mean)).rsqrt()
        found = [_principal(z[chosen == number], weight[chosen == number], channels) for number in range(bases)]
        kept = torch.stack([(z @ basis.T).square().sum(1) for basis in found])
        chosen = kept.argmax(0)
    found.sort(key=lambda basis: -((z @ basis.T).square().sum(1) >= kept.max(0).values).sum())
    return _turned(pca, torch.stack(found), z)


def _principal(z: Tensor, weight: Tensor, channels: int) -> Tensor:
    scatter = (z * weight[:, None]).T.double() @ z.double()
    return torch.linalg.eigh(scatter)[1].T.flip(0)[:channels].float()


def _turned(pca: PatchPCA, bases: Tensor, z: Tensor) -> LocalPCA:
    """Coordinates turned so that the first basis comes first and the rest are uncorrelated, bases aligned with it."""
    first = bases[0].double()
    rest = torch.eye(z.shape[1]).double() - first.T @ first
    directions = torch.linalg.eigh(rest @ (z.T.double() @ z.double()) @ rest)[1].T.flip(0)[: len(rest) - len(first)]
    turn = torch.cat((first, directions)).float()
    z, bases = z @ turn.T, bases @ turn.T
    for basis in bases:  # orthogonal Procrustes: the rotation that maximises the trace of basis @ first.T
        u, _, vh = torch.linalg.svd(basis @ bases[0].T)
        basis.copy_((u @ vh).T @ basis)
    return LocalPCA(PatchPCA(pca.tubelet, pca.mean, turn @ pca.components, z.square().mean(0)), bases, z)


@torch.no_grad()
def init_from_local_pca(model: ViTok, local: LocalPCA, beta: float) -> None:
    """Make `model` code each tubelet by the basis that keeps most of it.

    A token holds coordinates, `scores` (how much more than the first each other basis keeps), for each basis by how
    much others are ahead of it (`behind`), `flags` (the bits of the number of the basis taken) and a constant. Latents
    are the coordinates in the basis taken and the flags, scaled to unit variance. Norms divide by the constant, which
    stands for the bias of every map; queries and keys look at neighbours as in `vitok.train.init`.

    The maps that choose are steep: an optimizer's steps on them destroy the code, so train with `freeze_encoder`.
    Raises InputError when the model cannot hold this.
    """
    config, (pca, bases, z) = model.config, local
    others, c, k = len(bases) - 1, bases.shape[1], bases.shape[2]
    _check(config, len(bases), c, k)
    silence(model)
    deviations = pca.variances.sqrt().clamp(min=1e-4)
    constant = CONSTANT * pca.variances.sum().sqrt()
    encoder, decoder, change = model.encoder, model.decoder, bases[1:] - bases[0]

    bits = _bits(len(bases))[1:]  # [K - 1, flags]
    taken = k + 2 * others + 2 + bits.shape[1]
    coordinates, scores, behind, flags, _, one = torch.eye(config.encoder_width).split(
        (k, others, others + 1, bits.shape[1], config.encoder_width - taken, 1)
    )
    one = one / constant
    gains = _set_norms(encoder.stack, deviations, constant, flags.sum(0))
    encoder.embed.weight.zero_()
    encoder.embed.bias.zero_()
    encoder.embed.weight[:k], encoder.embed.bias[:k] = pca.components, -pca.components @ pca.mean
    encoder.embed.bias[-1] = constant
    *scoring, comparing, coding = _feed_forwards(encoder.stack)
    most = config.encoder_hidden // (2 * others)
    forms = [
        _form(basis.T @ basis - bases[0].T @ bases[0], z.T @ z / len(z), most, coordinates, score)
        for basis, score in zip(bases[1:], scores, strict=True)
    ]
    for layer in scoring:
        if parts := [part for form in forms if (part := next(form, None))]:
            fill(layer, gains, parts)
    ahead = torch.cat((torch.zeros_like(one), scores))
    fill(comparing, gains, [
        Units(SHARP * (STEEP * (ahead[b] - ahead[a]) + (b < a) * one), one, behind[a, :, None] / (SHARP * STEEP))
        for a in range(others + 1) for b in range(others + 1) if a != b
    ])  # fmt: skip
    fill(coding, gains, [
        Units(
            (SHARP * (one - STEEP * late)).expand(c + 1, -1), torch.cat((recode @ coordinates, one)),
            torch.cat((coordinates[:c], bit[None] @ flags)).T / SHARP,
        ) for late, bit, recode in zip(behind[1:], bits, change, strict=True)
    ])  # fmt: skip

    code, chosen = local.code(z)
    scale = code.square().mean(0).sqrt().clamp(min=1e-4)
    share = torch.bincount(chosen, minlength=others + 1)[1:] / len(z) @ bits
    spread = (share * (1 - share)).sqrt().clamp(min=1e-4)
    moved = torch.stack([(code @ each).square().sum(1).mean() for each in change]).mean().sqrt()  # by a flag, in pixels
    bottleneck, latents = encoder.bottleneck, torch.eye(config.channels)
    assert isinstance(bottleneck, GaussianBottleneck)
    mean, logvar = bottleneck.to_moments.weight.chunk(2)
    mean[:c], mean[c:] = coordinates[:c] / scale[:, None], flags / spread[:, None]
    logvar.zero_()
    bottleneck.to_moments.bias.copy_(
        torch.cat((0 * scale, -share / spread, best_logvar(torch.cat((scale, spread * moved)), beta, len(pca.mean))))
    )

    coordinates, flags, _, one = torch.eye(config.decoder_width).split(
        (k, bits.shape[1], config.decoder_width - k - bits.shape[1] - 1, 1)
    )
    gains = _set_norms(decoder.stack, deviations, constant, torch.zeros(config.decoder_width))
    decoder.from_latents.weight.copy_(coordinates[:c].T * scale @ latents[:c] + flags.T * spread @ latents[c:])
    decoder.from_latents.bias.copy_(share @ flags + constant * one[0])
    fill(_feed_forwards(decoder.stack)[0], gains, [
        opened(match, coordinates[:c], (recode @ coordinates).T)
        for match, recode in zip(gains * matching(config.decoder_width, k, len(bases))[1:], change, strict=True)
    ])  # fmt: skip
    decoder.unembed.weight.copy_(pca.components.T @ coordinates)
    decoder.unembed.bias.copy_(pca.mean)
    for stack in (encoder.stack, decoder.stack):
        if can_look_at_neighbours(config):
            look_at_neighbours(stack, config)


def _check(config: ViTokConfig, bases: int, c: int, k: int) -> None:
    needed = {"bottleneck": "gaussian", "norm": "rms", "final_norm": True, "block": "serial", "gate": "silu",
              "layer_scale": None, "absolute": "none", "pixel_bias": "element"}  # fmt: skip
    if wrong := [name for name, value in needed.items() if getattr(config, name) != value]:
        raise InputError(f"init 'pca' with several bases needs {wrong[0]} {needed[wrong[0]]!r} in the model's config")
    units = max(bases * (bases - 1), (bases - 1) * (c + 1))
    hidden = min(config.encoder_hidden, config.decoder_hidden)
    if config.encoder_depth < 3 or hidden < units or not 0 < c <= k or c + count_flags(bases) != config.channels:
        raise InputError(
            f"init 'pca' with {bases} bases of {config.channels} channels needs an encoder of 3 blocks, {units} hidden "
            f"units and wider stacks, got {config.encoder_depth} blocks, {config.encoder_hidden} and "
            f"{config.decoder_hidden} hidden units, widths of {config.encoder_width} and {config.decoder_width}"
        )


def _feed_forwards(stack: Stack) -> list[FeedForward]:
    return [module for module in stack.modules() if isinstance(module, FeedForward)]


def _set_norms(stack: Stack, deviations: Tensor, constant: Tensor, kept: Tensor) -> Tensor:
    """What norms multiply channels by, after division by the constant: returned for those in blocks, [width].

    They lift small coordinates and make the constant 1; the last norm hands on coordinates and the channels `kept`.
    """
    width, k = stack.stack.width, len(deviations)
    root = constant / width**0.5  # root mean square of a token
    gains = torch.ones(width)
    gains[:k], gains[-1] = (deviations * deviations.mean()).rsqrt(), 1 / constant
    for norm in stack.modules():
        if isinstance(norm, Norm):
            norm.weight.copy_(root * gains)
    assert stack.norm is not None
    stack.norm.weight.copy_(root * kept)
    stack.norm.weight[:k] = root
    return gains


def _form(form: Tensor, scatter: Tensor, most: int, coordinates: Tensor, channel: Tensor) -> Iterator[Units]:
    """z' form z of coordinates, into a channel: at most so many squares a layer, those that matter most first."""
    values, vectors = torch.linalg.eigh(form.double())
    values, vectors = values.float(), vectors.T.float()
    order = (values.abs() * ((vectors @ scatter) * vectors).sum(1)).argsort(descending=True)
    for best in order.split(most):
        read = vectors[best] @ coordinates
        both = torch.cat((read, -read))
        yield Units(both, both, torch.outer(channel, values[best].repeat(2)))


def fill(layer: FeedForward, gains: Tensor, units: list[Units]) -> None:
    """Set the layer's first hidden units, for tokens as they are before the norm; the rest stay without effect."""
    gate = torch.cat([torch.atleast_2d(each.gate) for each in units])
    up = torch.cat([torch.atleast_2d(each.up) for each in units])
    hidden = layer.down.weight.shape[1]
    layer.gate_up.weight[: len(gate)] = gate / gains
    layer.gate_up.weight[hidden : hidden + len(up)] = up / gains
    layer.down.weight[:, : len(gate)] = torch.cat([each.down for each in units], 1)
