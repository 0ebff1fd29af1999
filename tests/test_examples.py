"""The examples in docstrings run and give what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import vitok

MODULES = [
    m.name for m in pkgutil.walk_packages(vitok.__path__, "vitok.") if m.name.startswith(("vitok.ops", "vitok.count"))
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    failed, tried = doctest.testmod(module, extraglobs={"torch": torch})
    assert failed == 0
    public = getattr(module, name.rpartition(".")[2], None)
    assert tried or not callable(public) or public.__module__ != name, f"{name} has no example"
