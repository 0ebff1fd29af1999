"""How many samples a cache has does not show in the memory that filling it takes."""

from __future__ import annotations

import json
import sys

import pytest

from vitok.bench.cache_samples import write_pixels

LIMIT = 300.0  # seconds
ROOM = 25.0  # MB; names of as many samples take 2


@pytest.mark.long
def test_memory_is_flat_in_the_number_of_samples(processes, tmp_path):
    peaks = []
    for count in (8_192, 65_536):
        data = tmp_path / f"of {count}"
        write_pixels(data, count)
        arguments = [data, tmp_path / f"cache of {count}", "2"]
        result = processes.run([sys.executable, "-m", "vitok.bench.cache_samples", *arguments], limit=LIMIT)
        assert result.returncode == 0, result.stderr
        found = json.loads(result.stdout)
        assert found["pictures"] == count
        peaks.append(found["peak_mb"])
    print(peaks)
    assert peaks[1] < peaks[0] + ROOM
