import signal
import sys
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import vitok as package
from vitok.cli import main
from vitok.io import ClipWriter, write_image

TINY = "Tiw64d1h1-Tiw64d1h1"
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Model directories: for pictures, the same with other weights, one of more channels, and one for clips."""
    folder = tmp_path_factory.mktemp("models")
    for seed, (name, tubelet, channels) in enumerate(
        (("pictures", "16", 32), ("retrained", "16", 32), ("wider", "16", 48), ("clips", "4x16", 32))
    ):
        torch.manual_seed(seed)
        package.create_model(f"{TINY}/{tubelet}", channels=channels).save(folder / name)
    return SimpleNamespace(**{path.name: path for path in folder.iterdir()})


@pytest.fixture
def vitok(capsys, monkeypatch):
    """vitok("info", "--json") runs the console script's entry point in this process: .code, .out, .err."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["vitok", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main()
        streams = capsys.readouterr()
        assert "Traceback" not in streams.out + streams.err
        return SimpleNamespace(code=exit.value.code or 0, out=streams.out, err=streams.err)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def files():
    """Makers of pictures and clips; test modules are no package that could import them."""
    return SimpleNamespace(picture=picture, clip=clip, pixels=pixels, size=size)


def pixels(height, width, frames=None, seed=0):
    """Smooth colours with a little noise: uint8 [H, W, 3], or [T, H, W, 3] of a clip that changes."""
    t = torch.arange(frames or 1).view(-1, 1, 1)
    y, x = torch.arange(height).view(1, -1, 1), torch.arange(width).view(1, 1, -1)
    parts = torch.broadcast_tensors(30 + y * 150 // height, x * 200 // width, 20 + t * 7 % 200)
    noise = torch.randint(0, 20, (frames or 1, height, width, 3), generator=torch.Generator().manual_seed(seed))
    result = (torch.stack(parts, -1) + noise).to(torch.uint8)
    return result if frames else result[0]


def picture(path, height=40, width=56, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, pixels(height, width, seed=seed))
    return path


def clip(path, frames=17, height=32, width=48, fps=24):
    path.parent.mkdir(parents=True, exist_ok=True)
    with ClipWriter(path, Fraction(fps)) as writer:
        writer.write(pixels(height, width, frames))
    return path


def size(path):
    """(width, height) of a picture file."""
    with Image.open(path) as image:
        return image.size
