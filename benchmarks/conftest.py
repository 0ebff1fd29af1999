"""Every result file says what it was measured with."""

import torch

from vitok import _native


def pytest_benchmark_update_machine_info(config, machine_info):
    library = _native.library()
    machine_info.pop("node", None)  # the name of the machine is nobody's business
    machine_info["vitok"] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_isa": library.cpu_isa() if library else "reference path",
        "commit": _native.build_facts().get("commit", "unknown"),
    }
