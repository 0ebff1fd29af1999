"""Names are what was put in, whatever they are, in little more memory than their bytes."""

from __future__ import annotations

import pickle

import pytest

from vitok.data.names import Names

ODD = ["a/1.png", "", "größe/写真.jpg", "of no encoding \udcff.png", "line\nend", "a/1.png"]


def test_a_sequence_of_str():
    names = Names(ODD[:2])
    for name in ODD[2:]:
        names.append(name)
    assert list(names) == ODD == [names[i] for i in range(len(names))]
    assert names[-1] == ODD[-1] and names[1:4] == ODD[1:4] and names[::-2] == ODD[::-2]
    assert "line\nend" in names and names.index("") == 1 and "of" not in names
    assert list(pickle.loads(pickle.dumps(names))) == ODD
    assert list(Names()) == [] and not Names()
    for index in (6, -7):
        with pytest.raises(IndexError):
            names[index]


def test_little_memory():
    names = Names(f"class_{i % 100:02d}/{i:08d}.png" for i in range(10_000))
    assert names[9_999] == "class_99/00009999.png"
    assert len(pickle.dumps(names)) < 10_000 * (len(names[0]) + 8) + 1_000
