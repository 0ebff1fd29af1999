"""What `import vitok` brings along, and life without the compiled library."""

from __future__ import annotations

import vitok

OPTIONAL = "av triton yaml diffusers huggingface_hub timm scipy torchvision matplotlib rich click torch._dynamo"


def test_import_brings_nothing_optional(python):
    code = f"""
import sys, torch
before = set(sys.modules)
import vitok
roots = {OPTIONAL.split()!r}
print([name for name in roots if name in set(sys.modules) - before], vitok.__version__)
"""
    assert python(code) == f"[] {vitok.__version__}"


def test_works_with_optional_packages_missing(python):
    code = """
import sys
for name in ("av", "triton", "yaml", "scipy"):
    sys.modules[name] = None
import torch, vitok
model = vitok.create_model("Ti-Ti/16", channels=4, encoder_depth=1, decoder_depth=1)
posterior = model.encode(torch.zeros(1, 20, 30, 3, dtype=torch.uint8))
print(list(model.decode(posterior.mode(), size=(20, 30)).shape))
"""
    assert python(code) == "[1, 3, 20, 30]"


def test_works_without_the_native_library_and_says_why(python):
    code = """
import torch, vitok
torch.manual_seed(0)
model = vitok.create_model("Ti-Ti/16", channels=4, encoder_depth=1, decoder_depth=1)
posterior = model.encode(torch.arange(20 * 30 * 3).remainder(256).to(torch.uint8).view(1, 20, 30, 3))
assert model.decode(posterior.mode()).shape == (1, 3, 32, 32)
native = next(c for c in vitok.ops.choices() if c.op == "tubelet_embed" and c.implementation == "native")
assert all(c.usable for c in vitok.ops.choices() if c.implementation == "reference")
try:
    vitok.ops.tubelet_gather(torch.zeros(1, 1, 8, 8, 3), tubelet=(1, 8), impl="native")
except vitok.InputError as error:
    print(native.usable, "|", native.reason, "|", error)
"""
    usable, reason, error = python(code, VITOK_NATIVE="off").split(" | ")
    assert usable == "False" and reason == "VITOK_NATIVE=off in the environment"
    assert reason in error and "'native'" in error


def test_public_names():
    for name in vitok.__all__:
        assert getattr(vitok, name) is not None
    assert {"S-B/16", "S-B/4x8", "S-L/16", "Ti-Ti/16"} <= set(vitok.list_models())
