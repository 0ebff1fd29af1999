import importlib.util
import os
import re
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_generated_tables_are_current():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for document in generate.DOCUMENTS:
        assert generate.generated(document.read_text()) == document.read_text(), f"{document.name}: run `make docs`"


DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text()):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_readme_names_the_two_commands_and_the_makefile_has_them():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in README and re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.long
def test_the_quick_start_runs_and_is_short(processes, tmp_path, monkeypatch):
    section = re.search(r"## Quick start\n(.*?)\nThe cache comes", README, re.DOTALL)[1]
    commands = re.findall(r"^    (vitok .*)$", section, re.MULTILINE)
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(commands) == 3 and len(section.strip().splitlines()) < 25
    examples = ROOT / "examples"
    shutil.copytree(examples / "photos", tmp_path / "PHOTOS")
    shutil.copy(examples / "clips" / "coffee_pan.mp4", tmp_path / "clip.mp4")
    shutil.copy(next((examples / "photos").glob("*.jpg")), tmp_path / "photo.jpg")
    path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    for command in commands:
        result = processes.run(["sh", "-c", command], cwd=tmp_path, env=os.environ | {"PATH": path})
        assert result.returncode == 0, result.stderr
    monkeypatch.chdir(tmp_path)
    names = {"pixels": torch.rand(1, 3, 64, 64) * 2 - 1}
    exec(code, names)
    assert names["pictures"].shape == (1, 3, 64, 64)
    photos = len(list((tmp_path / "PHOTOS").glob("*.*")))
    assert len(names["data"]) == photos and names["latents"].shape[1:] == (64, 16, 16) and len(names["labels"])
    assert names["latents"].std() < 3
