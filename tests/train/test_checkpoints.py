"""Checkpoints as files: whole under their name, whatever happens while one is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vitok.train import checkpoints


def value_of(folder: Path) -> float:
    path, tensors = checkpoints.newest(folder), {"x": torch.zeros(3)}
    assert path is not None and checkpoints.read_about(path)["step"] == 5
    checkpoints.read_into(path, tensors)
    return tensors["x"][0].item()


def test_replacing_a_checkpoint_never_leaves_none(tmp_path, monkeypatch):
    def write(value: float) -> None:
        checkpoints.write_step(tmp_path, 5, {"x": torch.full((3,), value)}, {})

    write(1.0)
    rename = Path.rename
    for allowed in (0, 1):  # of the two renames, before the power fails
        left = iter(range(allowed))

        def fail(path: Path, target: Path, left=left) -> Path:
            if next(left, None) is None:
                raise RuntimeError("power cut")
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", fail)
        with pytest.raises(RuntimeError):
            write(2.0)
        assert value_of(tmp_path) == 1.0
    monkeypatch.undo()
    write(3.0)
    assert value_of(tmp_path) == 3.0
    assert [path.name for path in tmp_path.iterdir()] == ["state-00000005"]


def test_the_new_checkpoint_counts_where_the_replaced_one_is_still_there(tmp_path):
    checkpoints.write(tmp_path / "state-00000005", {"x": torch.ones(3)}, {"step": 5})
    checkpoints.write(tmp_path / "state-00000005.replaced", {"x": torch.zeros(3)}, {"step": 5})
    assert value_of(tmp_path) == 1.0
