import json
import os
import platform
import sys

import pytest
import torch

import vitok as package
from vitok import _native
from vitok.cli import command
from vitok.io import read_latents

COMMANDS = ("info", "models", "reconstruct", "encode", "decode", "cache", "convert", "export", "train", "eval", "bench")


@pytest.fixture
def nothing_bundled(tmp_path, monkeypatch):
    monkeypatch.setattr("vitok.checkpoint.resources.files", lambda _: tmp_path)


def test_help_of_every_command(vitok):
    assert tuple(command.commands) == COMMANDS
    overview = vitok("--help").out
    for name in COMMANDS:
        result = vitok(name, "-h")
        assert result.code == 0 and result.err == "" and f"Usage: vitok {name} [OPTIONS]" in result.out
        assert f"\n  {name} " in overview
        for option in command.commands[name].params:
            assert option.param_type_name == "argument" or option.help, f"{name} {option.name} explains nothing"
            assert all(form in result.out for form in option.opts if form.startswith("-"))


def test_version(vitok):
    assert vitok("--version").out == f"vitok, version {package.__version__}\n"


def test_info(vitok, nothing_bundled):
    facts = json.loads(vitok("info", "--json").out)
    assert set(facts) == {"versions", "native", "cpu", "gpus", "ops", "auto"}
    assert facts["versions"]["vitok"] == package.__version__ and facts["versions"]["torch"] == torch.__version__
    assert set(facts["native"]) == {"available", "reason", "cpu_isa", "cpu_isas", "cuda_archs", "build"}
    assert facts["native"]["available"] == (_native.library() is not None) == (not facts["native"]["reason"])
    assert facts["cpu"]["machine"] == platform.machine() and len(facts["gpus"]) == torch.cuda.device_count()
    for choice in facts["ops"]:
        assert set(choice) == {"op", "implementation", "usable", "reason"}
        assert choice["usable"] == (not choice["reason"])
    usable = {(choice["op"], choice["implementation"]) for choice in facts["ops"] if choice["usable"]}
    assert {(choice["op"], "reference") for choice in facts["ops"]} <= usable
    assert {line["op"] for line in facts["auto"]} == {choice["op"] for choice in facts["ops"]}
    for line in facts["auto"]:
        assert line["order"] and line["why"]
        assert all((line["op"], name) in usable for name in line["order"])
    text = vitok("info").out
    assert torch.__version__ in text and all(
        name in text for op in facts["ops"] for name in (op["op"], op["implementation"])
    )


def test_without_the_native_library(vitok, processes, files, models, tmp_path):
    """In a process of its own, because the choice is made once: `info` says so, and the results are the same."""
    picture = files.picture(tmp_path / "a.png", 37, 50)
    encode = ["encode", str(picture), "--model", str(models.pictures), "--out"]
    calls = [["info", "--json"], ["info"], [*encode, str(tmp_path / "off")]]
    code = (
        f"from vitok.cli import command\nfor call in {calls!r}: command.main(call, standalone_mode=False); print('==')"
    )
    environment = {**os.environ, "VITOK_NATIVE": "off"}
    done = processes.run([sys.executable, "-c", code], env=environment)
    assert done.returncode == 0, done.stderr
    facts, text, encoded, _ = done.stdout.split("==\n")
    facts = json.loads(facts)
    assert facts["native"]["available"] is False and "VITOK_NATIVE=off" in facts["native"]["reason"]
    native = [choice for choice in facts["ops"] if choice["implementation"] == "native"]
    assert native and not any(choice["usable"] for choice in native)
    assert all("VITOK_NATIVE=off" in choice["reason"] for choice in native)
    assert "native library: not used: VITOK_NATIVE=off" in text and "why not" in text
    assert encoded == "1 encoded\n" and vitok(*encode, tmp_path / "on").code == 0
    off, on = (read_latents(tmp_path / folder / "a.safetensors").latents for folder in ("off", "on"))
    assert torch.allclose(off, on, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"size": 512}, {"size": 128, "frames": 16}])
def test_models_agree_with_count(vitok, nothing_bundled, options):
    arguments = [text for name, value in options.items() for text in (f"--{name}", value)]
    rows = json.loads(vitok("models", "--json", *arguments).out)
    assert [row["name"] for row in rows] == package.list_models()
    for row in rows:
        counted = package.count(row["name"], **{"size": 256, **options})
        assert not row["weights"] and row["preset"] == "paper"
        for field in ("params", "encoder_params", "decoder_params", "macs", "flops", "tokens", "floats"):
            assert row[field] == getattr(counted, field), (row["name"], field)
    title, header, *lines = vitok("models", *arguments).out.splitlines()
    assert "x".join(f" {n} " for n in (options.get("frames", 1), *[options.get("size", 256)] * 2)) in title
    assert len(lines) == len(rows) and "GMAC" in header and "GFLOP" in header
    for row, line in zip(rows, lines, strict=True):
        assert (
            line.split()[0] == row["name"] and f" {row['macs'] / 1e9:.2f} " in line and f" {row['floats']:,} " in line
        )


def test_models_by_name_preset_and_directory(vitok, models):
    arguments = ("S-B/16", "S-L/16", models.clips, "--preset", "author-v1", "--channels", 64, "--json")
    small, large, stored = json.loads(vitok("models", *arguments).out)
    assert (
        small["params"] == package.count("S-B/16", channels=64, preset="author-v1").params and large["channels"] == 64
    )
    assert stored["weights"] and (stored["channels"], stored["preset"]) == (32, "paper")
    assert stored["params"] == sum(p.numel() for p in package.load(models.clips).parameters())
    newer = json.loads(vitok("models", "--preset", "v2", "--json").out)
    assert newer and all(row["preset"] == "v2" for row in newer if not row["weights"])


def test_bundled_models_come_first(vitok, models, tmp_path, monkeypatch):
    (tmp_path / "weights").mkdir()
    package.load(models.pictures).save(tmp_path / "weights" / "demo")
    monkeypatch.setattr("vitok.checkpoint.resources.files", lambda _: tmp_path)
    rows = json.loads(vitok("models", "--json").out)
    assert [row["name"] for row in rows] == package.list_models() and rows[0]["name"] == "demo" and rows[0]["weights"]
    assert json.loads(vitok("models", "demo", "--json").out) == rows[:1]


def test_demo_that_is_not_bundled(vitok, nothing_bundled, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # `make demo` leaves a folder of that name in the repository
    picture = files.picture(tmp_path / "a.png")
    for arguments in (("models", "demo"), ("reconstruct", picture, "--out", tmp_path / "o")):
        result = vitok(*arguments)
        assert result.code == 2 and len(result.err.splitlines()) == 1 and "'demo'" in result.err
