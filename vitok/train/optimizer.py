"""AdamW in one kernel: torch's fused one, or apex's."""

from __future__ import annotations

import torch
from torch import nn

from vitok.errors import InputError
from vitok.train.config import TrainConfig


def make_optimizer(config: TrainConfig, module: nn.Module) -> torch.optim.Optimizer:
    """AdamW of the module's parameters that are trained; only matrices (and kernels) decay."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    matrices, vectors = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if config.optimizer == "torch":
        return torch.optim.AdamW(groups, betas=config.betas, fused=True)
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise InputError(f"optimizer 'apex' needs the package apex ({error}); choose 'torch' to do without") from error
    if parameters[0].device.type != "cuda":
        raise InputError(f"optimizer 'apex' works on GPUs, this run is on {parameters[0].device}; choose 'torch'")
    optimizer: torch.optim.Optimizer = FusedAdam(groups, betas=config.betas, adam_w_mode=True)
    return optimizer


def set_optimizer_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Give an optimizer that has made no step the state of one that has made so many, with moments to be filled in."""
    for group in optimizer.param_groups:
        if not isinstance(optimizer, torch.optim.AdamW):
            group["step"] = step  # where apex counts
        for parameter in group["params"]:
            state = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            if isinstance(optimizer, torch.optim.AdamW):
                state["step"] = torch.tensor(float(step), device=parameter.device)
            optimizer.state[parameter] = state
