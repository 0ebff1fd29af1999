"""What needs a process of its own: signals, a terminal, a broken pipe, memory."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import vitok as package
from vitok.io import ClipReader, ClipWriter, read_image

pytest.importorskip("av")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and terminals")

VITOK = str(Path(sys.executable).with_name("vitok"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# A shell starts background jobs with SIGINT ignored, nohup with SIGHUP, and what the tests start would inherit that.
PIPES = {
    "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT,
    "preexec_fn": lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)],
}  # fmt: skip


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


def test_interrupted_in_the_middle_of_a_clip(files, models, tmp_path):
    """The picture before it stays whole; of the clip nothing has the final name, and only SIGKILL leaves rubbish."""
    inputs = [files.picture(tmp_path / "a.png"), long_clip(tmp_path / "b.mp4", 800)]
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
    runs = {}
    for number in numbers:
        out = tmp_path / number.name
        command = [VITOK, "reconstruct", *map(str, inputs), "--out", str(out), "--model", str(models.pictures)]
        runs[number] = (out, subprocess.Popen(command, **PIPES))
    waiting, end = dict(runs), time.monotonic() + 120
    while waiting:
        for number, (out, process) in list(waiting.items()):
            assert process.poll() is None, process.communicate()
            if any(out.glob(".vitok-*.mp4")):
                time.sleep(0.3)  # well into it
                process.send_signal(number)
                del waiting[number]
        assert time.monotonic() < end, "nothing was written"
        time.sleep(0.02)
    for number, (out, process) in runs.items():
        _, errors = process.communicate(timeout=120)
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


def test_on_a_terminal(files, models, tmp_path):
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
    process = subprocess.Popen([str(a) for a in command], stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while True:
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
    assert process.wait() == 2, text
    assert "Traceback" not in text and "Error" not in text
    assert f"error: {tmp_path / 'no.jpg'} does not exist" in lines
    assert "2 of 3 reconstructed, 1 failed" in lines
    assert re.search(r"b\.mp4\n.*/100 .*frames/s", "\n".join(lines))
    with ClipReader(tmp_path / "o" / "b.mp4") as reader:
        assert sum(map(len, reader.chunks(50))) == 100


def test_a_reader_that_goes_away():
    process = subprocess.Popen([VITOK, "models"], **PIPES)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1


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
def test_memory_does_not_grow_with_the_length_of_a_clip(models, tmp_path, model):
    peaks = {}
    for frames in (64, 640):
        clip = long_clip(tmp_path / f"{frames}.mp4", frames)
        arguments = ["reconstruct", clip, "--out", tmp_path / "o", "--model", getattr(models, model)]
        done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, arguments)], **PIPES)
        assert done.returncode == 0, done.stderr
        with ClipReader(tmp_path / "o" / f"{frames}.mp4") as reader:
            assert sum(map(len, reader.chunks(64))) == frames
        peaks[frames] = int(done.stdout.split("peak ")[1])
    assert peaks[640] < 1.5e9
    assert peaks[640] - peaks[64] < 100e6


@pytest.mark.long
def test_memory_does_not_grow_with_the_latents_of_a_clip(tmp_path):
    """Of a model whose latents are larger than the pixels: 168 MB for ten chunks, 50 MB for three."""
    model = tmp_path / "model"
    package.create_model("Tiw64d1h1-Tiw64d1h1/16", channels=1024).save(model)
    peaks = {}
    for frames in (192, 640):
        clip, latents, out = long_clip(tmp_path / f"{frames}.mp4", frames), tmp_path / f"l{frames}", tmp_path / "o"
        for command, source, target in (("encode", clip, latents), ("decode", latents, out)):
            arguments = [command, source, "--out", target, "--model", model]
            done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, arguments)], **PIPES)
            assert done.returncode == 0, done.stderr
            peaks[command, frames] = int(done.stdout.split("peak ")[1])
        assert (latents / f"{frames}.safetensors").stat().st_size > frames * 8 * 8 * 1024 * 4
    for command in ("encode", "decode"):
        assert peaks[command, 640] - peaks[command, 192] < 60e6, peaks
