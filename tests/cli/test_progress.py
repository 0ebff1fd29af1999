"""Bars and messages, in this process: a real terminal is in test_process.py."""

import io
import re
import sys

import pytest

from vitok.cli import progress
from vitok.cli.progress import Display


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def lines(self):
        """What was printed, without the commands to the terminal."""
        return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue()))


@pytest.fixture
def open_terminal(monkeypatch):
    def open_it():  # in the test itself, because pytest puts its own sys.stderr in place between fixture and test
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setattr(sys, "stderr", Terminal())
        return sys.stderr

    return open_it


def test_two_bars_at_once_and_messages_between(open_terminal):
    terminal = open_terminal()
    with Display() as display, display.track(3, "inputs") as outer:
        for name in ("a", "b[/red]"):
            with display.track(40, "frames", f"{name}.mp4") as inner:
                for _ in range(4):
                    inner(10, f"{name}.mp4")
                    display._bars.refresh()
            display.say(f"error: {name} is " + "long " * 30)
            outer(1, name)
            display._bars.refresh()
    lines = terminal.lines()
    assert f"error: b[/red] is {'long ' * 30}".rstrip() in lines  # on a line of its own, not cut
    shown = "\n".join(lines)
    assert "2/3" in shown and "40/40" in shown and "inputs/s" in shown and "frames/s" in shown and "left" in shown
    assert all(len(line) <= 80 for line in lines if "/s" in line)


@pytest.mark.parametrize("columns", [100, 60, 20])
def test_a_long_label_is_shown_whole_however_narrow_the_terminal(open_terminal, monkeypatch, columns):
    terminal = open_terminal()
    monkeypatch.setenv("COLUMNS", str(columns))
    label = "loss 0.01234 kl 1.234 psnr 29.28 dB wait 12% skipped 3 12.5 images/s 43% of the matmul rate"
    with Display() as display, display.track(3600, "steps") as advance:
        advance(300, label)
        display._bars.refresh()
        lines = terminal.lines()
    assert all(len(line) <= columns for line in lines)
    assert label in " ".join(" ".join(lines).split())
    if columns > 20:
        assert re.search("^.* 300/3600 .*left", lines[-1]), "and the bar is below"


def test_one_picture_needs_no_bar_of_its_own(open_terminal):
    terminal = open_terminal()
    with Display() as display, display.track(1, "frames", "a.png") as advance:
        advance(1, "a.png")
        display._bars.refresh()
    assert "a.png" not in terminal.getvalue()


def test_unknown_total(open_terminal):
    terminal = open_terminal()
    with Display() as display, display.track(None, "pictures") as advance:
        for _ in range(3):
            advance(1, "x")
            display._bars.refresh()
    assert "3/?" in terminal.getvalue()


def test_bars_end_with_an_error(open_terminal):
    terminal = open_terminal()
    with pytest.raises(KeyError), Display() as display, display.track(3, "inputs"):
        raise KeyError
    assert terminal.getvalue().rstrip("\r").endswith("\x1b[2K\x1b[?25h")  # the bar is wiped, the cursor back


def test_quiet_lines_without_a_terminal(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Display() as display, display.track(100, "steps") as advance:
        for _ in range(50):
            now[0] += 0.5
            advance(1, "loss 0.1")
        display.say("two\nlines\x1b[2J")
    with Display() as display, display.track(None, "pictures") as advance:
        now[0] += 20
        advance(10, "")
    streams = capsys.readouterr()
    assert streams.out == "" and streams.err.splitlines() == [
        "20/100 steps, 2.00 steps/s, 40 s left loss 0.1",
        "40/100 steps, 2.00 steps/s, 30 s left loss 0.1",
        "two lines?[2J",
        "10 pictures, 0.50 pictures/s",
    ]


def test_following_what_is_gone_through(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Display() as display:
        for item in display.over("abc", "rounds", "bases"):
            assert item in "abc"
            now[0] += 8
    assert capsys.readouterr().err.splitlines() == ["2/3 rounds, 0.12 rounds/s, 8 s left bases"]
