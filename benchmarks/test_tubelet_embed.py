"""tubelet_embed of uint8 pictures: each implementation, and the float image + Conv3d that most code bases use."""

import pytest
import torch
from torch.nn import functional as F

from vitok import ops

BATCH, SIDE, PATCH, WIDTH = 8, 256, 16, 768


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (BATCH, 1, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
    weight = torch.randn(WIDTH, PATCH * PATCH * 3, generator=generator) / 28
    return pixels, weight, torch.zeros(WIDTH)


def through_ops(impl):
    return lambda pixels, weight, bias: ops.tubelet_embed(pixels, weight, bias, tubelet=(1, PATCH), impl=impl)


def through_conv3d(pixels, weight, bias):
    kernel = weight.view(WIDTH, 1, PATCH, PATCH, 3).permute(0, 4, 1, 2, 3)
    image = (pixels.float() / 127.5 - 1).permute(0, 4, 1, 2, 3)
    return F.conv3d(image, kernel, bias, stride=kernel.shape[2:]).flatten(2).transpose(1, 2)


PROVIDERS = {"native": through_ops("native"), "reference": through_ops("reference"), "conv3d": through_conv3d}


@pytest.mark.parametrize("provider", PROVIDERS)
@torch.inference_mode()
def test_tubelet_embed(benchmark, inputs, provider):
    # A provider that computes something else prints no time.
    expected = PROVIDERS["reference"](*inputs)
    torch.testing.assert_close(PROVIDERS[provider](*inputs), expected, rtol=1e-4, atol=1e-4)
    benchmark.group = f"tubelet_embed uint8 {BATCH}x{SIDE}x{SIDE}, width {WIDTH}"
    benchmark.extra_info["provider"] = provider
    benchmark(PROVIDERS[provider], *inputs)


@pytest.mark.parametrize("provider", ["native", "reference"])
@torch.inference_mode()
def test_tubelet_gather(benchmark, inputs, provider):
    pixels = inputs[0]
    assert torch.equal(*(ops.tubelet_gather(pixels, tubelet=(1, PATCH), impl=impl) for impl in (provider, "reference")))
    benchmark.group = f"tubelet_gather uint8 {BATCH}x{SIDE}x{SIDE} to float32"
    benchmark.extra_info["provider"] = provider
    benchmark(ops.tubelet_gather, pixels, tubelet=(1, PATCH), impl=provider)
