"""A ViTok as an auto-encoder of diffusers: for its pipelines (`vae=`), its trainers and those written like them.

Import this module before a pipeline that was saved with such an auto-encoder is loaded: diffusers imports nothing
because a file names it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vitok.bottlenecks import GaussianPosterior, Posterior
from vitok.bottlenecks.gaussian import LOGVAR_RANGE
from vitok.checkpoint import load
from vitok.config import ViTokConfig, listed
from vitok.errors import InputError
from vitok.inference import FastViTok
from vitok.integrations.statistics import Statistics, read_statistics
from vitok.io.files import atomic_path
from vitok.layers import ParallelBlock, SerialBlock
from vitok.model import ViTok

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.utils.accelerate_utils import apply_forward_hook
except (ImportError, RuntimeError) as error:  # the second from a torchvision of another torch
    absent = (getattr(error, "name", None) or "").partition(".")[0] == "diffusers"
    reason = "" if absent else f", which cannot be imported ({' '.join(str(error).split())[:120]})"
    raise InputError(f"AutoencoderViTok needs diffusers{reason}: pip install 'vitok[diffusers]'") from None

CODE = "autoencoder_vitok"
"""Beside the weights, what `diffusers.AutoModel` runs where a user trusts it: an import of this module."""

CPU = torch.device("cpu")

TILE = 1024
"""Tokens at a time while tiling is on."""

ABSENT = "the config has no `vitok`, the fields of a ViTokConfig"


class LatentDistribution(DiagonalGaussianDistribution):
    """What `encode` gives: a diagonal Gaussian over latents, or a point, with the methods that diffusers' own has.

    `parameters` are the moments [B, 2c, h, w] or [B, 2c, t, h, w], mean first, `mean`, `logvar` and `std` half of it.
    `sample(generator)` draws by torch's generators, `mode()` is the mean. A point has a standard deviation of zero,
    draws nothing, and says the smallest logvar, -30, to those who want moments.
    """

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """[B, c, ...]; a list has a generator for each sample."""
        return self.mean if self.deterministic else super().sample(generator)

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """KL(self || other), by default to N(0, I), in nats, summed over all of a sample: float32 [B] at least."""
        if self.deterministic:
            return torch.zeros(len(self.mean), device=self.mean.device)
        mean, logvar = _wide(self.mean), _wide(self.logvar)
        if other is None:
            return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)
        theirs = _wide(other.logvar)
        distance = (mean - _wide(other.mean)).square() * torch.exp(-theirs)
        return 0.5 * (distance + torch.exp(logvar - theirs) - 1 - logvar + theirs).flatten(1).sum(1)

    def nll(self, sample: Tensor, dims: Sequence[int] | None = None) -> Tensor:
        """-log density of `sample`, in nats, summed over `dims`, by default all but the batch; zero of a point."""
        if self.deterministic:
            return torch.zeros(len(self.mean), device=self.mean.device)
        mean, logvar = _wide(self.mean), _wide(self.logvar)
        each = 0.5 * (math.log(2 * math.pi) + logvar + (_wide(sample) - mean).square() * torch.exp(-logvar))
        return each.sum(list(range(1, each.dim()) if dims is None else dims))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@dataclass
class EncoderOutput(AutoencoderKLOutput):
    """`latent_dist`; where that is a point also `latent` and `latents`, as deterministic auto-encoders have them."""

    @property
    def latents(self) -> Tensor:
        if not self.latent_dist.deterministic:
            raise AttributeError("latents of a Gaussian bottleneck are drawn: latent_dist.sample() or .mode()")
        return self.latent_dist.mode()

    @property
    def latent(self) -> Tensor:
        return self.latents


class AutoencoderViTok(ModelMixin, ConfigMixin):
    """`model`, a `vitok.ViTok`, in the shape in which diffusers has its auto-encoders, for pictures and for clips.

    Args:
        vitok: the fields of a `ViTokConfig`.
        scaling_factor, shift_factor: a generator works on (z - shift_factor) * scaling_factor.
        latents_mean, latents_std: a number a channel, for generators that work on (z - mean) / std. 0 and 1 if None.
        force_upcast: what some pipelines ask for before they decode in float16.

    What else pipelines read in `config` follows from these. `block_out_channels` and `temperal_downsample` say a stride
    by their length, and are None where it is no power of two. Raises InputError for what cannot be.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["SerialBlock", "ParallelBlock"]  # noqa: RUF012
    _repeated_blocks = _no_split_modules
    _group_offload_block_modules = ["model", "encoder", "decoder"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        vitok: dict[str, Any] | None = None,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        force_upcast: bool = False,
    ) -> None:
        super().__init__()
        if vitok is None:
            raise InputError(ABSENT)
        config = ViTokConfig.from_dict(vitok)
        c = config.channels
        normal = {
            "scaling_factor": _numbers("scaling_factor", [scaling_factor], 1, positive=True)[0],
            "shift_factor": _numbers("shift_factor", [shift_factor], 1)[0],
            "latents_mean": _numbers("latents_mean", [0.0] * c if latents_mean is None else latents_mean, c),
            "latents_std": _numbers("latents_std", [1.0] * c if latents_std is None else latents_std, c, positive=True),
        }
        self.register_to_config(vitok=config.to_dict(), **normal, **_derived(config))
        self.temporal_compression_ratio, self.spatial_compression_ratio = config.tubelet
        self.temperal_downsample = self.config.temperal_downsample
        self.use_tiling = self.use_slicing = self.gradient_checkpointing = False
        self.model = ViTok(config)

    @classmethod
    def from_vitok(
        cls, model: ViTok | str | Path, *, stats: Statistics | str | Path | None = None, **config: Any
    ) -> AutoencoderViTok:
        """The auto-encoder of a model, which it holds as it is.

        Args:
            model: a model, one made by `for_inference` too, or what `vitok.load` takes.
            stats: summary.json of a latent cache, or `vitok.integrations.statistics.measure(model, data)`; gives what
                is not in `config` of scaling_factor, shift_factor, latents_mean and latents_std.
            config: arguments of the class.
        """
        model = model if isinstance(model, ViTok) else load(model)
        if stats is not None:
            known = stats if isinstance(stats, Statistics) else read_statistics(stats)
            config = {
                "scaling_factor": known.scaling_factor, "shift_factor": known.shift_factor,
                "latents_mean": known.mean, "latents_std": known.std,
            } | config  # fmt: skip
        with torch.device("meta"):
            made = cls(vitok=model.config.to_dict(), **config)
        made.model = model
        return made.train(model.training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As diffusers does it, with all its arguments; InputError where files are missing or do not fit."""
        told = kwargs.pop("output_loading_info", False)
        path = pretrained_model_name_or_path
        try:
            model, info = super().from_pretrained(path, output_loading_info=True, **kwargs)
        except InputError as error:
            raise InputError(f"{path} is no AutoencoderViTok: {error}") from None
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"cannot load an AutoencoderViTok from {path}: {_first(error)}") from error
        for problem, kind in (("lacks", "missing_keys"), ("has unknown", "unexpected_keys")):
            if info.get(kind):
                raise InputError(f"{path} {problem} weight(s) {listed(info[kind])}")
        return (model, info) if told else model

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if "vitok" not in config:
            own = "preset" in config and "patch" in config
            raise InputError(f"{ABSENT}; {'from_vitok takes a model directory' if own else 'it is of something else'}")
        return loaded

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        # What follows from the rest is made anew, so that a file cannot contradict itself.
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k not in DERIVED}, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        if isinstance(self.model, FastViTok):
            raise InputError("a model made by for_inference cannot be saved; save the model it was made of")
        super().save_pretrained(save_directory, *args, **kwargs)

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        with atomic_path(Path(save_directory, f"{CODE}.py")) as path:
            path.write_text(f"from {__name__} import AutoencoderViTok  # noqa: F401\n")
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput | tuple[LatentDistribution]:
        """Pictures [B, 3, H, W] or clips [B, 3, T, H, W], in [-1, 1] or uint8, to a distribution over latents.

        Latents are [B, c, h, w] or [B, c, t, h, w] with h = ceil(H / p), t = ceil(T / q). InputError as `ViTok.encode`.
        """
        posteriors = [self.model.encode(part, layout="channels_first", chunk=self._chunk()) for part in self._parts(x)]
        moments = [_moments(posterior) for posterior in posteriors]
        deterministic = not isinstance(posteriors[0], GaussianPosterior)
        posterior = LatentDistribution(_joined(moments).contiguous(), deterministic)
        return EncoderOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self,
        z: Tensor,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        *,
        size: tuple[int, ...] | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents to pixels in (about) [-1, 1], not clamped: [B, 3, H, W] or [B, 3, T, H, W].

        Args:
            generator: is not used; decoding draws nothing.
            size: (H, W) or (T, H, W) to crop to, by default everything the latents cover.
        """
        pixels = _joined([self.model.decode(part, size=size, chunk=self._chunk()) for part in self._parts(z)])
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """The reconstruction, as large as the input: of the mode, or of a sample of the posterior."""
        posterior = self.encode(sample, return_dict=False)[0]
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict, size=tuple(sample.shape[2:]))

    def enable_tiling(self, use_tiling: bool = True, **sizes: Any) -> None:
        """Bound the memory of inference: outside attention work on 1024 tokens at a time, with the same result.

        Sizes of tiles, which other auto-encoders take, change nothing: attention sees the whole picture. It has no
        effect on a call that keeps gradients; there `enable_gradient_checkpointing` saves memory.
        """
        self.use_tiling = use_tiling

    def disable_tiling(self) -> None:
        self.use_tiling = False

    def enable_slicing(self) -> None:
        """Take the samples of a batch one by one, with the same result."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        self.use_slicing = False

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Any] | None = None) -> None:
        """Keep only the inputs of blocks for backward, and compute the rest once more there."""
        self.disable_gradient_checkpointing()
        run = gradient_checkpointing_func or partial(checkpoint, use_reentrant=False)
        for block in self._blocks():
            block.forward = partial(run, block.forward)  # type: ignore[method-assign]
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        if self.gradient_checkpointing:
            for block in self._blocks():
                assert isinstance(block.forward, partial)
                block.forward = block.forward.args[0]  # type: ignore[method-assign]
        self.gradient_checkpointing = False

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile encoder and decoder in place: `encode` and `decode` are compiled, not `forward` alone.

        Arguments are those of `torch.compile`.
        """
        self.model.encoder.compile(*args, **kwargs)
        self.model.decoder.compile(*args, **kwargs)

    def enable_group_offload(
        self,
        onload_device: torch.device,
        offload_device: torch.device = CPU,
        offload_type: str = "block_level",
        **options: Any,
    ) -> None:
        """As diffusers does it; by leaves the few vectors that blocks hold themselves stay on `onload_device`.

        A LayerScale is used after its block has returned, and blocks are also run in halves: no hook would bring them.
        """
        modules = (
            [m for block in self._blocks() for m in (block, block.attention)] if offload_type == "leaf_level" else []
        )
        kept = [(module, module._parameters) for module in modules]
        for module, _ in kept:
            module._parameters = {}
        super().enable_group_offload(onload_device, offload_device, offload_type, **options)
        for module, own in kept:
            module._parameters = own
            for vector in own.values():
                if vector is not None:
                    vector.data = vector.data.to(onload_device)

    def _blocks(self) -> Iterator[SerialBlock | ParallelBlock]:
        yield from (m for m in self.model.modules() if isinstance(m, (SerialBlock, ParallelBlock)))

    def _chunk(self) -> int | None:
        return TILE if self.use_tiling and not torch.is_grad_enabled() else None

    def _parts(self, x: Tensor) -> Sequence[Tensor]:
        return x.split(1) if self.use_slicing else (x,)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _moments(posterior: Posterior) -> Tensor:
    """[B, 2c, ...]"""
    if isinstance(posterior, GaussianPosterior):
        return posterior.moments.transpose(1, 2).unflatten(-1, posterior.grid)
    return torch.cat((posterior.mean, torch.full_like(posterior.mean, LOGVAR_RANGE[0])), 1)


def _derived(config: ViTokConfig) -> dict[str, Any]:
    """What pipelines read and what follows from ours."""
    q, p = config.tubelet
    doublings = [n.bit_length() - 1 if n.bit_count() == 1 else None for n in (p, q)]
    space, time = doublings
    return {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": config.channels,
        "z_dim": config.channels,
        "spatial_compression_ratio": p,
        "temporal_compression_ratio": q,
        "scale_factor_spatial": p,
        "scale_factor_temporal": q,
        "block_out_channels": None if space is None else [config.encoder_width] * (space + 1),
        "temperal_downsample": (
            None if space is None or time is None or time > space else [False] * (space - time) + [True] * time
        ),
        "auto_map": {"AutoModel": f"{CODE}.AutoencoderViTok"},
    }


DERIVED = frozenset(_derived(ViTokConfig.from_name("S-B/16")))


def _numbers(name: str, values: Sequence[float], count: int, *, positive: bool = False) -> list[float]:
    """As floats; InputError where they are not `count` finite numbers."""
    try:
        floats = [float(x) for x in values]
    except (TypeError, ValueError):
        floats = []
    if len(floats) != count or not all(math.isfinite(x) and (x > 0 or not positive) for x in floats):
        wanted = f"{'a' if count == 1 else count} finite {'positive ' if positive else ''}number{'s' * (count > 1)}"
        raise InputError(f"{name} must be {wanted}, got {str(values if count > 1 else values[0])[:80]}")
    return floats


def _first(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
