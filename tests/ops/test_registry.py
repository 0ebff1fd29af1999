"""How an implementation is chosen, and refused, by name."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vitok import ops
from vitok.ops._registry import OPS, Implementation, ImplementationError, Op


@pytest.fixture
def op():
    made = Op(
        "made_up",
        Implementation("absent", lambda x: "absent", missing="it is not built"),
        Implementation("picky", lambda x: "picky", refuses=lambda x: "" if x > 0 else f"{x} is not positive"),
        Implementation("reference", lambda x: "reference"),
    )
    yield made
    del OPS["made_up"]


def test_auto_takes_the_first_that_can(op):
    assert op("auto", 1) == "picky"
    assert op("auto", -1) == "reference"


def test_a_name_gives_that_one_or_the_reason_and_never_another(op, one_sentence):
    assert op("picky", 1) == "picky" and op("reference", 1) == "reference"
    for impl, argument, reason in (("absent", 1, "it is not built"), ("picky", -1, "-1 is not positive")):
        with pytest.raises(ImplementationError) as error:
            op(impl, argument)
        one_sentence(error.value, "made_up", repr(impl), reason)


def test_unknown_implementation(op, one_sentence):
    with pytest.raises(ImplementationError) as error:
        op("cuda", 1)
    one_sentence(error.value, "made_up has no implementation 'cuda'; it has absent, picky, reference")


def test_choices(op):
    made = [choice for choice in ops.choices() if choice.op == "made_up"]
    assert [dataclasses.astuple(choice)[1:] for choice in made] == [
        ("absent", False, "it is not built"), ("picky", True, ""), ("reference", True, ""),
    ]  # fmt: skip


def test_every_op_has_a_reference_that_is_always_usable_and_comes_last():
    rows = {op: [choice for choice in ops.choices() if choice.op == op] for op in OPS}
    assert {"attention", "gated_mlp_act", "norm", "qk_norm_rope", "tubelet_embed", "tubelet_unembed"} <= rows.keys()
    for choices in rows.values():
        assert choices[-1].implementation == "reference" and choices[-1].usable
        assert all(choice.usable is not bool(choice.reason) for choice in choices)


def test_what_was_measured_decides_the_order(op, monkeypatch):
    monkeypatch.setattr(op, "measured", {"cuda bfloat16": {"order": ["reference", "picky"], "why": "measured"}})
    assert [i.name for i in op._order(True, torch.bfloat16)] == ["reference", "picky"]
    assert [i.name for i in op._order(True, torch.float32)] == ["absent", "picky", "reference"]


def test_the_compiler_gets_the_reference_of_pointwise_ops_unless_another_was_measured_faster(op, monkeypatch):
    measured = {"order": ["picky", "reference"], "why": "measured"}
    monkeypatch.setattr(op, "measured", {"cuda bfloat16": measured | {"compiled": "picky"}, "cuda float32": measured})
    compiled = {dtype: op._compiled_order(True, dtype)[0].name for dtype in (torch.bfloat16, torch.float32)}
    assert compiled == {torch.bfloat16: "picky", torch.float32: "picky"}  # opaque to the compiler: as always
    monkeypatch.setattr(op, "pointwise", True)
    compiled = {dtype: op._compiled_order(True, dtype)[0].name for dtype in (torch.bfloat16, torch.float32)}
    assert compiled == {torch.bfloat16: "picky", torch.float32: "reference"}


def test_compiled_choices_follow_the_compiled_order(monkeypatch):
    names = []
    norm = OPS["norm"]
    reference = norm.implementations["reference"]
    spy = dataclasses.replace(reference, run=lambda *args: names.append("reference") or reference.run(*args))
    monkeypatch.setattr(norm, "compiled_orders", {kind: (spy,) for kind in norm.compiled_orders})
    torch.compiler.reset()
    compiled = torch.compile(lambda x: ops.norm(x, None, kind="rms", eps=0.0), backend="eager", fullgraph=True)
    assert compiled(torch.ones(2, 4)).equal(torch.ones(2, 4)) and names == ["reference"]


def test_an_implementation_put_first_by_the_environment(python):
    code = """
import torch
from vitok import ops
from vitok.ops._registry import OPS
print({name: op.orders[False, torch.float32][0].name for name, op in OPS.items()}["norm"])
"""
    assert python(code, VITOK_IMPL="reference") == "reference"
    failing = "try:\n    import vitok\nexcept ValueError as error: print(error)"
    message = python(failing, VITOK_IMPL="cuda")
    assert message.startswith("VITOK_IMPL is 'cuda' in the environment; it must be one of ")
