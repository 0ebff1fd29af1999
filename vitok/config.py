"""What a ViTok is, as data: sizes, switches, names such as ``S-B/4x8`` and the presets that fill them in."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from vitok.errors import InputError
from vitok.positions import axis_channels


@dataclass(frozen=True)
class StackConfig:
    """One transformer stack: `width` channels, `depth` blocks, `heads` heads, `hidden` gated feed-forward units."""

    width: int
    depth: int
    heads: int
    hidden: int

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


LABELS = ("name", "preset")
"""Fields that say how a config came about and change nothing of the model."""
CHOICES = {
    "norm": ("layer", "rms"),
    "block": ("serial", "parallel"),
    "gate": ("silu", "gelu"),
    "bottleneck": ("gaussian", "layernorm"),
    "rope": ("3d", "2d", "1d", "none"),
    "absolute": ("none", "sincos"),
    "pixel_bias": ("channel", "element"),
    "pad": ("edge", "zero"),
}


@dataclass(frozen=True)
class ViTokConfig:
    """Every size and switch of a model. Make one with `ViTokConfig.from_name`, not by hand.

    Sizes: a token covers `temporal_patch` (q) frames of `patch` x `patch` (p) pixels and becomes `channels` (c) floats.
    Switches (see docs/model.md): `norm`, `block`, `gate` and the biases shape a block; `bottleneck` is the latent
    distribution; `rope` and `absolute` are the positions; `pixel_bias` is one bias a colour or one an element of a
    tubelet; `pad` fills sizes that are no multiple of the tubelet; `layer_scale` is the initial gamma or None;
    `clip_frames` is how many frames the weights were trained on at once, and so the chunk in which clips are streamed;
    `window` lets a token attend only to those at most so many away in row-major order, None to all.
    """

    name: str
    preset: str
    patch: int
    temporal_patch: int
    channels: int
    encoder_width: int
    encoder_depth: int
    encoder_heads: int
    encoder_hidden: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    decoder_hidden: int
    norm: str
    norm_eps: float
    block: str
    gate: str
    qk_norm: bool
    qkv_bias: bool
    proj_bias: bool
    mlp_bias: bool
    layer_scale: float | None
    final_norm: bool
    bottleneck: str
    rope: str
    rope_theta: float
    absolute: str
    pixel_bias: str
    pad: str
    clip_frames: int
    window: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), str(field.type).removesuffix(" | None")
            if value is None and kind != field.type:
                continue
            wanted: tuple[type, ...] = {"int": (int,), "bool": (bool,), "str": (str,)}.get(kind, (int, float))
            of_kind = isinstance(value, wanted) and (kind == "bool" or not isinstance(value, bool))
            if not of_kind:
                raise InputError(f"config field {field.name!r} must be of type {field.type}, got {value!r}")
            if kind == "int" and value < (0 if field.name.endswith("depth") else 1):
                raise InputError(f"config field {field.name!r} must be positive, got {value}")
            if wanted == (int, float):
                if not math.isfinite(value) or (value <= 0 and field.name != "layer_scale"):
                    raise InputError(f"config field {field.name!r} must be positive and finite, got {value}")
                object.__setattr__(self, field.name, float(value))  # 1 and 1.0 are one config, with one hash
            if field.name in CHOICES and value not in CHOICES[field.name]:
                raise InputError(
                    f"config field {field.name!r} must be one of {', '.join(CHOICES[field.name])}, got {value!r}"
                )
        for side in ("encoder", "decoder"):
            stack: StackConfig = getattr(self, side)
            if stack.width % stack.heads or stack.head_dim % 8:
                raise InputError(
                    f"{side}_width / {side}_heads must be a multiple of 8 (the size of a head), "
                    f"got {stack.width} / {stack.heads}"
                )
            if self.rope in ("2d", "3d"):
                axis_channels(self.rope, stack.head_dim)
        if self.clip_frames % self.temporal_patch:
            raise InputError(
                f"config field 'clip_frames' must be a multiple of temporal_patch {self.temporal_patch}, "
                f"got {self.clip_frames}"
            )

    @property
    def encoder(self) -> StackConfig:
        return StackConfig(self.encoder_width, self.encoder_depth, self.encoder_heads, self.encoder_hidden)

    @property
    def decoder(self) -> StackConfig:
        return StackConfig(self.decoder_width, self.decoder_depth, self.decoder_heads, self.decoder_hidden)

    @property
    def tubelet(self) -> tuple[int, int]:
        """(q, p): frames and pixels a side that one token covers."""
        return self.temporal_patch, self.patch

    @property
    def tubelet_elements(self) -> int:
        """q * p * p * 3, the numbers in one tubelet, ordered (frame, row, column, colour)."""
        return self.temporal_patch * self.patch**2 * 3

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Tokens along (t, y, x) for a clip of `frames` x `height` x `width` pixels; partial tubelets count whole."""
        return math.ceil(frames / self.temporal_patch), math.ceil(height / self.patch), math.ceil(width / self.patch)

    def replace(self, **changes: Any) -> ViTokConfig:
        """A copy with some fields changed; InputError for a field that does not exist."""
        known = [field.name for field in dataclasses.fields(self)]
        for field in changes:
            if field not in known:
                raise InputError(f"unknown config field {field!r}{suggest(field, known)}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> ViTokConfig:
        """The inverse of `to_dict`; InputError names fields that are unknown, or missing and without a default."""
        if not isinstance(values, dict):
            raise InputError(f"a model config must be a JSON object, got {type(values).__name__}")
        every = dataclasses.fields(cls)
        known = {field.name for field in every}
        needed = {field.name for field in every if field.default is dataclasses.MISSING}
        for problem, fields in (("lacks", needed - values.keys()), ("has unknown", values.keys() - known)):
            if fields:
                raise InputError(f"the model config {problem} field(s) {listed(fields)}")
        return cls(**values)

    def hash(self) -> str:
        """16 hex digits that change with any field but the name and preset, which are only labels.

        No window is left out: files made before there were windows stay those of the same model.
        """
        fields = {k: v for k, v in self.to_dict().items() if k not in LABELS and (k, v) != ("window", None)}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]

    def differences(self, other: ViTokConfig) -> str:
        """The first few fields that differ, labels apart, such as "channels 16 (here 8)"; "" for the same model."""
        ours = other.to_dict()
        return listed(
            f"{k} {v} (here {ours[k]})" for k, v in self.to_dict().items() if k not in LABELS and v != ours[k]
        )

    @classmethod
    def from_name(
        cls, name: str, *, preset: str = "paper", channels: int | None = None, **overrides: Any
    ) -> ViTokConfig:
        """The config of `<encoder>-<decoder>/[<q>x]<p>[x<c>]` under a preset.

        A stack is a size letter of the preset with optional overrides w<width> d<depth> h<heads> m<hidden factor>, as
        in ``Ld4-Ld24/1x16x64``, or no letter and all of w, d and h, as in ``w512_d4_h8-B/16``. Two numbers after the
        slash are q x p, so a channel count needs all three (or `channels=`, 16 if neither is given). `overrides` are
        fields of this class. InputError for anything that does not parse.
        """
        if preset not in PRESETS:
            raise InputError(f"unknown preset {preset!r}; there are {', '.join(PRESETS)}")
        chosen = PRESETS[preset]
        match = re.fullmatch(r"([^-/]+)-([^-/]+)/(?:(\d{1,4})x)?(\d{1,4})(?:x(\d{1,5}))?", name)
        if not match or (match[5] and not match[3]):
            raise InputError(
                f"unknown model {name!r}: a name is <encoder>-<decoder>/[<frames>x]<patch>, such as S-B/16"
                f"{suggest(name, COMMON_NAMES)}"
            )
        encoder, decoder = (_parse_stack(text, name, chosen) for text in match.group(1, 2))
        temporal_patch = int(match[3] or 1)
        if match[5] and channels not in (None, int(match[5])):
            raise InputError(f"channels={channels} contradicts the model name {name!r}")
        fields = {
            "name": name,
            "preset": preset,
            "patch": int(match[4]),
            "temporal_patch": temporal_patch,
            "channels": channels if channels is not None else int(match[5] or 16),
            **{f"encoder_{k}": v for k, v in dataclasses.asdict(encoder).items()},
            **{f"decoder_{k}": v for k, v in dataclasses.asdict(decoder).items()},
            **chosen.switches,
            "clip_frames": temporal_patch * max(1, 16 // temporal_patch) if temporal_patch > 1 else 1,
        }
        if chosen.absolute_in_time and temporal_patch > 1:
            fields["absolute"] = "sincos"
        for side in ("encoder", "decoder"):
            width = overrides.get(f"{side}_width")
            if isinstance(width, int) and f"{side}_hidden" not in overrides:
                overrides[f"{side}_hidden"] = chosen.hidden(width, chosen.factor)
        return cls(**fields).replace(**overrides)


@dataclass(frozen=True)
class Preset:
    """A family of models: what its size letters mean, how wide its feed-forward is, and its switches."""

    sizes: dict[str, tuple[int, int, int]]
    hidden: Callable[[int, float], int]
    factor: float
    switches: dict[str, Any]
    absolute_in_time: bool = False


_PAPER_SIZES = {"Ti": (384, 6, 6), "S": (768, 6, 12), "B": (768, 12, 12), "L": (1152, 24, 16)}

PRESETS = {
    "paper": Preset(
        sizes=_PAPER_SIZES,
        hidden=lambda width, factor: 64 * math.ceil(width * factor / 64),
        factor=8 / 3,
        switches={
            "norm": "layer", "norm_eps": 1e-5, "block": "serial", "gate": "silu", "qk_norm": False,
            "qkv_bias": False, "proj_bias": False, "mlp_bias": False, "layer_scale": None, "final_norm": True,
            "bottleneck": "gaussian", "rope": "3d", "rope_theta": 10000.0, "absolute": "none",
            "pixel_bias": "channel", "pad": "edge",
        },
    ),
    "author-v1": Preset(
        sizes=_PAPER_SIZES,
        hidden=lambda width, factor: int(width * factor),
        factor=2.67,
        switches={
            "norm": "layer", "norm_eps": 1e-5, "block": "serial", "gate": "gelu", "qk_norm": False,
            "qkv_bias": False, "proj_bias": True, "mlp_bias": True, "layer_scale": None, "final_norm": True,
            "bottleneck": "gaussian", "rope": "1d", "rope_theta": 10000.0, "absolute": "none",
            "pixel_bias": "channel", "pad": "edge",
        },
        absolute_in_time=True,
    ),
    "v2": Preset(
        sizes={"B": (768, 12, 12), "L": (1024, 24, 16), "G": (1728, 32, 24), "T": (3072, 40, 24), "E": (4096, 48, 32)},
        hidden=lambda width, factor: 16 * round(int(width * factor) / 16),
        factor=2.67,
        switches={
            "norm": "rms", "norm_eps": 1e-6, "block": "parallel", "gate": "silu", "qk_norm": True,
            "qkv_bias": False, "proj_bias": False, "mlp_bias": False, "layer_scale": 1.0, "final_norm": False,
            "bottleneck": "layernorm", "rope": "2d", "rope_theta": 10000.0, "absolute": "none",
            "pixel_bias": "element", "pad": "zero",
        },
    ),
}  # fmt: skip

COMMON_NAMES = (
    "Ti-Ti/16", "S-S/16", "S-B/8", "S-B/16", "S-B/32", "S-L/16", "B-B/16", "L-L/16", "S-B/4x8", "S-B/8x8", "S-B/4x16",
)  # fmt: skip


def _parse_stack(text: str, name: str, preset: Preset) -> StackConfig:
    match = re.fullmatch(r"([A-Z][a-z]?)?((?:_?(?:[wdh]\d{1,6}|m\d{1,3}(?:\.\d+)?))*)", text)
    values = {key: float(number) for key, number in re.findall(r"([wdhm])([\d.]+)", match[2])} if match else {}
    base = preset.sizes.get(match[1] or "") if match else None
    if base is None and not (match and match[1] is None and {"w", "d", "h"} <= values.keys()):
        raise InputError(f"unknown size {text!r} in model name {name!r}; this preset has {', '.join(preset.sizes)}")
    width, depth, heads = (int(values.get(key, size)) for key, size in zip("wdh", base or (0, 0, 0), strict=True))
    return StackConfig(width, depth, heads, preset.hidden(width, values.get("m", preset.factor)))


def listed(names: Iterable[str]) -> str:
    """The first few names, sorted, and how many more there are."""
    ordered = sorted(names)
    first, rest = ordered[:4], ordered[4:]
    return ", ".join(first) + (f" and {len(rest)} more" if rest else "")


def suggest(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""
