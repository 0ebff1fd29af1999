"""What stands at a path."""

from __future__ import annotations

import pytest

from vitok import InputError
from vitok.data.sources import open_source


def test_pictures_in_folders_and_alone(pictures):
    (pictures / "more").mkdir()
    (pictures / "picture_2.png").rename(pictures / "more" / "picture_2.png")
    (pictures / ".hidden.png").write_text("not looked at")
    source = open_source(pictures, 1)
    assert source.kind == "pictures" and source.skipped == []
    assert source.names == ["picture_0.png", "picture_1.png", "more/picture_2.png"]
    alone = open_source(pictures / "picture_0.png", 1)
    assert alone.names == ["picture_0.png"]
    assert next(iter(alone.read(0, alone.pick(0, 0.0)))).shape == (24, 24, 3)


def test_shards_in_folders_alone_and_by_pattern(tmp_path, shard):
    for name in ("train-0", "train-1", "val-0"):
        shard(tmp_path / f"{name}.tar", {"a.png": (1, 1, 1)})
    count = {path: len(open_source(tmp_path / path, 1).names) for path in ("", "val-0.tar", "train-*.tar")}
    assert count == {"": 3, "val-0.tar": 1, "train-*.tar": 2}


def test_several_kinds_in_one_place(tmp_path, shard, pictures, one_sentence):
    shard(pictures / "a.tar", {"a.png": (1, 1, 1)})
    with pytest.raises(InputError) as error:
        open_source(pictures, 1)
    one_sentence(error.value, "holds pictures and tar shards", "list each kind as a part of its own", "data: [")


@pytest.mark.parametrize(
    ("path", "message"),
    [("nothing", "does not exist"), ("*.tar", "no file matches"), ("notes.txt", "notes.txt is not"), ("", "no pict")],
)
def test_nothing_there(tmp_path, one_sentence, path, message):
    (tmp_path / "notes.txt").write_text("words")
    with pytest.raises(InputError) as error:
        open_source(tmp_path / path, 1)
    one_sentence(error.value, f"data {tmp_path / path}", message)
