"""Measurements in a CSV file that grows row by row, so that a run which is ended early loses only what it was at."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from vitok.io.files import atomic_path

KEY = ("case", "dtype", "direction")
"""The columns that name what a set of rows of ops, one a provider, was measured on."""

LOST = "the process could not go on after it: "
"""How `refused` begins for a provider after which nothing more could be measured in that process."""


class Rows:
    """The rows of one file, each set on disk as soon as it is added.

    Args:
        path: the CSV file; None keeps the rows in memory alone.
        columns: its header.
        facts: columns that are the same in every row: device, versions, commit, date.
        resume: keep the rows of the file whose facts, the date left out, are the same; else it is begun anew.
        key: the columns that name what a set of rows was measured on.
    """

    def __init__(
        self,
        path: Path | None,
        columns: Sequence[str],
        facts: Mapping[str, object],
        resume: bool = False,
        key: Sequence[str] = KEY,
    ) -> None:
        self.path, self.columns, self.key = path, tuple(columns), tuple(key)
        self.facts = {name: _text(value) for name, value in facts.items()}
        self.rows = self._read() if resume else []
        self._begun = False

    def of(self, key: Mapping[str, object]) -> list[dict[str, str]]:
        """The rows there are of one key."""
        return [row for row in self.rows if all(row[name] == str(key[name]) for name in self.key)]

    def complete(self, key: Mapping[str, object], providers: Sequence[str]) -> bool:
        """Whether every provider has a row."""
        return set(providers) <= {row["provider"] for row in self.of(key)}

    def lost(self, key: Mapping[str, object]) -> dict[str, str]:
        """{provider: reason} of those that are not to be tried again."""
        return {row["provider"]: row["refused"] for row in self.of(key) if _lost(row)}

    def replace(self, key: Mapping[str, object], rows: Sequence[Mapping[str, object]]) -> None:
        """The rows of one key; what an interrupted run left of them is dropped."""
        blank = dict.fromkeys(self.columns, "")
        old, new = self.of(key), [blank | {k: _text(v) for k, v in (dict(row) | self.facts).items()} for row in rows]
        if old:
            self.rows = [row for row in self.rows if row not in old]
        self.rows += new
        if self.path is None:
            return
        if old or not self._begun:
            with atomic_path(self.path) as temporary:
                temporary.write_bytes(self._lines(self.rows, header=True))
            self._begun = True
            return
        with open(self.path, "ab", buffering=0) as file:
            file.write(self._lines(new))
            os.fsync(file.fileno())

    def write_json(self) -> None:
        """The rows beside the CSV file as JSON, numbers as numbers."""
        if self.path is not None:
            with atomic_path(self.path.with_suffix(".json")) as temporary:
                rows = [{name: _number(value) for name, value in row.items() if value} for row in self.rows]
                temporary.write_text(json.dumps(rows, indent=1) + "\n")

    def _lines(self, rows: Sequence[Mapping[str, str]], header: bool = False) -> bytes:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()

    def _read(self) -> list[dict[str, str]]:
        if self.path is None or not self.path.exists():
            return []
        with open(self.path, newline="") as file:
            lines = [line for line in file if line.endswith("\n")]  # a process killed while writing leaves half a line
        found = csv.DictReader(lines)
        if tuple(found.fieldnames or ()) != self.columns:
            return []
        same = [name for name in self.facts if name != "date"]
        return [row for row in found if all(row[name] == self.facts[name] for name in same)]


def _lost(row: Mapping[str, str]) -> bool:
    return row["refused"].startswith(LOST)


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text
