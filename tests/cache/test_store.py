"""Writing into a cache and nowhere else."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from vitok import InputError
from vitok.cache.build import wait_for_others
from vitok.cache.manifest import Record
from vitok.cache.store import OWN, Store, check_path

LIMIT = 300.0  # seconds


@pytest.mark.parametrize(
    "path", ["", "/a", "../a", "a/../../b", "a//b", "a/./b", "..", "a\\b", "C:\\b", "a\0b", "a/", "manifest.json",
             "manifest/00000.json", "summary.json", ".partial/x"],
)  # fmt: skip
def test_paths_that_lead_elsewhere(path):
    with pytest.raises(InputError, match="cannot be the name of a file in a cache"):
        check_path(path, OWN)


def test_a_link_that_leads_out_is_not_followed(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "features").symlink_to(tmp_path)
    store = Store(tmp_path / "cache")
    with pytest.raises(InputError, match="a link leads out of the cache"):
        store.write([("features/deeper/1.npy", b"x")])
    assert sorted(os.listdir(tmp_path)) == ["cache"]


def test_two_files_of_one_name(tmp_path):
    (tmp_path / "cache").mkdir()
    with pytest.raises(InputError, match="two samples give one file"):
        Store(tmp_path / "cache").write([("a", b"1"), ("a", b"2")])
    assert not (tmp_path / "cache" / "a").exists()


def test_a_name_that_is_too_long(tmp_path):
    (tmp_path / "cache").mkdir()
    with pytest.raises(InputError, match="File name too long"):
        Store(tmp_path / "cache").write([("a" * 300, b"1")])


def test_waiting_for_other_ranks_ends_with_their_work(tmp_path):
    """As long as they show that they work, whatever a shard takes."""
    store = Store(tmp_path)
    record = Record(0, [], [], [], 0, [], [])

    def work():
        with store.working(1) as show:
            for _ in range(20):
                show()
                time.sleep(0.2)
            store.write_shard(record)

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        wait_for_others(store, [0], patience=2.0)
        working.result()
    assert store.record(0) == record and store.at_work() == {}


def test_waiting_for_ranks_that_are_gone_ends(tmp_path, one_sentence):
    store = Store(tmp_path)
    store.write_shard(Record(1, [], [], [], 0, [], []))
    with store.working(1) as show, pytest.raises(InputError) as error:
        show()
        wait_for_others(store, [1, 3, 5], patience=0.5)
    one_sentence(error.value, "manifest/00003.json, manifest/00005.json of", "have shown nothing for 0 minutes")


def test_a_lock_ends_with_its_process_and_not_with_its_children(tmp_path):
    store = Store(tmp_path)
    ready, tell = os.pipe()
    with store.locked():
        with pytest.raises(InputError, match="another process"), store.locked():
            pass
        child = os.fork()
        if child == 0:
            os.write(tell, b".")
            time.sleep(LIMIT)
            os._exit(1)
        os.close(tell)  # so that a child that is gone ends the wait
        assert os.read(ready, 1) == b"."
    try:
        with store.locked():
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
