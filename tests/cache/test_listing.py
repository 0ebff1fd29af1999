"""Which samples a data set has, in which order and of which classes, without opening one."""

from __future__ import annotations

import io
import pickle
import tarfile

import pytest

from vitok import InputError
from vitok.cache.listing import open_listing


@pytest.fixture
def tree(tmp_path):
    """`tree("a/x.png", ...)`: a folder of files that are no pictures at all."""

    def make(*names):
        for name in names:
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"?")
        return tmp_path / "data"

    return make


def shard(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_folders_are_classes_where_every_picture_lies_in_one(tree):
    found = open_listing(tree("b/2.jpg", "a/x/1.PNG", "b/10.webp", "b/.hidden.png", ".git/1.png", "b/notes.txt"), 1)
    assert list(found.names) == ["a/x/1.PNG", "b/10.webp", "b/2.jpg"] and not found.clips and not found.skipped
    assert list(found.labels) == [0, 1, 1] and found.classes == ["a", "b"]
    found = open_listing(tree("top.jpg"), 1)
    assert found.names[0] == "top.jpg" and list(found.labels) == [-1] * 4 and found.classes == []


def test_the_hash_changes_with_names_and_labels(tree, tmp_path):
    one = open_listing(tree("a/1.jpg", "b/2.jpg"), 1)
    assert one.hash == open_listing(tmp_path / "data", 1).hash == pickle.loads(pickle.dumps(one)).hash
    (tmp_path / "data" / "a" / "1.jpg").rename(tmp_path / "data" / "a" / "3.jpg")
    assert open_listing(tmp_path / "data", 1).hash != one.hash


@pytest.mark.parametrize(
    "given, labels, classes",
    [
        ([("1.cls", b"5\n"), ("2.cls", b"0")], [5, 0], []),
        ([("1.cls", b"cat"), ("2.json", b'{"label": "ant"}')], [1, 0], ["ant", "cat"]),
        ([("1.cls", b"7"), ("2.cls", b"cat")], [0, 1], ["7", "cat"]),
        ([("1.json", b'{"cls": 3}')], [3, -1], []),
        ([("1.json", b"[1]"), ("1.x.cls", b"9")], [-1, -1], []),
        ([], [-1, -1], []),
    ],
)
def test_classes_of_tar_shards(tmp_path, given, labels, classes):
    path = shard(tmp_path / "s.tar", [("1.png", b"?"), *given, ("2.png", b"?")])
    found = open_listing(path, 1)
    assert list(found.names) == ["s.tar/1.png", "s.tar/2.png"]
    assert (list(found.labels), found.classes) == (labels, classes)


@pytest.mark.parametrize(
    "member, words",
    [
        (("1.cls", b"\xff\xfe"), "the .cls member beside s.tar/1.png names no class"),
        (("1.cls", b"two\nlines"), "names no class"),
        (("1.cls", b""), "names no class"),
        (("1.json", b"{"), "the .json member"),
        (("1.json", b"[" * 100_000), "the .json member"),
        (("1.json", b'{"label": 1.5}'), "names no class"),
        (("1.json", b'{"label": true}'), "names no class"),
        (("1.json", b'{"label": -2}'), "a class must be a number from 0"),
        (("1.cls", b"9" * 30), "a class must be a number from 0"),
    ],
)
def test_what_is_no_class_is_refused(tmp_path, member, words):
    with pytest.raises(InputError) as error:
        open_listing(shard(tmp_path / "s.tar", [("1.png", b"?"), member]), 1)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_truncated_shard_is_told_of(tmp_path):
    path = shard(tmp_path / "s.tar", [("1.png", b"?" * 2000), ("2.png", b"?" * 2000)])
    path.write_bytes(path.read_bytes()[:4000])
    found = open_listing(path, 1)
    assert list(found.names) == ["s.tar/1.png"] and len(found.skipped) == 1 and "cut short" in found.skipped[0]
