"""Turn a pytest-benchmark result file into a table: python benchmarks/report.py RESULT.json

Medians, and within each group the ratio to its fastest row, so the losing rows show by how much they lose.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path


def table(path: Path) -> str:
    """The result file as Markdown, with what it was measured on."""
    result = json.loads(path.read_text())
    machine, facts = result["machine_info"], result["machine_info"]["vitok"]
    groups = defaultdict(list)
    for row in result["benchmarks"]:
        groups[row["group"]].append((row["stats"]["median"], row["extra_info"]["provider"]))
    lines = ["| what | provider | median ms | against the fastest |", "|---|---|---|---|"]
    for group, rows in groups.items():
        fastest = min(rows)[0]
        lines += [f"| {group} | {name} | {1e3 * median:.3f} | {median / fastest:.2f}x |" for median, name in rows]
    lines.append("")
    cpu = machine["cpu"].get("brand_raw", machine["processor"])
    lines.append(
        f"{result['datetime'][:10]}, {cpu}, {facts['threads']} threads, {facts['cpu_isa']}, torch {facts['torch']}, "
        f"commit {facts['commit'][:12]}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
