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
