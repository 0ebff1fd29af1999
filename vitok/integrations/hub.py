"""Models on the Hugging Face hub: what `ViTok.from_pretrained`, `save_pretrained` and `push_to_hub` do.

huggingface_hub is imported when it is first needed (`pip install "vitok[hub]"`). Saving and pushing are those of its
PyTorchModelHubMixin; loading reads config.json and model.safetensors and nothing else of a repository.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from vitok.checkpoint import CONFIG, HUB, WEIGHTS, load
from vitok.errors import InputError
from vitok.model import ViTok

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]|\.(?!\.))*"
_NAME = re.compile(rf"({_PART}/{_PART})(?:@({_PART}(?:/{_PART})*))?")
CARD = """---
{{ card_data }}
---

A visual tokenizer (ViTok, arXiv:2501.09755). After `pip install "vitok[hub]"`:

    import vitok
    model = vitok.load("hf:OWNER/NAME")      # the name of this repository
    latents = model.encode(pixels).mode()
"""


def from_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    map_location: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> ViTok:
    """The model of a directory, or of "owner/name" on the hub, in evaluation mode.

    Args:
        revision: a branch, tag or commit; "owner/name@revision" says the same.
        map_location: the device, in the mixin's words.
        token, cache_dir, force_download, local_files_only: as everywhere in huggingface_hub.

    Raises InputError for a name that is none, and for what cannot be fetched, read or used.
    """
    if not Path(name).is_dir():
        options = {"cache_dir": cache_dir, "force_download": force_download, "local_files_only": local_files_only}
        name = model_folder(f"{name}@{revision}" if revision else str(name), token=token, **options)
    return load(name, device=map_location, dtype=dtype)


def save_pretrained(model: ViTok, directory: str | Path, **options: Any) -> str | None:
    """What the mixin's method does: the files of `ViTok.save` and a model card; pushes them with push_to_hub=True."""
    saved: str | None = _on_hub(model).save_pretrained(directory, **options)
    return saved


def push_to_hub(model: ViTok, repo_id: str, **options: Any) -> str:
    """The mixin's method: makes the repository where there is none, and returns the address of the commit."""
    name, revision = _parsed(repo_id)
    if revision:
        raise InputError(f"repo_id must be owner/name, got {repo_id!r}; name a branch by branch=")
    pushed: str = _on_hub(model).push_to_hub(name, **options)
    return pushed


def _on_hub(model: ViTok) -> Any:
    try:
        from huggingface_hub import PyTorchModelHubMixin
    except ImportError as error:
        raise InputError('the hub needs the package huggingface_hub: pip install "vitok[hub]"') from error

    class OnHub(PyTorchModelHubMixin, library_name="vitok", tags=["visual-tokenizer"], model_card_template=CARD):
        def _save_pretrained(self, save_directory: Path) -> None:
            model.save(save_directory)

    return OnHub()


def model_folder(name: str, **options: Any) -> Path:
    """The local folder with the two files of "owner/name" or "owner/name@revision", both of one commit."""
    repository, revision = _parsed(name.removeprefix(HUB))
    instead = _of_its_authors(repository) or (
        f"put {CONFIG} and {WEIGHTS} from https://huggingface.co/{repository} in a folder and name the folder"
    )
    folder = download(repository, CONFIG, instead, revision=revision, **options).parent
    download(repository, WEIGHTS, instead, revision=folder.name, **options)
    return folder


def _of_its_authors(repository: str) -> str:
    """How ViTok-v2 as it is published is loaded, whose repositories hold other files; "" of any other repository."""
    from vitok.integrations.published import PUBLISHED, REPOSITORY

    variant = next((name for name in PUBLISHED if REPOSITORY.format(name) == repository), "")
    return variant and (
        f"load it by vitok.integrations.load_vitok_v2(variant={variant!r}), or make a model directory of it by "
        f"vitok convert v2 --variant {variant} --out FOLDER"
    )


def download(repository: str, file: str, instead: str, **options: Any) -> Path:
    """A file of a repository, from the hub or huggingface_hub's cache.

    Args:
        instead: what to do without the hub, the end of the InputError that any failure becomes.
        options: of `huggingface_hub.hf_hub_download`.
    """
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repository, file, **options))
    except Exception as error:  # whatever the network, the hub or its absence may raise
        absent = isinstance(error, ModuleNotFoundError)
        why = 'pip install "vitok[hub]"' if absent else " ".join(str(error).split())[:120].rstrip(" .")
        raise InputError(f"cannot fetch {file} of {repository} ({why}); or {instead}") from error


def _parsed(name: str) -> tuple[str, str | None]:
    """(owner/name, revision). Both become parts of paths in the cache, so that there must be no way out of them."""
    match = _NAME.fullmatch(name)
    if not match:
        raise InputError(f"a model on the hub is named owner/name or owner/name@revision, got {name!r}")
    return match[1], match[2]
