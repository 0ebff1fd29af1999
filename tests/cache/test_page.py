"""The code of docs/integrations/trainers.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import torch

PAGE = (Path(__file__).parents[2] / "docs" / "integrations" / "trainers.md").read_text()


def test_the_page_runs(cache, monkeypatch):
    root, parts = cache(5, 4, shape=(4, 2, 2))
    monkeypatch.chdir(root.parent)
    own, repa = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, object] = {}
    exec(own, names)
    assert names["latents"].shape == (1, 4, 2, 2)
    exec(repa, names)
    drawn = torch.cat([part.draw() for part in parts])
    normal = drawn * names["latents_scale"] + names["latents_bias"]
    assert torch.allclose(normal, names["data"].stats.normalize(drawn), atol=1e-5)


def test_the_page_names_all_formats():
    from vitok.cache import FORMATS

    assert re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE) == list(FORMATS)
