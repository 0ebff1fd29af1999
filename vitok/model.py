"""ViTok: pixels -> tubelet tokens -> encoder -> bottleneck -> latents -> decoder -> pixels (arXiv:2501.09755)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vitok.bottlenecks import BOTTLENECKS, Posterior
from vitok.config import ViTokConfig
from vitok.errors import InputError
from vitok.layers import Linear, Stack, TubeletEmbed, TubeletUnembed
from vitok.memory import plan

if TYPE_CHECKING:
    from vitok.inference import FastViTok


class Encoder(nn.Module):
    def __init__(self, config: ViTokConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = TubeletEmbed(config)
        self.stack = Stack(config, config.encoder)
        self.bottleneck = BOTTLENECKS[config.bottleneck](config.encoder_width, config.channels)

    def forward(self, clip: Tensor, image: bool = False, chunk: int | None = None) -> Posterior:
        """Pixels [B, T, H, W, 3] to the posterior; `image` leaves the time axis out of its shapes."""
        grid = self.config.grid(*clip.shape[1:4])
        return self.bottleneck.posterior(self.code(clip, chunk), grid[1:] if image else grid)

    def code(self, clip: Tensor, chunk: int | None = None) -> Tensor:
        """Pixels [B, T, H, W, 3] to what the posterior is made of, [B, L, n]."""
        return self.bottleneck(self.stack(self.embed(clip, chunk), self.config.grid(*clip.shape[1:4]), chunk))

    def packed(self, clips: Sequence[Tensor], images: Sequence[bool], chunk: int | None = None) -> list[Posterior]:
        """What `forward` makes of each, with one pass of the blocks over the tokens of all."""
        grids = [self.config.grid(*clip.shape[1:4]) for clip in clips]
        tokens = self.stack.packed([self.embed(clip, chunk) for clip in clips], grids, chunk)
        shapes = [grid[1:] if image else grid for grid, image in zip(grids, images, strict=True)]
        return [self.bottleneck.posterior(self.bottleneck(x), shape) for x, shape in zip(tokens, shapes, strict=True)]


class Decoder(nn.Module):
    def __init__(self, config: ViTokConfig) -> None:
        super().__init__()
        self.config = config
        self.from_latents = Linear(config.channels, config.decoder_width)
        self.stack = Stack(config, config.decoder)
        self.unembed = TubeletUnembed(config)

    def forward(self, latents: Tensor, size: tuple[int, int, int], chunk: int | None = None) -> Tensor:
        """Latents [B, c, t, h, w] to pixels [B, 3, T, H, W] for size (T, H, W)."""
        return self.unembed(self.tokens(latents, chunk), size, chunk)

    def packed(
        self, latents: Sequence[Tensor], sizes: Sequence[tuple[int, int, int]], chunk: int | None = None
    ) -> list[Tensor]:
        """What `forward` makes of each, with one pass of the blocks over the tokens of all."""
        grids = [(z.shape[2], z.shape[3], z.shape[4]) for z in latents]
        tokens = self.stack.packed([self.from_latents(z.flatten(2).transpose(1, 2)) for z in latents], grids, chunk)
        return [self.unembed(x, size, chunk) for x, size in zip(tokens, sizes, strict=True)]

    def tokens(self, latents: Tensor, chunk: int | None = None) -> Tensor:
        """Latents [B, c, t, h, w] to the tokens [B, L, width] that pixels are made of."""
        tokens = self.from_latents(latents.flatten(2).transpose(1, 2))
        return self.stack(tokens, tuple(latents.shape[2:]), chunk)


class ViTok(nn.Module):
    """A visual tokenizer: `encode` pixels to a posterior over latents, `decode` latents to pixels.

    Pixels: [B, 3, H, W] or [B, H, W, 3] pictures, [B, 3, T, H, W] or [B, T, H, W, 3] clips; uint8 0..255 or float in
    [-1, 1]; any H, W and T. Latents: [B, c, h, w] for pictures, [B, c, t, h, w] for clips, h = ceil(H / p) and so on.
    """

    def __init__(self, config: ViTokConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.reset_parameters()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def _moved(self, x: Tensor) -> Tensor:
        """To the model's device; not where weights wait on "meta" for accelerate to bring them, and it brings x too."""
        return x if self.device.type == "meta" else x.to(self.device)

    def reset_parameters(self) -> None:
        """Xavier-uniform matrices, zero biases; norms and LayerScale keep the values they are made with."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, TubeletEmbed, TubeletUnembed)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def encode(self, pixels: Tensor, *, layout: str = "auto", chunk: int | None = None) -> Posterior:
        """Encode pictures or clips.

        Args:
            pixels: as in the class docstring. Floats on the CPU are checked for range and NaN.
            layout: "channels_first", "channels_last" or "auto", which looks for the dimension of size 3 and raises
                InputError where both could be meant.
            chunk: without gradients, work on so many tokens at a time outside attention, which bounds the memory and
                changes results by rounding at most. None chooses: all at once up to 16384 tokens, then chunks of as
                many, or fewer where memory is short.

        Returns: a posterior with .mean, .logvar, .mode(), .sample(seed=...) and .kl().
        Raises InputError for a wrong rank, channel count, dtype or range, and for more than there is memory for.
        """
        clip, image = as_clip(pixels, layout)
        check_range(clip)
        chunk = self._plan_encode([clip], chunk)
        return self.encoder(self._moved(clip), image, chunk)

    def decode(self, latents: Tensor, *, size: tuple[int, ...] | None = None, chunk: int | None = None) -> Tensor:
        """Decode latents to pixels in (about) [-1, 1], not clamped: [B, 3, H, W] or [B, 3, T, H, W], the model's dtype.

        Args:
            latents: [B, c, h, w] or [B, c, t, h, w].
            size: (H, W) or (T, H, W) to crop to, by default everything the latents cover.
            chunk: as in `encode`.

        Raises InputError when the latents' shape is not this model's, the size does not fit them or memory is short.
        """
        clip, full = self._checked(latents, size)
        pixels = self.decoder(clip, full, self._plan_decode([clip], chunk))
        return pixels.squeeze(2) if latents.dim() == 4 else pixels

    def _plan_encode(self, clips: Sequence[Tensor], chunk: int | None) -> int | None:
        grids = [(len(clip), *self.config.grid(*clip.shape[1:4])) for clip in clips]
        moved = sum(clip.nbytes for clip in clips if clip.device != self.device)
        return plan(self.config, grids, self.encoder.embed.weight, chunk, decoding=False, moved=moved)

    def _plan_decode(self, latents: Sequence[Tensor], chunk: int | None) -> int | None:
        grids = [(len(z), z.shape[2], z.shape[3], z.shape[4]) for z in latents]
        return plan(self.config, grids, self.decoder.unembed.weight, chunk, decoding=True)

    def _checked(self, latents: Tensor, size: tuple[int, ...] | None) -> tuple[Tensor, tuple[int, int, int]]:
        """Latents [B, c, t, h, w] on the model's device, in its dtype, and the (T, H, W) that is wanted of them."""
        channels = self.config.channels
        if (
            latents.dim() not in (4, 5)
            or latents.shape[1] != channels
            or 0 in latents.shape
            or not latents.is_floating_point()
        ):
            raise InputError(
                f"latents of {self.config.name} must be floating point [B, {channels}, h, w] or "
                f"[B, {channels}, t, h, w], got {latents.dtype} {list(latents.shape)}"
            )
        image = latents.dim() == 4
        latents = self._moved(latents.unsqueeze(2) if image else latents).to(self.dtype)
        q, p = self.config.tubelet
        covered = tuple(n * step for n, step in zip(latents.shape[2:], (q, p, p), strict=True))
        frames = 1 if image else covered[0]
        wanted = covered[1:] if size is None else tuple(size)
        full = (frames, *wanted) if len(wanted) == 2 else wanted
        if (
            len(full) != 3
            or min(full) < 1
            or self.config.grid(*full) != tuple(latents.shape[2:])
            or (image and full[0] != 1)
        ):
            raise InputError(
                f"size {wanted} does not fit latents {list(latents.shape)}, which cover up to {covered} (T, H, W)"
            )
        return latents, (full[0], full[1], full[2])

    def encode_packed(
        self, items: Sequence[Tensor], *, layout: str = "auto", chunk: int | None = None
    ) -> list[Posterior]:
        """Encode pictures and clips of any sizes in one pass, without padding: `[self.encode(x) for x in items]`.

        Args:
            items: what `encode` takes, each a batch of its own size: [B, 3, H, W], [B, T, H, W, 3] and so on.
            layout: as in `encode`, of all items.
            chunk: as in `encode`, of the tokens of all items.

        Returns: a posterior for each item, equal to that of `encode` but for rounding: tokens attend within their own
        picture or clip. Raises InputError for an empty list, and for an item as `encode` does, naming it.
        """
        clips, images = [], []
        for number, pixels in enumerate(_several("items", items)):
            with _named("item", number):
                clip, image = as_clip(pixels, layout)
                check_range(clip)
            clips.append(clip)
            images.append(image)
        chunk = self._plan_encode(clips, chunk)
        return self.encoder.packed([clip.to(self.device) for clip in clips], images, chunk)

    def decode_packed(
        self,
        latents: Sequence[Tensor],
        *,
        sizes: Sequence[tuple[int, ...] | None] | None = None,
        chunk: int | None = None,
    ) -> list[Tensor]:
        """Decode latents of any sizes in one pass, without padding: `[self.decode(z, size=s) for z, s in ...]`.

        Args:
            latents: what `decode` takes, each a batch of its own size.
            sizes: a size for each, or None for all that the latents cover.
            chunk: as in `encode`, of the tokens of all latents.

        Returns: pixels of each, as `decode` gives them but for rounding. Raises InputError for an empty list, for as
        many sizes as there are not latents, and for one of them as `decode` does, naming it.
        """
        wanted = [None] * len(_several("latents", latents)) if sizes is None else list(sizes)
        if len(wanted) != len(latents):
            raise InputError(f"sizes must be as many as latents, {len(latents)}, got {len(wanted)}")
        clips, full = [], []
        for number, (z, size) in enumerate(zip(latents, wanted, strict=True)):
            with _named("latents", number):
                clip, covered = self._checked(z, size)
            clips.append(clip)
            full.append(covered)
        decoded = self.decoder.packed(clips, full, self._plan_decode(clips, chunk))
        return [x.squeeze(2) if z.dim() == 4 else x for x, z in zip(decoded, latents, strict=True)]

    def decode_patches(self, latents: Tensor) -> Tensor:
        """Decode latents, as in `decode`, to patch rows for `vitok.ops.pixel_loss`: training needs no picture.

        Returns: [B, L, q * p * p * 3] in the model's dtype, elements in (frame, row, column, colour) order.
        """
        latents = (latents.unsqueeze(2) if latents.dim() == 4 else latents).to(self.device, self.dtype)
        return self.decoder.unembed.rows(self.decoder.tokens(latents))

    def forward(self, pixels: Tensor, *, seed: int | None = None, layout: str = "auto") -> tuple[Tensor, Posterior]:
        """Reconstruction (of a sample while training, of the mode otherwise) and posterior, for losses."""
        posterior = self.encode(pixels, layout=layout)
        latents = posterior.sample(seed) if self.training else posterior.mode()
        clip, _ = as_clip(pixels, layout)
        return self.decode(latents, size=tuple(clip.shape[1:4])), posterior

    def for_inference(self, dtype: torch.dtype | str = torch.bfloat16, *, graphs: bool | str = "auto") -> FastViTok:
        """A faster copy for encoding and decoding, made once; this model stays as it is.

        Args:
            dtype: torch.bfloat16, float32 or float16; "int8" (blocks multiply 8-bit integers, the rest is bfloat16) or
                "fp8" (GPUs of compute capability 9.0 and newer). What it costs in PSNR: docs/inference.md.
            graphs: CUDA graphs for batches of up to 8, one for each size met: True, False, or "auto": on CUDA.

        Returns: a `ViTok` with the same encode and decode, without gradients, that cannot be moved, cast or saved.
        Raises InputError for a dtype that the device cannot do, and for graphs=True on the CPU.
        """
        from vitok.inference import FastViTok

        return FastViTok(self, dtype, graphs)

    def save(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors; `vitok.load(directory)` gives the same model back, bit for bit."""
        from vitok.checkpoint import save

        save(self, directory)

    @staticmethod
    def from_pretrained(name: str | Path, **options: Any) -> ViTok:
        """The model of "owner/name" on the Hugging Face hub or of a directory; options are those of
        `vitok.integrations.hub.from_pretrained`: revision, map_location, dtype, token, cache_dir, local_files_only."""
        from vitok.integrations.hub import from_pretrained

        return from_pretrained(name, **options)

    def save_pretrained(self, directory: str | Path, **options: Any) -> str | None:
        """`save` with a model card; options are those of huggingface_hub's PyTorchModelHubMixin."""
        from vitok.integrations.hub import save_pretrained

        return save_pretrained(self, directory, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Put the model into the repository "owner/name"; options are those of PyTorchModelHubMixin. Returns the
        address of the commit."""
        from vitok.integrations.hub import push_to_hub

        return push_to_hub(self, repo_id, **options)


def _several(name: str, items: Sequence[Tensor]) -> Sequence[Tensor]:
    if isinstance(items, Tensor) or len(items) == 0:
        got = f"one tensor {list(items.shape)}" if isinstance(items, Tensor) else "none"
        raise InputError(f"{name} must be a list of at least one tensor, got {got}")
    return items


@contextmanager
def _named(name: str, number: int) -> Iterator[None]:
    """Puts before the sentence of an InputError which of several it is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name} {number}: {error}") from None


def as_clip(pixels: Tensor, layout: str = "auto") -> tuple[Tensor, bool]:
    """View pixels of any accepted layout as [B, T, H, W, 3]; the flag says that they were pictures."""
    if pixels.dim() not in (4, 5):
        raise InputError(f"pixels must have 4 dimensions (pictures) or 5 (clips), got shape {list(pixels.shape)}")
    first, last = pixels.shape[1] == 3, pixels.shape[-1] == 3
    if layout == "auto":
        if first and last:
            raise InputError(
                f"pixels of shape {list(pixels.shape)} may be channels-first or channels-last; say which with layout="
            )
        layout = "channels_last" if last else "channels_first"
    if layout not in ("channels_first", "channels_last"):
        raise InputError(f"layout must be 'auto', 'channels_first' or 'channels_last', got {layout!r}")
    if not (first if layout == "channels_first" else last):
        raise InputError(
            f"pixels must have 3 colour channels in dimension 1 or the last, got shape {list(pixels.shape)}"
        )
    if pixels.dtype != torch.uint8 and not pixels.is_floating_point():
        raise InputError(f"pixels must be uint8 or floating point, got {pixels.dtype}")
    if 0 in pixels.shape:
        raise InputError(f"pixels must not be empty, got shape {list(pixels.shape)}")
    channels_last = pixels if layout == "channels_last" else pixels.movedim(1, -1)
    return (channels_last.unsqueeze(1) if pixels.dim() == 4 else channels_last), pixels.dim() == 4


def check_range(pixels: Tensor) -> None:
    """Raise InputError for float pixels that cannot be meant for [-1, 1]; only on the CPU, where looking costs no wait.

    The limit is 2, so that a resampling filter may overshoot.
    """
    if not pixels.is_floating_point() or pixels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    low, high = (bound.item() for bound in pixels.detach().aminmax())
    if not (low >= -2.0 and high <= 2.0):
        raise InputError(
            f"float pixels must be finite and lie in [-1, 1], got values from {low:g} to {high:g}; pass 0..255 as uint8"
        )
