"""The optimizers by name. apex cannot run here; a stand-in that takes its arguments and counts as it does can."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from vitok import InputError
from vitok.train.optimizer import make_optimizer, set_optimizer_step
from vitok.train.trainer import Trainer


class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), adam_w_mode=True, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})


def test_apex_is_asked_for_by_name(config, monkeypatch, one_sentence):
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    with pytest.raises(InputError) as error:
        Trainer(config(optimizer="apex"))
    one_sentence(error.value, "needs the package apex", "'torch'")
    with pytest.raises(InputError) as error:
        config(optimizer="sgd")
    one_sentence(error.value, "'optimizer' must be one of torch, apex")


def test_apex_where_it_is_installed(config, monkeypatch, one_sentence):
    apex, optimizers = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
    optimizers.FusedAdam = FusedAdam
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    with pytest.raises(InputError) as error:
        Trainer(config(optimizer="apex"))
    one_sentence(error.value, "works on GPUs", "cpu")
    with torch.device("meta"):
        model = torch.nn.Linear(2, 3)
    monkeypatch.setattr(torch.nn.Parameter, "device", torch.device("cuda"), raising=False)
    made = make_optimizer(config(optimizer="apex", betas=[0.8, 0.9], weight_decay=0.5), model)
    assert isinstance(made, FusedAdam)
    assert [group["weight_decay"] for group in made.param_groups] == [0.5, 0.0]
    assert made.param_groups[0]["betas"] == (0.8, 0.9)


def test_a_step_is_put_where_each_counts():
    p = torch.nn.Parameter(torch.ones(3))
    for optimizer in (FusedAdam([p]), torch.optim.AdamW([p], fused=True)):
        set_optimizer_step(optimizer, 7)
        assert torch.equal(optimizer.state[p]["exp_avg"], torch.zeros(3))
    assert "step" not in optimizer.param_groups[0] and optimizer.state[p]["step"] == 7
    p.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[p]["step"] == 8
    apex = FusedAdam([p])
    set_optimizer_step(apex, 7)
    assert apex.param_groups[0]["step"] == 7 and "step" not in apex.state[p]
