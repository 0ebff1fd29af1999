"""What a GPU machine is and how the package was built there: python benchmarks/machine.py FILE.json"""

import json
import platform
import subprocess
import sys
from pathlib import Path

import torch
import triton

import vitok
from vitok import _native


def main(target: Path) -> None:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv"]
    facts = {
        "gpu": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        "nvidia_smi": subprocess.run(query, capture_output=True, text=True).stdout.splitlines(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "vitok": vitok.__version__,
        "native": _native.reason() or "there",
        "build": _native.build_facts(),
    }
    target.write_text(json.dumps(facts, indent=1))
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
