"""Commands run beside a test that cannot outlast it: each has a limit, and ends with all that it has started.

Test modules load it by `runpy.run_path`.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

LIMIT = 600.0  # seconds: many times what any of them needs, for slow machines
MARK = "VITOK_TEST_PROCESSES"  # an environment variable that all processes of a command inherit


def run(command: Sequence[object], limit: float = LIMIT, **options: Any) -> subprocess.CompletedProcess[str]:
    """What a command prints and its exit status, as `subprocess.run` gives them; fails after `limit` seconds.

    It writes to files: what is left of it cannot hold them open and keep the test waiting, as it could a pipe.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        with started(command, **{"stdout": out, "stderr": errors, **options}) as process:
            code = ended(process, limit)
        texts = []
        for file in (out, errors):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    assert code is not None, f"not done after {limit:.0f} s: {command}\n{texts[0][-2000:]}\n{texts[1][-4000:]}"
    return subprocess.CompletedProcess(command, code, *texts)


@contextmanager
def started(command: Sequence[object], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process, for as long as the context lasts."""
    mark = secrets.token_hex(16)
    environment = {**(options.pop("env", None) or os.environ)}
    environment[MARK] = f"{os.environ.get(MARK, '')} {mark}"  # a command's command is the outer one's too
    process = subprocess.Popen(list(map(str, command)), env=environment, start_new_session=True, **options)
    try:
        yield process
    finally:
        _end(process, mark.encode())


def ended(process: subprocess.Popen[Any], limit: float = LIMIT) -> int | None:
    """Its exit status, None if it does not end within `limit` seconds."""
    with suppress(subprocess.TimeoutExpired):
        return process.wait(limit)
    return None


def _end(process: subprocess.Popen[Any], mark: bytes) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    # Ranks of torchrun and daemons of Ray are in sessions of their own, and Linux tells them by their environment.
    deadline = time.monotonic() + 10
    while (left := _marked(mark)) and time.monotonic() < deadline:
        for number in left:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.01)
    process.wait(60)


def _marked(mark: bytes) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark in path.read_bytes():
                found.append(int(path.parent.name))
    return found
