"""What a training run is, as data: one YAML file, every field with its default and meaning here."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitok.config import ViTokConfig, suggest
from vitok.data.batches import DataSource
from vitok.errors import InputError

# The others have a field of their own here.
OVERRIDES = {field.name for field in dataclasses.fields(ViTokConfig)} - {"name", "preset", "channels"}
LIMITS: tuple[tuple[str, float, float], ...] = (
    ("steps", 0, 2**32 - 1), ("pca_bases", 1, 64), ("pca_neighbours", 0, 2**20),
    ("batch", 1, 2**31), ("crop", 1, 2**16), ("short_side", 1, 2**16),
    ("save_every", 1, 2**32), ("log_every", 1, 2**32), ("sample_every", 0, 2**32), ("seed", 0, 2**32 - 1),
    ("workers", 0, 1024), ("warmup", 0, 2**32), ("beta", 0, 1e9),
    ("learning_rate", 0, 1e3), ("weight_decay", 0, 1e3), ("grad_clip", 1e-12, 1e12), ("betas", 0, 1 - 1e-12),
    ("ema", 0, 1), ("stage", 1, 2), ("eta", 0, 1e9), ("adversarial_weight", 0, 1e9),
    ("discriminator_learning_rate", 0, 1e3), ("discriminator_warmup", 0, 2**32), ("discriminator_width", 4, 2**16),
    ("lecam_weight", 0, 1e9), ("accumulate", 1, 2**31), ("latent_noise", 0, 1e9),
    ("frames", 1, 2**16), ("crop_scale", 1e-6, 1),
)  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """A run of ViTok's recipe (arXiv:2501.09755, section 2.3).

    Stage 1: encoder and decoder, by pixel loss + beta KL + eta perceptual loss. Stage 2: the decoder alone, by the same
    losses + adversarial_weight times what a discriminator, which is trained beside it, has against its pictures.
    """

    data: str | tuple[DataSource, ...]
    """What to train on: a folder, searched recursively, of pictures, of videos, or of tar shards as webdataset writes
    them; one file; or a pattern such as shards/train-*.tar. Or a list of {path, weight, groups, camera}
    (`vitok.data.batches.DataSource`), drawn by weight."""
    out: str
    """Directory of the run: `model/` (the averaged weights), `state-<step>/` (to resume from), and to look at
    `log.csv`, `tensorboard/`, `reconstructions/` and `curves.png`."""
    stage: int = 1
    """1, or 2 to go on from the stage-1 model that `init` names with its encoder frozen."""
    model: str = "S-B/16"
    """Model name."""
    preset: str = "paper"
    """Model preset."""
    channels: int = 16
    """Latent channels."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Further fields of the model's config."""
    init: str = "random"
    """"random"; "pca": start as the best linear tokenizer (`vitok.train.init`); or a model directory to go on from."""
    pca_bases: int = 1
    """Of init "pca": how many linear tokenizers to start as, of which each tubelet takes the best
    (`vitok.train.local_pca`). More than one need `freeze_encoder`, as steps on the maps that choose would undo them."""
    pca_neighbours: int = 0
    """Of init "pca": on how many samples the decoder is then fitted to what its heads see of neighbours, by least
    squares (`vitok.train.neighbours`); 0 leaves its blocks as they are."""
    steps: int = 100_000
    """Optimizer steps; with 0 the model is what a run starts with."""
    batch: int = 32
    """Pictures, or clips, a step, over all ranks."""
    accumulate: int = 1
    """Parts of a batch that go through the model one after the other, which takes less memory."""
    frames: int = 16
    """Length of the clips drawn from videos; they never cross a cut."""
    crop: int = 128
    """Side of the square crops, pixels."""
    short_side: tuple[int, int] = (256, 512)
    """A picture's short side is scaled to between these before cropping, log-uniformly, pixels."""
    crop_scale: tuple[float, float] | None = None
    """In place of `short_side`: a crop covers a share of the picture between these, at a ratio of sides between 3/4 and
    4/3. [0.8, 1] is the paper's."""
    groups: str = ""
    """Regular expression on file names; samples with the same match form a group, and groups are drawn evenly. Of a
    list in `data`, for the entries that have none of their own."""
    freeze_encoder: bool = False
    """Train the decoder alone, as stage 2 does always: latents stay as they are."""
    latent_noise: float = 0.0
    """Latents are decoded with normal noise on them, its standard deviation for each sample the absolute value of a
    normal number times this (arXiv:2510.11690); the decoder learns to forgive a generator's errors."""
    pixel_loss: str = "l2"
    """"l2" (mean squared error), "l1", "charbonnier", or "log_l2" (the mean over pictures of log MSE: PSNR, up to a
    factor)."""
    beta: float = 1e-3
    """Weight of the KL divergence (mean over tokens and channels)."""
    perceptual: str = "none"
    """"none", "vgg_hed" (the VGG-HED distance), "lpips" (the package lpips, VGG), or one that an installed package
    provides as an entry point of the group `vitok.perceptual_losses` (`vitok.train.losses.perceptual_loss`)."""
    perceptual_weights: str = ""
    """File of weights for the perceptual loss; "vgg_hed" needs it, "lpips" unless torch hub's cache has its VGG16."""
    eta: float = 1.0
    """Weight of the perceptual loss, where one is named."""
    adversarial_weight: float = 0.05
    """Weight of the adversarial loss of stage 2; lambda in the paper, whose appendix finds 0.05 better than 1."""
    discriminator_width: int = 512
    """Channels of the discriminator up to 64 pixels a side; half as many with each doubling beyond."""
    discriminator_learning_rate: float = 2e-5
    """Peak rate of the discriminator; linear warm-up, then cosine to zero."""
    discriminator_warmup: int = 25_000
    """Steps of the discriminator's warm-up."""
    lecam_weight: float = 0.0
    """Weight of LeCam regularisation (arXiv:2104.03310) in the discriminator's loss."""
    learning_rate: float = 1e-4
    """Peak rate; linear warm-up, then cosine to zero."""
    warmup: int = 500
    """Steps of warm-up."""
    weight_decay: float = 1e-4
    """AdamW's, on matrices only, the discriminator's too."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's, the discriminator's too."""
    grad_clip: float = 1.0
    """Largest global gradient norm, of the model and of the discriminator, applied after backward."""
    ema: float = 0.999
    """Decay of the averaged weights, which are the ones exported."""
    precision: str = "auto"
    """"bf16" (autocast), "fp32", or "auto": bf16 where the hardware multiplies it natively. A run
    goes on in what it began with."""
    optimizer: str = "torch"
    """AdamW in one kernel: "torch", or "apex" where that package is installed."""
    compile: bool = False
    """Compile the transformer blocks with torch.compile."""
    checkpointing: bool = False
    """Keep only the inputs of blocks for backward and compute the rest again: less memory, a third more work."""
    parallel: str = "ddp"
    """How ranks share a run under torchrun: "ddp" (all of the model on each) or "fsdp" (FSDP2: weights, gradients and
    optimizer states shared out)."""
    seed: int = 0
    """Everything random follows from it and the step."""
    workers: int = 1
    """Processes that prepare batches."""
    save_every: int = 500
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between rows of the log; the last step has one too."""
    sample_every: int = 500
    """Steps between sheets of reconstructions by the averaged model, always of the same few samples; 0 for none."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("pixel_loss", ("l2", "l1", "charbonnier", "log_l2")), ("precision", ("auto", "bf16", "fp32")),
            ("optimizer", ("torch", "apex")), ("parallel", ("ddp", "fsdp")),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise InputError(
                    f"training field {name!r} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        for name, low, high in LIMITS:
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else () if value is None else (value,)
            if not all(low <= number <= high for number in numbers):
                raise InputError(f"training field {name!r} must lie between {low:g} and {high:g}, got {value}")
        for name in ("short_side", "crop_scale"):
            value = getattr(self, name)
            if value is not None and value[0] > value[1]:
                raise InputError(f"training field {name!r} must be (smallest, largest), got {value}")
        _check_groups("groups", self.groups)
        for name in self.overrides:
            if name not in OVERRIDES:
                raise InputError(
                    f"training field 'overrides' must hold fields of the model's config, got {name!r}"
                    f"{suggest(str(name), OVERRIDES)}"
                )
        if self.pca_bases > 1 and (self.init != "pca" or not self.freeze_encoder):
            raise InputError(
                f"training field 'pca_bases' above 1 needs init 'pca' and freeze_encoder true, got init {self.init!r} "
                f"and freeze_encoder {str(self.freeze_encoder).lower()}"
            )
        if self.stage == 2 and self.init in ("random", "pca"):
            raise InputError(
                "stage 2 trains the decoder of a stage-1 model: training field 'init' must be its directory, "
                f"got {self.init!r}"
            )

    @classmethod
    def load(cls, path: str | Path, assignments: tuple[str, ...] = ()) -> TrainConfig:
        """Read a YAML file, then apply ``key=value`` assignments; ``overrides.encoder_depth=4`` goes into a mapping."""
        try:
            import yaml
        except ImportError as error:
            raise InputError("training needs PyYAML; install it with: pip install 'vitok[train]'") from error
        try:
            values = yaml.safe_load(Path(path).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"cannot read training config {path}: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise InputError(f"training config {path} must be a mapping of field to value, got {type(values).__name__}")
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            if not equals:
                raise InputError(f"expected key=value, got {assignment!r}")
            *parents, last = key.split(".")
            target = values
            for parent in parents:
                target = target.setdefault(parent, {})
                if not isinstance(target, dict):
                    raise InputError(f"training field {parent!r} is no mapping, so {key!r} cannot be set")
            try:
                target[last] = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise InputError(f"cannot read the value of {assignment!r}: {' '.join(str(error).split())}") from error
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                raise InputError(f"unknown training field {name!r}{suggest(str(name), fields)}")
        if missing := {"data", "out"} - values.keys():
            raise InputError(f"the training config lacks {', '.join(sorted(missing))}")
        values = {**values, "data": _as_data(values["data"])}
        return cls(**{name: _as_type(name, str(fields[name].type), value) for name, value in values.items()})


def _check_groups(name: str, groups: str) -> None:
    try:
        re.compile(groups)
    except re.error as error:
        raise InputError(f"training field {name!r} must be a regular expression, got {groups!r}: {error}") from error


def _as_data(value: Any) -> str | tuple[DataSource, ...]:
    """The field `data`: a path, or a list of mappings with the fields of `DataSource`."""
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple)) or not value:
        raise InputError(
            f"training field 'data' must be a path or a list of {{path, weight, groups, camera}}, got {value!r}"
        )
    sources = []
    for i, entry in enumerate(value):
        where = f"data[{i}]"
        if not isinstance(entry, dict) or "path" not in entry:
            raise InputError(f"training field '{where}' must be a mapping with a path, got {entry!r}")
        fields = {f.name: str(f.type) for f in dataclasses.fields(DataSource)}
        if unknown := entry.keys() - fields.keys():
            raise InputError(
                f"training field '{where}' must hold {', '.join(fields)} alone, "
                f"got {', '.join(sorted(map(str, unknown)))}{suggest(str(min(unknown, key=str)), fields)}"
            )
        source = DataSource(**{key: _as_type(f"{where}.{key}", fields[key], item) for key, item in entry.items()})
        if not 0 < source.weight < math.inf:
            raise InputError(f"training field '{where}.weight' must be a positive number, got {source.weight}")
        if not 0 <= source.camera <= 1024:
            raise InputError(f"training field '{where}.camera' must lie between 0 and 1024, got {source.camera}")
        _check_groups(f"{where}.groups", source.groups)
        sources.append(source)
    return tuple(sources)


def _as_type(name: str, kind: str, value: Any) -> Any:
    """`value` as `kind`; YAML reads 1e-3 as text and sequences as lists."""
    if name == "data" or (value is None and kind.endswith("| None")):
        return value
    try:
        if kind == "float":
            return float(value)
        if kind.startswith("tuple"):
            if isinstance(value, (list, tuple)) and len(value) == 2:
                return tuple(_as_type(name, "float" if "float" in kind else "int", item) for item in value)
        elif isinstance(value, bool) == (kind == "bool") and isinstance(
            value, {"int": int, "str": str, "bool": bool}.get(kind, dict)
        ):
            return value
    except (TypeError, ValueError):
        pass
    raise InputError(f"training field {name!r} must be {kind}, got {value!r}")
