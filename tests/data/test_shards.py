"""Tar shards: read where they lie, whatever their names and ends are."""

from __future__ import annotations

import tarfile

import pytest
import torch

from vitok import InputError
from vitok.data.batches import Batches
from vitok.data.shards import ShardPictures
from vitok.data.sources import open_source
from vitok.io.images import read_image


def pixels(source, index):
    return next(iter(source.read(index, source.pick(index, 0.0))))


def test_members_are_pictures_at_offsets(tmp_path, shard):
    first = {"0001.png": (1, 2, 3), "0001.txt": b"a caption", "0001.json": b"{}", "deep/0002.PNG": (4, 5, 6)}
    paths = [shard(tmp_path / "a.tar", first), shard(tmp_path / "b" / "b.tar", {"0003.png": (7, 8, 9)})]
    source = ShardPictures(tmp_path, paths)
    assert list(source.names) == ["a.tar/0001.png", "a.tar/deep/0002.PNG", "b/b.tar/0003.png"] and source.skipped == []
    for index, colour in ((2, (7, 8, 9)), (0, (1, 2, 3)), (1, (4, 5, 6))):
        assert (pixels(source, index) == torch.tensor(colour, dtype=torch.uint8)).all()
        assert pixels(source, index).shape == (24, 20, 3)


def test_the_batches_are_those_of_the_folder(tmp_path, shard, pictures):
    members = {path.name: path.read_bytes() for path in sorted(pictures.iterdir())}
    options = {"batch": 4, "crop": 16, "short_side": (16, 32), "seed": 0, "groups": "[0-9]"}
    tar, folder = (Batches(path, **options) for path in (shard(tmp_path / "x.tar", members), pictures))
    assert torch.equal(tar[3].pixels, folder[3].pixels)
    assert tar[3].names == tuple(f"x.tar/{name}" for name in folder[3].names)


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_hostile_members_touch_nothing(tmp_path, shard):
    device = tarfile.TarInfo("device.png")
    device.type = tarfile.CHRTYPE
    folder = tarfile.TarInfo("folder.png")
    folder.type = tarfile.DIRTYPE
    members = {
        "../../escape.png": (1, 1, 1), "/etc/absolute.png": (2, 2, 2), "new\nline\x1b[2J.png": (3, 3, 3),
        "soft.png": link("soft.png", "/etc/passwd"), "hard.png": link("hard.png", "../../escape.png", tarfile.LNKTYPE),
        "device.png": device, "folder.png": folder,
    }  # fmt: skip
    path = shard(tmp_path / "shards" / "x.tar", members)
    before = sorted(tmp_path.rglob("*"))
    source = ShardPictures(path.parent, [path])
    assert [name.isprintable() for name in source.names] == [True] * 3
    assert [pixels(source, i)[0, 0, 0].item() for i in range(3)] == [1, 2, 3]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_shard_cut_short_keeps_its_whole_members(tmp_path, shard, one_sentence):
    members = {f"{i}.png": (i, i, i) for i in range(4)}
    whole = shard(tmp_path / "whole.tar", members).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        last = tar.getmembers()[-1]
    for end in (last.offset, last.offset + 100, last.offset_data + 10, last.offset_data + 512):
        cut = tmp_path / "cut.tar"
        cut.write_bytes(whole[:end])
        kept = 4 if end > last.offset_data + last.size else 3
        source = ShardPictures(tmp_path, [cut])
        assert len(source.names) == kept, end
        assert len(source.skipped) == 1
        one_sentence(InputError(source.skipped[0]), f"tar shard {cut} cannot be read to its end")
        assert pixels(source, 2)[0, 0, 0] == 2


def test_shards_without_pictures(tmp_path, shard, one_sentence):
    (tmp_path / "text.tar").write_text("these are no headers " * 100)
    (tmp_path / "empty.tar").touch()
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    shard(tmp_path / "captions.tar", {"a.txt": b"words"})
    shard(tmp_path / "nothing.tar", {})
    for name in ("text", "empty", "packed", "captions", "nothing"):
        with pytest.raises(InputError) as error:
            open_source(tmp_path / f"{name}.tar", 1)
        one_sentence(error.value, "hold no pictures")


def test_damaged_members_are_replaced(tmp_path, shard):
    members = {"good.png": (5, 5, 5), "text.png": b"no picture", "empty.png": b""}
    data = Batches(shard(tmp_path / "x.tar", members), batch=32, crop=8, short_side=(8, 8), seed=0)
    batch = data[0]
    assert set(batch.names) == {"x.tar/good.png"} and (batch.pixels == 5).all()
    assert len(batch.skipped) == 2 and all("x.tar/" in message for message in batch.skipped)


def test_any_bytes_are_a_sentence_or_a_list(tmp_path, shard):
    """Single damaged bytes of a header never hang, raise or allocate."""
    whole = shard(tmp_path / "whole.tar", {f"{i}.png": (i, i, i) for i in range(2)}).read_bytes()
    damaged = tmp_path / "damaged.tar"
    for at in range(0, 512, 7):
        damaged.write_bytes(whole[:at] + bytes([whole[at] ^ 0x91]) + whole[at + 1 :])
        try:
            assert len(ShardPictures(tmp_path, [damaged]).names) <= 2
        except InputError as error:
            assert "\n" not in str(error)
    damaged.unlink()


def test_a_shard_that_has_gone(tmp_path, shard, one_sentence):
    path = shard(tmp_path / "x.tar", {"a.png": (1, 1, 1)})
    source = ShardPictures(tmp_path, [path])
    path.unlink()
    with pytest.raises(InputError) as error:
        pixels(source, 0)
    one_sentence(error.value, "x.tar cannot be read")


def test_the_content_decodes_as_the_file_does(tmp_path, shard, pictures):
    path = pictures / "picture_1.png"
    source = ShardPictures(tmp_path, [shard(tmp_path / "x.tar", {"p.png": path.read_bytes()})])
    assert torch.equal(pixels(source, 0), read_image(path).pixels)
