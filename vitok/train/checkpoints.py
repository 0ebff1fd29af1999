"""Checkpoints of a run: directories of safetensors that any number of ranks writes and any other number reads.

torch.distributed.checkpoint writes them in its format of sharded safetensors files, so no pickle has part in it. A
checkpoint gets its name when it is whole; the one before it goes after that.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from vitok.errors import InputError
from vitok.io.files import flush_folder
from vitok.parallel import Ranks

FORMAT = 1
ABOUT, PREFIX, PARTIAL, REPLACED = "checkpoint.json", "state-", ".partial", ".replaced"


def write(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Make the directory `path`, on all ranks together; InputError when it cannot be written.

    Args:
        path: a kill at any moment leaves what was there, or the new one whole; between the two, for the moment of a
            rename, what was there is called `path`.replaced, where `newest` finds it.
        tensors: names mean the same on all ranks; DTensors, or on every rank the same tensor.
        about: JSON values that `read_about` gives back.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    ranks = Ranks.current()
    partial, replaced = (path.with_name(path.name + suffix) for suffix in (PARTIAL, REPLACED))
    with _failures(f"cannot write the checkpoint {path}"):
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        ranks.wait()
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        dcp.save(_with_axes(tensors), storage_writer=writer, no_dist=ranks.count == 1)
        if ranks.rank == 0:
            with open(partial / ABOUT, "w") as file:
                json.dump({"format": FORMAT, **about}, file)
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                path.rename(replaced)
            partial.rename(path)
            flush_folder(path.parent)
            shutil.rmtree(replaced, ignore_errors=True)
        ranks.wait()


def write_step(folder: Path, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """The checkpoint of a step, in place of those that are in the folder."""
    path = folder / f"{PREFIX}{step:08d}"
    write(path, tensors, {"step": step, **about})
    if Ranks.current().rank == 0:
        for other in folder.glob(f"{PREFIX}*"):
            if other != path:
                shutil.rmtree(other, ignore_errors=True)


def newest(folder: Path) -> Path | None:
    """The checkpoint of the latest step that was written whole, or None."""
    found = (path for path in folder.glob(f"{PREFIX}*") if path.suffix != PARTIAL)
    return max(found, key=lambda path: (path.stem, path.suffix != REPLACED), default=None)


def read_about(path: Path) -> dict[str, Any]:
    """What `write` was told; InputError for what is no checkpoint or one of a newer format."""
    try:
        about = json.loads((path / ABOUT).read_text())
        version = about["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot resume: {path} is no checkpoint: {error}") from error
    if version != FORMAT:
        raise InputError(f"cannot resume: {path} has format {version}, and this version of vitok reads {FORMAT}")
    return dict(about)


def read_into(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Overwrite tensors, shared out in whatever way, by those of the checkpoint; InputError when it lacks or cannot
    give them."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    with _failures(f"cannot resume: {path} is damaged or of another model"):
        reader = HuggingFaceStorageReader(str(path))
        dcp.load(_with_axes(tensors), storage_reader=reader, no_dist=Ranks.current().count == 1)


def _with_axes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The reader takes slices, which numbers without an axis have not."""
    return {name: x.detach().view(1) if x.dim() == 0 else x.detach() for name, x in tensors.items()}


@contextmanager
def _failures(what: str) -> Iterator[None]:
    cause: BaseException
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is meant
            yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
    except (OSError, SafetensorError) as error:
        cause = error
    else:
        return
    raise InputError(f"{what}: {' '.join(str(cause).split())}") from cause
