"""A model on disk: a directory with config.json and model.safetensors. Nothing in it is ever executed."""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vitok.config import COMMON_NAMES, ViTokConfig, listed, suggest
from vitok.errors import InputError
from vitok.io.files import atomic_path
from vitok.model import ViTok

CONFIG, WEIGHTS = "config.json", "model.safetensors"
HUB = "hf:"
"""How the name of a model on the Hugging Face hub begins: hf:owner/name, hf:owner/name@revision."""


def create_model(
    name: str,
    *,
    preset: str = "paper",
    channels: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> ViTok:
    """A model with random weights.

    Args:
        name: ``<encoder>-<decoder>/[<q>x]<p>``, such as "S-B/16" or "S-B/4x8" (`ViTokConfig.from_name`).
        preset: "paper", "author-v1" or "v2".
        channels: latent channels c, 16 unless the name says otherwise.
        overrides: any field of `ViTokConfig`.

    Raises InputError for an unknown name, preset or field, naming the nearest.
    """
    config = ViTokConfig.from_name(name, preset=preset, channels=channels, **overrides)
    with torch.device(device or "cpu"):
        model = ViTok(config)
    return model.to(dtype=dtype)


def load(model: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ViTok:
    """A model with its weights, in evaluation mode.

    Args:
        model: a bundled name ("demo"), a directory written by `ViTok.save`, or "hf:owner/name[@revision]" on the
            Hugging Face hub, which needs the package huggingface_hub.

    Raises InputError when there is no such model, or its files are damaged or do not fit each other.
    """
    directory = model_directory(model)
    config = read_config(directory / CONFIG)
    with torch.device("meta"):
        loaded = ViTok(config)
    state = _read_weights(directory / WEIGHTS, loaded)
    loaded.load_state_dict(state, assign=True)
    return loaded.to(device=device, dtype=dtype).eval()


def save(model: ViTok, directory: str | Path) -> None:
    """Write `model` to a directory, made if missing; each file appears whole or not at all."""
    directory = Path(directory)
    state = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the model directory {directory}: {error.strerror}") from error
    with atomic_path(directory / WEIGHTS) as path:
        try:
            save_file(state, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise InputError(f"cannot write {directory / WEIGHTS}: {error}") from error
    with atomic_path(directory / CONFIG) as path:
        path.write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")


def bundled() -> list[str]:
    """Names of the models whose weights are in the package."""
    folder = resources.files("vitok") / "weights"
    return sorted(entry.name for entry in folder.iterdir() if (entry / CONFIG).is_file()) if folder.is_dir() else []


def list_models() -> list[str]:
    """Names that `load` (bundled weights) and `create_model` (common architectures) take."""
    return [*bundled(), *COMMON_NAMES]


def weights_hash(model: ViTok) -> str:
    """16 hex digits that change with any weight; with the config's hash they say which model made some latents."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def model_directory(model: str | Path) -> Path:
    """Where the files of a model that `load` takes are, fetched if need be; InputError when there are none."""
    if str(model).startswith(HUB):
        from vitok.integrations.hub import model_folder

        return model_folder(str(model))
    if str(model) in bundled():
        return Path(str(resources.files("vitok") / "weights" / str(model)))
    directory = Path(model)
    if not directory.exists():
        names = ", ".join(bundled()) or "none"
        raise InputError(
            f"there are no weights {str(model)!r}: neither bundled (there are: {names}), nor a directory, nor a name "
            f"such as {HUB}owner/name{suggest(str(model), bundled())}"
        )
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            hint = f"; did you mean {directory / 'model'}?" if (directory / "model" / name).is_file() else ""
            raise InputError(f"{directory} is no model directory: it has no {name}{hint}")
    return directory


def read_config(path: Path) -> ViTokConfig:
    """The config.json of a model; InputError when it cannot be read or has missing or unknown fields."""
    try:
        return ViTokConfig.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def _read_weights(path: Path, model: ViTok) -> dict[str, torch.Tensor]:
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is no readable safetensors file: {error}") from error
    expected = model.state_dict()
    for problem, keys in (("lacks", expected.keys() - state.keys()), ("has unknown", state.keys() - expected.keys())):
        if keys:
            raise InputError(f"{path} {problem} weight(s) {listed(keys)}")
    for key, value in state.items():
        if value.shape != expected[key].shape or not value.is_floating_point():
            raise InputError(
                f"{path}: weight {key} must be floating point {list(expected[key].shape)}, "
                f"got {value.dtype} {list(value.shape)}"
            )
    if len(dtypes := {value.dtype for value in state.values()}) > 1:
        raise InputError(f"{path}: weights must be of one dtype, got {', '.join(sorted(map(str, dtypes)))}")
    return state
