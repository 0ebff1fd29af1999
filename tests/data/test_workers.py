"""Processes that prepare items end when they are no longer wanted, whatever they are doing."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time

import pytest
from torch.utils.data import Dataset

from vitok.data.workers import AHEAD, stream

LIMIT = 120.0  # seconds
# Both workers say who they are, and are stuck in their second item.
STUCK = """
import os, sys, time
from torch.utils.data import Dataset
from vitok.data.workers import stream

class Items(Dataset):
    def __getitem__(self, item):
        if item >= 2:
            time.sleep(3600)
        return os.getpid()

if __name__ == "__main__":
    answers = stream(Items(), range(4), 2)
    print(next(answers), next(answers), flush=True)
    if sys.argv[1] == "closes":
        answers.close()
    elif sys.argv[1] == "waits":
        time.sleep(3600)
"""


class Begun(Dataset):
    """Items that leave a file when they are begun."""

    def __init__(self, folder):
        self.folder = folder

    def __getitem__(self, item):
        (self.folder / str(item)).touch()
        return item

    def seen(self):
        return sorted(int(path.name) for path in self.folder.iterdir())


@pytest.fixture
def program(tmp_path):
    (tmp_path / "stuck.py").write_text(STUCK)
    return [sys.executable, tmp_path / "stuck.py"]


def is_there(number):
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    status = f"/proc/{number}/status"
    return not os.path.exists(status) or "\nState:\tZ" not in open(status).read()  # nobody may have asked for its end


@pytest.mark.parametrize("how", ["closes", "leaves"])
def test_workers_that_are_stuck_hold_nobody_up(processes, program, how):
    result = processes.run([*program, how], limit=LIMIT)
    assert result.returncode == 0, result.stderr
    assert not any(map(is_there, map(int, result.stdout.split())))


@pytest.mark.skipif(sys.platform != "linux", reason="asked of Linux")
def test_workers_end_at_once_with_an_owner_that_is_killed(processes, program):
    with processes.started([*program, "waits"], stdout=subprocess.PIPE, text=True) as owner:
        workers = list(map(int, owner.stdout.readline().split()))
        assert len(workers) == 2 and all(map(is_there, workers))
        owner.kill()
        owner.wait(LIMIT)
        end = time.monotonic() + LIMIT
        while any(map(is_there, workers)):
            assert time.monotonic() < end, "a worker outlives its owner"
            time.sleep(0.01)


def wait_for(condition):
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_workers_run_ahead(tmp_path):
    items = Begun(tmp_path)
    answers = stream(items, range(10), 2)
    assert next(answers) == 0
    wait_for(lambda: items.seen() == list(range(2 * AHEAD + 1)))
    assert list(answers) == list(range(1, 10))


def test_workers_that_take_turns_rest_until_all_items_are_taken(tmp_path):
    items = Begun(tmp_path)
    answers = stream(items, range(9), 2, turns=True)
    for taken in range(0, 8, 2):
        assert next(answers) == taken and next(answers) == taken + 1
        time.sleep(0.2)  # in which they would begin the next
        assert items.seen() == list(range(taken + 2))
    assert list(answers) == [8]


def test_workers_that_rest_end_when_they_are_asked_to(tmp_path):
    before = multiprocessing.active_children()
    answers = stream(Begun(tmp_path), range(9), 2, turns=True)
    assert next(answers) == 0
    workers = [each for each in multiprocessing.active_children() if each not in before]
    answers.close()
    assert len(workers) == 2 and [each.exitcode for each in workers] == [0, 0]  # and were not killed
