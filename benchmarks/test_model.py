"""encode and decode of whole models, one picture of 256 pixels at a time and eight."""

import pytest
import torch

import vitok

MODELS = {
    "demo": lambda: vitok.load("demo"),
    "S-B/16": lambda: vitok.create_model("S-B/16").eval(),
    "S-B/16 in bfloat16": lambda: vitok.create_model("S-B/16").eval().bfloat16(),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return request.param, MODELS[request.param]()


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("direction", ["encode", "decode"])
@torch.inference_mode()
def test_model(benchmark, model, batch, direction):
    name, tokenizer = model
    pixels = torch.randint(0, 256, (batch, 256, 256, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    latents = tokenizer.encode(pixels).mode()
    assert torch.isfinite(tokenizer.decode(latents)).all()
    benchmark.group = f"{direction} {batch} x 256 x 256"
    benchmark.extra_info["provider"] = name
    benchmark.extra_info["pictures"] = batch
    benchmark(*((tokenizer.encode, pixels) if direction == "encode" else (tokenizer.decode, latents)))
