"""No command of a test outlasts it."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

# A command that leaves a process in a session of its own, which holds what the command writes to.
LEAVES = """
import subprocess, sys
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
print(child.pid, flush=True)
if sys.argv[1] == "stuck":
    child.wait()
"""


def is_there(number):
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{number}/status").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
@pytest.mark.parametrize("how", ["done", "stuck"])
def test_a_command_ends_with_all_that_it_started(processes, how):
    begun, command = time.monotonic(), [sys.executable, "-c", LEAVES, how]
    if how == "done":
        result = processes.run(command)
        assert result.returncode == 0 and result.stderr == ""
        child = int(result.stdout)
    else:
        with pytest.raises(AssertionError, match="not done after 5 s") as failure:
            processes.run(command, limit=5)
        child = int(str(failure.value).splitlines()[1])
    assert not is_there(child) and time.monotonic() - begun < 120
