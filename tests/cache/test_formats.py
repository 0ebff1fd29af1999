"""Each format is read the way its trainer reads it, in a few lines of our own."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vitok.bottlenecks import GaussianPosterior
from vitok.cache import FORMATS, Summary


def write(folder, files):
    for name, data in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        assert not path.exists()
        path.write_bytes(data)


def samples(parts):
    return [row for part in parts for row in zip(part.names, part.indices, part.labels, strict=True)]


def summary(*parts):
    drawn = torch.cat([part.draw() for part in parts]).float()
    mean, std = drawn.mean((0, 2, 3)), drawn.std((0, 2, 3))
    return Summary(samples(parts), ["class_0", "class_1", "class_2"], mean, std, True)


def test_drawn_samples_are_the_models_own(encoded):
    whole = encoded(6)
    posterior = GaussianPosterior(whole.mean, whole.logvar)
    assert whole.draw().equal(posterior.sample(7, torch.arange(6)))
    flipped = GaussianPosterior(whole.flipped_mean, whole.flipped_logvar)
    assert whole.draw_flipped().equal(flipped.sample(7, torch.arange(6)))
    assert not whole.draw().equal(dataclasses.replace(whole, seed=8).draw())


def test_drawn_samples_do_not_depend_on_shards(encoded):
    assert encoded(6).draw().equal(torch.cat([encoded(2).draw(), encoded(4, first=2).draw()]))


def test_deterministic_codes_are_drawn_as_they_are(encoded):
    part = encoded(gaussian=False)
    assert part.draw().equal(part.mean) and part.draw_flipped().equal(part.flipped_mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 3, 2), (4, 2, 3, 2)])
def test_safetensors(tmp_path, encoded, dtype, shape):
    part = encoded(first=2, shape=shape, dtype=dtype)
    write(tmp_path, FORMATS["safetensors"].shard(12, part))
    path = tmp_path / "latents-00012.safetensors"
    read = load_file(path)
    assert set(read) == {"mean", "logvar", "flipped_mean", "flipped_logvar", "label", "index", "size"}
    for name in ("mean", "logvar", "flipped_mean", "flipped_logvar"):
        assert read[name].dtype == dtype and read[name].equal(getattr(part, name))
    assert read["label"].tolist() == part.labels and read["label"].dtype == torch.int64
    assert read["index"].tolist() == part.indices
    assert read["size"].dtype == torch.int32 and [tuple(size) for size in read["size"].tolist()] == part.sizes
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "vitok-cache", "version": "1"}
        assert file.get_slice("mean")[3:4].equal(part.mean[3:4])


def test_safetensors_without_variance_and_mirror(tmp_path, encoded):
    write(tmp_path, FORMATS["safetensors"].shard(0, encoded(gaussian=False, flip=False, labels=False)))
    read = load_file(tmp_path / "latents-00000.safetensors")
    assert set(read) == {"mean", "label", "index", "size"} and set(read["label"].tolist()) == {-1}


@pytest.mark.parametrize("name", FORMATS)
def test_same_bytes_whenever_and_whoever(name, encoded, python, monkeypatch):
    part = encoded(pixels=torch.zeros(5, 3, 16, 16, dtype=torch.uint8))
    once = [*FORMATS[name].shard(3, part), *FORMATS[name].finish(summary(part))]
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert once == [*FORMATS[name].shard(3, part), *FORMATS[name].finish(summary(part))]
    assert all(type(data) is bytes for _, data in once)


@pytest.mark.parametrize("name", FORMATS)
def test_paths_stay_inside(name, encoded):
    part = encoded(pixels=torch.zeros(5, 3, 16, 16, dtype=torch.uint8))
    part = dataclasses.replace(part, names=["../../a", "/etc/passwd", "a/../../b", "..\\c", "x/./\x00/\ud800"])
    for path, _ in [*FORMATS[name].shard(3, part), *FORMATS[name].finish(summary(part))]:
        assert path.isprintable() and "\\" not in path and not {"", ".", ".."} & set(path.split("/"))
