"""Make vitok/ops/auto.json, the order in which "auto" tries implementations, from the rows of `vitok bench ops`:

    python benchmarks/auto.py

For every op, device and dtype: implementations by their time over all cases and both directions, fastest first. What
was not measured comes after what was, in the op's own order; the reference counts like any other. "compiled" names
what beat the compiler's version of the eager composition, for ops that are else left to the compiler.
"""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from pathlib import Path

from vitok.io.files import atomic_path
from vitok.ops._registry import OPS

RESULTS = Path(__file__).with_name("results")
TARGET = Path(__file__).resolve().parents[1] / "vitok" / "ops" / "auto.json"
# An implementation has to beat the op's own order by this much to change it; less is noise.
MARGIN = 1.03


def device_of(row: dict[str, str]) -> str:
    return f"cpu-{row['cpu_isa']}" if "cpu" in row["results_file"] else "cuda"


def table(rows: list[dict[str, str]]) -> dict[str, dict[str, dict[str, object]]]:
    times: dict[tuple[str, str], dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    date = {}
    for row in rows:
        if row["ms_p50"] and row["op"] in OPS:
            key = row["op"], f"{device_of(row)} {row['input_dtype']}"
            times[key][row["provider"]][f"{row['case']} {row['dtype']} {row['direction']}"] = float(row["ms_p50"])
            date[key] = row["date"]
    found: dict[str, dict[str, dict[str, object]]] = defaultdict(dict)
    for (op, device), providers in times.items():
        known = [name for name in OPS[op].implementations if name in providers]
        shared = set.intersection(*(set(providers[name]) for name in known)) if known else set()
        if len(known) < 2 or not shared:
            continue
        mean = {n: math.exp(sum(math.log(providers[n][c]) for c in shared) / len(shared)) for n in known}
        order = sorted(known, key=lambda n: mean[n] / (MARGIN if n == known[0] else 1.0))
        rest = [n for n in OPS[op].implementations if n not in order]
        fused = providers.get("torch.compile", {})
        compiled = {}
        if OPS[op].pointwise and shared <= set(fused):
            mean["torch.compile"] = math.exp(sum(math.log(fused[c]) for c in shared) / len(shared))
            # The compiler may fuse its own with the neighbours as well, so a tie is not enough.
            if mean["torch.compile"] > MARGIN * mean[order[0]]:
                compiled = {"compiled": order[0]}
        why = ", ".join(f"{n} {mean[n]:.3g} ms" for n in sorted(mean, key=mean.__getitem__))
        found[op][device] = {
            "order": order + rest,
            "why": f"{why} (geometric mean of {len(shared)} rows, {date[op, device]})",
            **compiled,
        }
    return dict(found)


def main() -> None:
    rows = []
    for path in sorted(RESULTS.glob("ops-*.csv")):
        with open(path, newline="") as file:
            rows += [row | {"results_file": path.name} for row in csv.DictReader(file)]
    with atomic_path(TARGET) as temporary:
        temporary.write_text(json.dumps(table(rows), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
