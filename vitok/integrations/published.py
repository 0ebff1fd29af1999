"""ViTok weights in the layouts of their authors, read into our model: the same function, on our kernels.

ViTok-v2 (arXiv:2605.05331) publishes an encoder and a decoder file; of the first paper's code people have one file.
Both rotate neighbouring channels where we rotate channels half a head apart, order a patch by colour first where ours
comes last, and name things otherwise. Nothing is multiplied or rounded on the way.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vitok.config import StackConfig, ViTokConfig, listed, suggest
from vitok.errors import InputError
from vitok.integrations.hub import download
from vitok.model import ViTok

Source = str | Path | Mapping[str, Tensor]
"""A safetensors file, an index of sharded ones (`*.safetensors.index.json`), or a state dict."""
PUBLISHED = {
    **{f"350M-f16x{c}": f"Ld4-Ld24/1x16x{c}" for c in (16, 32, 64)},
    **{f"5B-f16x{c}": f"Td4-T/1x16x{c}" for c in (16, 32, 64)},
    **{f"5B-f32x{c}": f"Td4-T/1x32x{c}" for c in (64, 128, 256)},
}
"""Names of ViTok-v2 models on the Hugging Face hub, and their variants."""
REPOSITORY = "philippehansen/ViTok-v2-{}"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
PARTS = ("encoder", "decoder")
Converted = Iterator[tuple[str, Tensor]]


def load_vitok_v2(
    encoder: Source | None = None,
    decoder: Source | None = None,
    *,
    variant: str = "",
    only: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
) -> ViTok:
    """A model from the files of ViTok-v2, in evaluation mode.

    Args:
        encoder, decoder: its two parts. With one alone the model does that half, and says so when asked for the other.
        variant: such as "Ld4-Ld24/1x16x64"; without it sizes are read off the weights. Without any file the name of a
            published model, such as "350M-f16x64", which huggingface_hub fetches.
        only: "encoder" or "decoder", to fetch that half of a published model alone.
        allow_pickle: also take files that are pickles; torch's loader then admits nothing but tensors.

    Raises InputError for keys that lack or are unknown, shapes that do not fit, and what cannot be read or fetched.
    """
    if only is not None and (only not in PARTS or encoder is not None or decoder is not None):
        raise InputError(f"only must be 'encoder' or 'decoder', of a published model and no files, got {only!r}")
    if encoder is None and decoder is None:
        encoder, decoder = (_fetch(variant, part) if only in (None, part) else None for part in PARTS)
    variant = PUBLISHED.get(variant, variant)
    with ExitStack() as files:
        parts = {
            name: _Weights(source, name, files, allow_pickle, device, dtype)
            for name, source in (("encoder", encoder), ("decoder", decoder))
            if source is not None
        }
        config = ViTokConfig.from_name(variant, preset="v2") if variant else _v2_config(parts)
        shapes = v2_shapes(config)
        for name, weights in parts.items():
            weights.check(shapes[name])
        readers = {"encoder": _v2_encoder, "decoder": _v2_decoder}
        state = {
            f"{name}.{key}": tensor for name, weights in parts.items() for key, tensor in readers[name](weights, config)
        }
    return _filled(config, state, tuple(parts))


def load_vitok_v1(
    source: Source,
    *,
    heads: int | tuple[int, int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
) -> ViTok:
    """A model from one state dict of the first paper's code, in evaluation mode.

    Args:
        source: encoder and decoder, or the keys of one of them.
        heads: of both stacks, or (encoder's, decoder's); they are not in the file. By default width / 64.
        allow_pickle: as in `load_vitok_v2`.

    Raises InputError as `load_vitok_v2` does, and for learned positions or tokens, which our model has no place for.
    """
    with ExitStack() as files:
        weights = _Weights(source, "weights", files, allow_pickle, device, dtype)
        for key, what in (
            ("posemb", "learned positions"), ("dec_posemb", "learned positions"), ("code", "1D latent tokens"),
            ("mask_token", "a mask token"),
        ):  # fmt: skip
            if key in weights.shapes:
                raise InputError(f"{weights.origin} holds {key!r}, {what}, which this model has no place for")
        config, parts = _v1_config(weights, heads)
        readers = {"encoder": (_v1_encoder_shapes, _v1_encoder), "decoder": (_v1_decoder_shapes, _v1_decoder)}
        weights.check({key: shape for part in parts for key, shape in readers[part][0](config).items()})
        state = {f"{part}.{key}": tensor for part in parts for key, tensor in readers[part][1](weights, config)}
    return _filled(config, state, parts)


class Missing(nn.Module):
    """In the place of an encoder or a decoder that was not loaded."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise InputError(f"this model was loaded without its {self.part}")


def _filled(config: ViTokConfig, state: dict[str, Tensor], parts: tuple[str, ...]) -> ViTok:
    with torch.device("meta"):
        model = ViTok(config)
    for part in ("encoder", "decoder"):
        if part not in parts:
            setattr(model, part, Missing(part))
    model.load_state_dict(state, assign=True)
    return model.eval()


# --- reading


class _Weights:
    """Tensors by name, each read and cast when it is asked for, so that a model is never in memory twice."""

    def __init__(
        self,
        source: Source,
        part: str,
        files: ExitStack,
        allow_pickle: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.device, self.dtype = device, dtype
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._read: dict[str, Callable[[str], Tensor]] = {}
        if isinstance(source, Mapping):
            self.origin = f"the {part}"
            self._add({key: tuple(x.shape) for key, x in source.items()}, source.__getitem__)
            return
        path = Path(source)
        self.origin = str(path)
        if path.suffix in PICKLES:
            loaded = _unpickled(path, allow_pickle)
            self._add({key: tuple(x.shape) for key, x in loaded.items()}, loaded.__getitem__)
            return
        for file in _shards(path):
            try:
                handle = files.enter_context(safe_open(file, "pt"))
                keys = list(handle.keys())
                self._add({key: tuple(handle.get_slice(key).get_shape()) for key in keys}, handle.get_tensor)
            except (OSError, SafetensorError) as error:
                raise InputError(f"{file} is no readable safetensors file: {error}") from error

    def _add(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> None:
        self.shapes |= shapes
        self._read |= dict.fromkeys(shapes, read)

    def __getitem__(self, key: str) -> Tensor:
        found = self._read[key](key)
        if not found.is_floating_point():
            kind = str(found.dtype).removeprefix("torch.")
            raise InputError(f"{self.origin}: weight {key} must be of a floating-point dtype, got {kind}")
        return found.to(device=self.device, dtype=self.dtype)

    def shape(self, key: str, wanted: str) -> tuple[int, ...]:
        """Of a weight that must have as many dimensions as the comma-separated names of `wanted`, all at least 1."""
        if key not in self.shapes:
            raise InputError(f"{self.origin} lacks weight(s) {key}: these are no such ViTok weights")
        shape = self.shapes[key]
        if len(shape) != len(wanted.split(",")) or 0 in shape:
            raise InputError(f"{self.origin}: weight {key} must be [{wanted}], got {list(shape)}")
        return shape

    def depth(self, prefix: str) -> int:
        """How many blocks there are whose keys begin so."""
        numbers = (key.removeprefix(prefix).split(".")[0] for key in self.shapes if key.startswith(prefix))
        return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)

    def check(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        there = self.shapes.keys()
        for problem, keys in (("lacks", wanted.keys() - there), ("has unknown", there - wanted.keys())):
            if keys:
                raise InputError(f"{self.origin} {problem} weight(s) {listed(keys)}")
        for key, shape in wanted.items():
            if self.shapes[key] != shape:
                raise InputError(f"{self.origin}: weight {key} must be {list(shape)}, got {list(self.shapes[key])}")


def _shards(path: Path) -> list[Path]:
    if path.name.endswith(".index.json"):
        try:
            names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is no index of sharded weights: {error}") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise InputError(f"{path} names a file outside its folder: {name!r}")
        return [path.with_name(name) for name in names]
    if not path.exists():
        raise InputError(f"{path} does not exist")
    return [path]


def _unpickled(path: Path, allowed: bool) -> dict[str, Tensor]:
    if not allowed:
        raise InputError(
            f"{path} is a pickle, which can hold programs; convert it to safetensors, or allow it by allow_pickle=True"
        )
    warnings.warn(f"reading the pickle {path}; only tensors are admitted", stacklevel=4)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise InputError(f"{path} must hold a state dict: names and tensors, and nothing else")
    return loaded


def _fetch(name: str, part: str) -> Path:
    if name not in PUBLISHED:
        raise InputError(
            f"name the files by encoder= and decoder=, or a published model by variant= ({', '.join(PUBLISHED)}), "
            f"got {name!r}{suggest(name, PUBLISHED)}"
        )
    repository = REPOSITORY.format(name)
    instead = f"put the file from https://huggingface.co/{repository} anywhere and name it by {part}="
    return download(repository, f"{part}.safetensors", instead)


# --- from their layout to ours


def _halves_apart(rows: Tensor, heads: int) -> Tensor:
    """Rows of `heads` heads as [heads, 2, half, ...]: pairs of neighbours become pairs half a head apart."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2)


def _qkv(weight: Tensor, heads: int) -> Tensor:
    out, rotated = torch.empty_like(weight), 2 * len(weight) // 3
    out[:rotated].unflatten(0, (2 * heads, 2, -1)).copy_(_halves_apart(weight[:rotated], 2 * heads))
    out[rotated:] = weight[rotated:]
    return out


def _linear(weights: _Weights, ours: str, theirs: str) -> Converted:
    """A layer that stays as it is."""
    for name in ("weight", "bias"):
        yield f"{ours}.{name}", weights[f"{theirs}.{name}"]


# --- ViTok-v2


def _v2_config(parts: Mapping[str, _Weights]) -> ViTokConfig:
    """From the shapes; the half that is not there gets no blocks."""
    stacks, hidden, patch, channels = {}, {}, 0, 0
    for part, weights in parts.items():
        if part == "encoder":
            width, elements = weights.shape("patch_embed.weight", "width, elements of a patch")
            channels, _ = weights.shape("to_code.weight", "channels, width")
        else:
            elements, width = weights.shape("to_pixels.weight", "elements of a patch, width")
            _, channels = weights.shape("decoder_embed.weight", "width, channels")
        (head_dim,) = weights.shape(f"{part}_blocks.0.attn.norm_q.weight", "width of a head")
        stacks[part] = f"w{width}_d{weights.depth(f'{part}_blocks.')}_h{width // head_dim}"
        hidden[f"{part}_hidden"] = weights.shape(f"{part}_blocks.0.ffn.fc2.weight", "width, hidden")[1]
        patch = math.isqrt(elements // 3)
    for part in ("encoder", "decoder"):
        stacks.setdefault(part, "w64_d0_h1")
    name = f"{stacks['encoder']}-{stacks['decoder']}/1x{patch}x{channels}"
    return ViTokConfig.from_name(name, preset="v2", **hidden)


def v2_shapes(config: ViTokConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes of the weights in the two files of a model."""
    return {"encoder": _v2_encoder_shapes(config), "decoder": _v2_decoder_shapes(config)}


def _v2_block_shapes(prefix: str, stack: StackConfig) -> dict[str, tuple[int, ...]]:
    width = stack.width
    shapes = {
        "norm1.weight": (width,), "attn.norm_q.weight": (stack.head_dim,), "attn.norm_k.weight": (stack.head_dim,),
        "attn.qkv_proj.weight": (3 * width, width), "attn.out_proj.weight": (width, width),
        "ffn.fc1.weight": (2 * stack.hidden, width), "ffn.fc2.weight": (width, stack.hidden),
        "layer_scale.gamma": (width,),
    }  # fmt: skip
    return {f"{prefix}.{i}.{key}": shape for i in range(stack.depth) for key, shape in shapes.items()}


def _v2_encoder_shapes(config: ViTokConfig) -> dict[str, tuple[int, ...]]:
    width, channels = config.encoder_width, config.channels
    return {
        "patch_embed.weight": (width, config.tubelet_elements), "patch_embed.bias": (width,),
        "to_code.weight": (channels, width), "to_code.bias": (channels,),
        **_v2_block_shapes("encoder_blocks", config.encoder),
    }  # fmt: skip


def _v2_decoder_shapes(config: ViTokConfig) -> dict[str, tuple[int, ...]]:
    width, channels = config.decoder_width, config.channels
    return {
        "decoder_embed.weight": (width, channels), "decoder_embed.bias": (width,),
        "to_pixels.weight": (config.tubelet_elements, width), "to_pixels.bias": (config.tubelet_elements,),
        **_v2_block_shapes("decoder_blocks", config.decoder),
    }  # fmt: skip


def _v2_blocks(weights: _Weights, prefix: str, stack: StackConfig) -> Converted:
    for i in range(stack.depth):
        ours, theirs = f"stack.blocks.{i}", f"{prefix}.{i}"
        yield f"{ours}.norm.weight", weights[f"{theirs}.norm1.weight"]
        yield f"{ours}.attention.qkv.weight", _qkv(weights[f"{theirs}.attn.qkv_proj.weight"], stack.heads)
        yield f"{ours}.attention.q_norm", _halves_apart(weights[f"{theirs}.attn.norm_q.weight"], 1).flatten()
        yield f"{ours}.attention.k_norm", _halves_apart(weights[f"{theirs}.attn.norm_k.weight"], 1).flatten()
        yield f"{ours}.attention.proj.weight", weights[f"{theirs}.attn.out_proj.weight"]
        value, gate = weights[f"{theirs}.ffn.fc1.weight"].chunk(2)
        yield f"{ours}.feed_forward.gate_up.weight", torch.cat((gate, value))
        yield f"{ours}.feed_forward.down.weight", weights[f"{theirs}.ffn.fc2.weight"]
        yield f"{ours}.scale", weights[f"{theirs}.layer_scale.gamma"]


def _v2_encoder(weights: _Weights, config: ViTokConfig) -> Converted:
    patch = weights["patch_embed.weight"].unflatten(1, (3, config.patch, config.patch))
    yield "embed.weight", patch.permute(0, 2, 3, 1).flatten(1)
    yield "embed.bias", weights["patch_embed.bias"]
    yield from _v2_blocks(weights, "encoder_blocks", config.encoder)
    yield from _linear(weights, "bottleneck.to_code", "to_code")


def _v2_decoder(weights: _Weights, config: ViTokConfig) -> Converted:
    yield from _linear(weights, "from_latents", "decoder_embed")
    yield from _v2_blocks(weights, "decoder_blocks", config.decoder)
    for name in ("weight", "bias"):
        pixels = weights[f"to_pixels.{name}"].unflatten(0, (3, config.patch, config.patch))
        yield f"unembed.{name}", pixels.movedim(0, 2).flatten(0, 2)


# --- ViTok, the first paper's code


def _v1_config(weights: _Weights, heads: int | tuple[int, int] | None) -> tuple[ViTokConfig, tuple[str, ...]]:
    """From the shapes; the half that is not there gets no blocks."""
    stacks, sizes, parts = {}, {}, []
    embed, code = {"encoder": "tubelet_embed.proj.weight", "decoder": "tubelet_decode.proj.weight"}, {}
    for number, part in enumerate(("encoder", "decoder")):
        if embed[part] not in weights.shapes:
            continue
        width, _, q, p, _ = weights.shape(embed[part], "width, 3, q, p, p")
        own = heads[number] if isinstance(heads, tuple) else heads or width // 64
        stacks[part] = f"w{width}_d{weights.depth(f'{part}.blocks.')}_h{own}"
        sizes[f"{part}_hidden"] = weights.shape(f"{part}.blocks.0.mlp.fc1.weight", "hidden, width")[0]
        code[part] = (q, p)
        parts.append(part)
    if not parts:
        raise InputError(
            f"{weights.origin} lacks weight(s) {', '.join(embed.values())}: these are no such ViTok weights"
        )
    channels = (
        weights.shape("encoder_to_code.weight", "2 channels, width")[0] // 2
        if "encoder" in parts
        else weights.shape("code_to_decoder.weight", "width, channels")[1]
    )
    for part in ("encoder", "decoder"):
        stacks.setdefault(part, "w64_d0_h1")
    q, p = code[parts[0]]
    name = f"{stacks['encoder']}-{stacks['decoder']}/{q}x{p}x{channels}"
    return ViTokConfig.from_name(name, preset="author-v1", absolute="none", **sizes), tuple(parts)


def _v1_block_shapes(prefix: str, stack: StackConfig) -> dict[str, tuple[int, ...]]:
    width, hidden = stack.width, stack.hidden
    vectors = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.proj.bias", "mlp.fc3.bias")
    shapes: dict[str, tuple[int, ...]] = {
        **{key: (width,) for key in vectors}, "mlp.fc1.bias": (hidden,), "mlp.fc2.bias": (hidden,),
        "attn.qkv.weight": (3 * width, width), "attn.proj.weight": (width, width), "mlp.fc1.weight": (hidden, width),
        "mlp.fc2.weight": (hidden, width), "mlp.fc3.weight": (width, hidden),
    }  # fmt: skip
    blocks = {f"{prefix}.blocks.{i}.{key}": shape for i in range(stack.depth) for key, shape in shapes.items()}
    return blocks | {f"{prefix}.norm.weight": (width,), f"{prefix}.norm.bias": (width,)}


def _v1_encoder_shapes(config: ViTokConfig) -> dict[str, tuple[int, ...]]:
    (q, p), width, channels = config.tubelet, config.encoder_width, config.channels
    return {
        "tubelet_embed.proj.weight": (width, 3, q, p, p), "tubelet_embed.proj.bias": (width,),
        "encoder_to_code.weight": (2 * channels, width), "encoder_to_code.bias": (2 * channels,),
        **_v1_block_shapes("encoder", config.encoder),
    }  # fmt: skip


def _v1_decoder_shapes(config: ViTokConfig) -> dict[str, tuple[int, ...]]:
    (q, p), width, channels = config.tubelet, config.decoder_width, config.channels
    return {
        "code_to_decoder.weight": (width, channels), "code_to_decoder.bias": (width,),
        "tubelet_decode.proj.weight": (width, 3, q, p, p), "tubelet_decode.proj.bias": (3,),
        **_v1_block_shapes("decoder", config.decoder),
    }  # fmt: skip


def _v1_blocks(weights: _Weights, prefix: str, stack: StackConfig) -> Converted:
    for i in range(stack.depth):
        ours, theirs = f"stack.blocks.{i}", f"{prefix}.blocks.{i}"
        yield f"{ours}.attention.qkv.weight", _qkv(weights[f"{theirs}.attn.qkv.weight"], stack.heads)
        yield from _linear(weights, f"{ours}.attention_norm", f"{theirs}.norm1")
        yield from _linear(weights, f"{ours}.attention.proj", f"{theirs}.attn.proj")
        yield from _linear(weights, f"{ours}.feed_forward_norm", f"{theirs}.norm2")
        yield from _linear(weights, f"{ours}.feed_forward.down", f"{theirs}.mlp.fc3")
        for name in ("weight", "bias"):
            gate, up = (weights[f"{theirs}.mlp.{layer}.{name}"] for layer in ("fc1", "fc2"))
            yield f"{ours}.feed_forward.gate_up.{name}", torch.cat((gate, up))
    yield from _linear(weights, "stack.norm", f"{prefix}.norm")


def _v1_encoder(weights: _Weights, config: ViTokConfig) -> Converted:
    yield "embed.weight", weights["tubelet_embed.proj.weight"].movedim(1, -1).flatten(1)
    yield "embed.bias", weights["tubelet_embed.proj.bias"]
    yield from _v1_blocks(weights, "encoder", config.encoder)
    yield from _linear(weights, "bottleneck.to_moments", "encoder_to_code")


def _v1_decoder(weights: _Weights, config: ViTokConfig) -> Converted:
    yield from _linear(weights, "from_latents", "code_to_decoder")
    yield from _v1_blocks(weights, "decoder", config.decoder)
    yield "unembed.weight", weights["tubelet_decode.proj.weight"].permute(2, 3, 4, 1, 0).flatten(0, 3)
    yield "unembed.bias", weights["tubelet_decode.proj.bias"]
