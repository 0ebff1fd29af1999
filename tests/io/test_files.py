import errno
import os
import signal
import sys
import textwrap

import pytest

from vitok.errors import InputError
from vitok.io import atomic_path, find_inputs, output_stems
from vitok.io.files import check_readable, fetch_ahead


def touch(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_atomic_path_writes_and_replaces(tmp_path):
    target = touch(tmp_path / "out.png", b"old")
    with atomic_path(target) as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".png" and temporary.name.startswith(".")
        temporary.write_bytes(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["out.png"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_atomic_path_leaves_nothing_after_a_failure(tmp_path, failure):
    kept = touch(tmp_path / "kept.bin", b"old")
    for target in (kept, tmp_path / "fresh.bin"):
        with pytest.raises(failure), atomic_path(target) as temporary:
            temporary.write_bytes(b"half")
            raise failure
    assert os.listdir(tmp_path) == ["kept.bin"] and kept.read_bytes() == b"old"


def test_killed_writer_leaves_no_file_under_the_final_name(processes, tmp_path):
    script = textwrap.dedent("""
        import os, signal, sys
        from vitok.io import atomic_path
        with atomic_path(sys.argv[1]) as temporary:
            temporary.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    target = tmp_path / "out.png"
    done = processes.run([sys.executable, "-c", script, target])
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    (left,) = find_inputs([tmp_path])  # what a kill leaves is hidden, and never taken for an input
    assert "holds no pictures" in str(left.error)


def test_atomic_path_obeys_the_umask_and_writes_through_links(tmp_path):
    real = touch(tmp_path / "real.bin", b"old")
    link = tmp_path / "link.bin"
    link.symlink_to(real)
    before = os.umask(0o027)
    try:
        with atomic_path(link) as temporary:
            temporary.write_bytes(b"new")
    finally:
        os.umask(before)
    assert link.is_symlink() and real.read_bytes() == b"new"
    assert real.stat().st_mode & 0o777 == 0o640


def test_unwritable_destinations(tmp_path):
    file = touch(tmp_path / "file")
    for target in (tmp_path, file / "below.png", "/dev/null", tmp_path / ("n" * 300) / "a.png"):
        with pytest.raises(InputError, match="cannot write"), atomic_path(target):
            pytest.fail("must not get here")
    assert os.path.exists("/dev/null") and not os.path.isfile("/dev/null")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="Permission denied"), atomic_path(tmp_path / "a.png"):
        pytest.fail("must not get here")


def test_full_disk_and_failing_rename(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"a\.png.*No space left"), atomic_path(tmp_path / "a.png"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a.png"):
        (tmp_path / "other").read_bytes()  # somebody else's error stays what it is

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(InputError, match="Permission denied"), atomic_path(tmp_path / "a.png"):
        pass
    assert os.listdir(tmp_path) == []


def test_check_readable(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    cases = {
        tmp_path / "none": "does not exist",
        tmp_path: "is a folder, not a picture",
        touch(tmp_path / "empty", b""): "is empty",
        tmp_path / "pipe": "not a regular file",
    }
    for path, sentence in cases.items():
        with pytest.raises(InputError, match=sentence) as error:
            check_readable(path, "a picture")
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_find_inputs_expands_sorts_and_classifies(tmp_path):
    for name in ("b.JPG", "a.png", "sub/c.mp4", "sub/notes.txt", ".hidden.png", ".git/d.png", "e.safetensors"):
        touch(tmp_path / name)
    found = find_inputs([tmp_path])
    assert [(entry.path.name, entry.kind) for entry in found] == [
        ("a.png", "image"),
        ("b.JPG", "image"),
        ("c.mp4", "clip"),
    ]
    assert [entry.path.name for entry in find_inputs([tmp_path], kinds=("latents",))] == ["e.safetensors"]


def test_find_inputs_takes_each_file_once_and_keeps_the_order(tmp_path):
    a, b = touch(tmp_path / "a.png"), touch(tmp_path / "b.png")
    assert [entry.path for entry in find_inputs([b, tmp_path, tmp_path / "." / "a.png"])] == [b, a]


def test_explicit_files_go_by_content_when_the_extension_says_nothing(tmp_path):
    heads = {
        "jpeg": (b"\xff\xd8\xff\xe0" + b"\0" * 12, "image"),
        "avif": (b"\0\0\0\x20ftypavif", "image"),
        "mp4": (b"\0\0\0\x20ftypisom", "clip"),
        "webp": (b"RIFF\0\0\0\0WEBP", "image"),
        "avi": (b"RIFF\0\0\0\0AVI ", "clip"),
        "pgm": (b"P5\n2 2\n255\n", "image"),
        "matroska": (b"\x1aE\xdf\xa3\0\0\0\0", "clip"),
        "bare": (b'\x10\0\0\0\0\0\0\0{"a":{}}', "latents"),
    }
    for name, (head, kind) in heads.items():
        (entry,) = find_inputs([touch(tmp_path / name, head)], kinds=("image", "clip", "latents"))
        assert (entry.kind, entry.error) == (kind, None), name


def test_bad_entries_do_not_cost_the_good_ones(tmp_path):
    good = touch(tmp_path / "good.png")
    text = touch(tmp_path / "notes.txt", b"hello")
    empty = tmp_path / "empty"
    empty.mkdir()
    found = find_inputs([tmp_path / "none.jpg", good, text, empty, touch(tmp_path / "x.safetensors")])
    assert [entry.kind for entry in found] == [None, "image", None, None, None]
    sentences = [str(entry.error) for entry in found if entry.error]
    for sentence, words in zip(
        sentences,
        ("does not exist", "not a picture or a clip", "holds no pictures or clips", "not a pict"),
        strict=True,
    ):
        assert words in sentence


def test_output_stems(tmp_path):
    names = ["a/cat.jpg", "b/cat.jpg", "b/CAT.png", "dog.jpg", "x.y.png"]
    assert output_stems([tmp_path / name for name in names]) == ["a_cat_jpg", "b_cat_jpg", "CAT_png", "dog", "x.y"]
    same = output_stems(
        [tmp_path / "a_b/c.png", tmp_path / "a/b_c.png", tmp_path / "a/b/c.png", tmp_path / "a/b/c.png"]
    )
    assert len({stem.casefold() for stem in same}) == 4
    assert output_stems([]) == []


def test_fetching_ahead_says_nothing_of_what_cannot_be_read(tmp_path):
    (tmp_path / "there").write_bytes(b"x" * 10_000)
    os.mkfifo(tmp_path / "pipe")
    for name in ("there", "pipe", "missing", "."):
        fetch_ahead(tmp_path / name)
        fetch_ahead(tmp_path / name, 4_096, 100)
    fetch_ahead("a\udcff")
