"""Processes that prepare items end when they are no longer wanted, whatever they are doing."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

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

# Items leave a file when they are begun. In a process of its own, as workers are forked from it.
BEGUN = """
import multiprocessing, sys, time
from pathlib import Path
from torch.utils.data import Dataset
from vitok.data.workers import AHEAD, stream

class Begun(Dataset):
    def ahead(self, item):
        Path(f"{item} ahead").touch()

    def __getitem__(self, item):
        Path(f"{item} begun").touch()
        return item

def wait_for(kind, last):
    while seen(kind) != list(range(last + 1)):
        time.sleep(0.01)

def seen(kind):
    return sorted(int(path.name.split()[0]) for path in Path().glob(f"* {kind}"))

def ahead():
    answers = stream(Begun(), range(10), 2)
    assert next(answers) == 0
    wait_for("begun", 2 * AHEAD)
    assert list(answers) == list(range(1, 10)) and not seen("ahead")

def turns():
    answers = stream(Begun(), range(9), 2, turns=True)
    for taken in range(0, 8, 2):
        assert next(answers) == taken and next(answers) == taken + 1
        wait_for("ahead", min(taken + 3, 8))
        time.sleep(0.2)  # in which they would begin the next
        assert seen("begun") == list(range(taken + 2))
    assert list(answers) == [8]

def closed():
    answers = stream(Begun(), range(9), 2, turns=True)
    assert next(answers) == 0
    workers = multiprocessing.active_children()
    answers.close()
    assert [each.exitcode for each in workers] == [0, 0]  # and were not killed

if __name__ == "__main__":
    globals()[sys.argv[1]]()
"""


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


@pytest.mark.parametrize("how", ["ahead", "turns", "closed"])
def test_workers_run_ahead_or_take_turns(processes, tmp_path, how):
    """Ahead of who asks, or resting until all items have been taken; those that rest end when they are asked to."""
    (tmp_path / "begun.py").write_text(BEGUN)
    result = processes.run([sys.executable, "begun.py", how], limit=LIMIT, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
