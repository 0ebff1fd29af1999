"""What needs a process of its own: signals, a terminal, a broken pipe, memory."""

import os
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import vitok as package
from vitok.io import ClipReader, ClipWriter, read_image

pytest.importorskip("av")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and terminals")

VITOK = str(Path(sys.executable).with_name("vitok"))
LIMIT = 300.0  # seconds
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# A shell starts background jobs with SIGINT ignored, nohup with SIGHUP, and what the tests start would inherit that.
OPTIONS = {
    "env": ENVIRONMENT,
    "preexec_fn": lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)],
}
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **OPTIONS}


@pytest.fixture(scope="module", autouse=True)
def installed():
    if not Path(VITOK).exists():
        pytest.skip("the console script is not installed")


def long_clip(path, frames, side=128):
    with ClipWriter(path, 24) as writer:
        for start in range(0, frames, 64):
            shade = torch.arange(start, min(start + 64, frames)).view(-1, 1, 1, 1) % 256
            writer.write(shade.to(torch.uint8).expand(-1, side, side, 3))
    return path


@pytest.fixture
def beside(processes):
    """`beside(command, ...)`: a process that ends with the test."""
    with ExitStack() as stack:
        yield lambda *command, **options: stack.enter_context(processes.started(command, **options))


def test_interrupted_in_the_middle_of_a_clip(beside, files, models, tmp_path):
    """The picture before it stays whole; of the clip nothing has the final name, and only SIGKILL leaves rubbish."""
    inputs = [files.picture(tmp_path / "a.png"), long_clip(tmp_path / "b.mp4", 800)]
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
    runs = {}
    for number in numbers:
        out = tmp_path / number.name
        command = [VITOK, "reconstruct", *inputs, "--out", out, "--model", models.pictures]
        runs[number] = (out, beside(*command, **PIPES))
    waiting, end = dict(runs), time.monotonic() + LIMIT
    while waiting:
        for number, (out, process) in list(waiting.items()):
            assert process.poll() is None, process.communicate(timeout=LIMIT)
            if any(out.glob(".vitok-*.mp4")):
                time.sleep(0.3)  # well into it
                process.send_signal(number)
                del waiting[number]
        assert time.monotonic() < end, "nothing was written"
        time.sleep(0.02)
    for number, (out, process) in runs.items():
        _, errors = process.communicate(timeout=LIMIT)
        assert "Traceback" not in errors
        left = sorted(os.listdir(out))
        if number == signal.SIGKILL:
            assert process.returncode == -number
            assert left[-1] == "a.png" and all(name.startswith(".vitok-") for name in left[:-1])
        else:
            assert process.returncode == 128 + number
            assert errors == "error: interrupted; outputs under their final names are complete\n"
            assert left == ["a.png"]
        assert read_image(out / "a.png").pixels.shape == (40, 2 * 56 + 8, 3)


def test_on_a_terminal(beside, files, models, tmp_path):
    import pty

    clip, picture = long_clip(tmp_path / "b.mp4", 100, side=192), files.picture(tmp_path / "a.png")
    ours, theirs = pty.openpty()
    command = [
        VITOK,
        "reconstruct",
        clip,
        tmp_path / "no.jpg",
        picture,
        "--out",
        tmp_path / "o",
        "--model",
        models.pictures,
    ]
    environment = {**ENVIRONMENT, "TERM": "xterm", "COLUMNS": "100", "LINES": "24"}
    process = beside(*command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown, end = b"", time.monotonic() + LIMIT
    while select.select([ours], [], [], max(0.0, end - time.monotonic()))[0]:
        try:
            data = os.read(ours, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not data:
            break
        shown += data
    os.close(ours)
    text = shown.decode()
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))
    assert process.wait(LIMIT) == 2, text
    assert "Traceback" not in text and "Error" not in text
    assert f"error: {tmp_path / 'no.jpg'} does not exist" in lines
    assert "2 of 3 reconstructed, 1 failed" in lines
    assert re.search(r"b\.mp4\n.*/100 .*frames/s", "\n".join(lines))
    with ClipReader(tmp_path / "o" / "b.mp4") as reader:
        assert sum(map(len, reader.chunks(50))) == 100


def test_a_reader_that_goes_away(beside, tmp_path):
    with open(tmp_path / "errors", "w") as errors:
        process = beside(VITOK, "models", **{**PIPES, "stderr": errors})
    process.stdout.close()
    assert process.wait(LIMIT) == 1 and (tmp_path / "errors").read_text() == ""


def test_where_there_is_no_sighup(vitok, monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP")  # as on Windows
    assert vitok("models").code == 0


MEASURE = """
import resource, sys
from vitok.cli import command
try:
    command.main(sys.argv[1:], standalone_mode=False)
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


@pytest.mark.long
@pytest.mark.parametrize("model", ["pictures", "clips"])
def test_memory_does_not_grow_with_the_length_of_a_clip(processes, models, tmp_path, model):
    peaks = {}
    for frames in (64, 640):
        clip = long_clip(tmp_path / f"{frames}.mp4", frames)
        arguments = ["reconstruct", clip, "--out", tmp_path / "o", "--model", getattr(models, model)]
        done = processes.run([sys.executable, "-c", MEASURE, *arguments], **OPTIONS)
        assert done.returncode == 0, done.stderr
        with ClipReader(tmp_path / "o" / f"{frames}.mp4") as reader:
            assert sum(map(len, reader.chunks(64))) == frames
        peaks[frames] = int(done.stdout.split("peak ")[1])
    assert peaks[640] < 1.5e9
    assert peaks[640] - peaks[64] < 100e6


@pytest.mark.long
def test_memory_does_not_grow_with_the_latents_of_a_clip(processes, tmp_path):
    """Of a model whose latents are larger than the pixels: 168 MB for ten chunks, 50 MB for three."""
    model = tmp_path / "model"
    package.create_model("Tiw64d1h1-Tiw64d1h1/16", channels=1024).save(model)
    peaks = {}
    for frames in (192, 640):
        clip, latents, out = long_clip(tmp_path / f"{frames}.mp4", frames), tmp_path / f"l{frames}", tmp_path / "o"
        for command, source, target in (("encode", clip, latents), ("decode", latents, out)):
            arguments = [command, source, "--out", target, "--model", model]
            done = processes.run([sys.executable, "-c", MEASURE, *arguments], **OPTIONS)
            assert done.returncode == 0, done.stderr
            peaks[command, frames] = int(done.stdout.split("peak ")[1])
        assert (latents / f"{frames}.safetensors").stat().st_size > frames * 8 * 8 * 1024 * 4
    for command in ("encode", "decode"):
        assert peaks[command, 640] - peaks[command, 192] < 60e6, peaks
