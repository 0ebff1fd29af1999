"""Two small cases of every op and implementation on the GPU, forward and backward, for compute-sanitizer to watch.

python tests/gpu/sanitized.py; results are not looked at, tests/gpu/test_bf16.py does that.
"""

import runpy
from pathlib import Path

import torch

SHARED = runpy.run_path(str(Path(__file__).parents[1] / "op_cases.py"))


def main(device: str = "cuda") -> None:
    for op, cases in SHARED["CASES"].items():
        for impl in ("native", "triton"):
            if SHARED["unavailable"](op, impl, device):
                continue
            for parameters in cases[:2]:
                SHARED["evaluate"](SHARED["sample"](op, torch.bfloat16, device, **parameters), impl)
            print(op, impl, flush=True)
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
