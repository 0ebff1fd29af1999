"""Each format is read the way its trainer reads it, in a few lines of our own."""

from __future__ import annotations

import dataclasses
import json
import os
from glob import glob

import numpy as np
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


def test_lightningdit(tmp_path, encoded):
    parts = [encoded(3), encoded(4, first=3)]
    for number, part in enumerate(parts):
        write(tmp_path, FORMATS["lightningdit"].shard(number, part))
    write(tmp_path, FORMATS["lightningdit"].finish(summary(*parts)))
    # As its dataset: all safetensors files below the folder in the order of their names, slices of one sample,
    # normalised by what torch.load gives.
    paths = sorted(glob(os.path.join(tmp_path, "*.safetensors")))
    assert [os.path.basename(path) for path in paths] == [
        "latents_rank00_shard000.safetensors",
        "latents_rank00_shard001.safetensors",
    ]
    stats = torch.load(tmp_path / "latents_stats.pt", weights_only=True)
    assert stats["mean"].shape == stats["std"].shape == (1, 4, 1, 1) and stats["std"].dtype == torch.float32
    features, labels, mirrored = [], [], []
    for path in paths:
        with safe_open(path, framework="pt", device="cpu") as file:
            for i in range(file.get_slice("labels").get_shape()[0]):
                features.append((file.get_slice("latents")[i : i + 1] - stats["mean"]) / stats["std"])
                mirrored.append(file.get_slice("latents_flip")[i])
                labels.append(file.get_slice("labels")[i : i + 1].squeeze(0))
    features = torch.cat(features)
    assert features.mean((0, 2, 3)).abs().max() < 1e-6 and (features.std((0, 2, 3)) - 1).abs().max() < 1e-6
    assert torch.stack(labels).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert torch.stack(mirrored).equal(torch.cat([part.draw_flipped() for part in parts]))


def test_repa(tmp_path, encoded):
    pictures = torch.randint(256, (7, 3, 16, 8), dtype=torch.uint8)
    parts = [encoded(3, pixels=pictures[:3]), encoded(4, first=1998, pixels=pictures[3:])]
    for number, part in enumerate(parts):
        write(tmp_path, FORMATS["repa"].shard(number, part))
    write(tmp_path, FORMATS["repa"].finish(summary(*parts)))

    # As its dataset: files found by walking both folders, paired by their place among the sorted ones.
    def walk(folder):
        found = (os.path.relpath(os.path.join(root, f), folder) for root, _, files in os.walk(folder) for f in files)
        return sorted(path for path in found if path.endswith((".npy", ".png")))

    images, features = walk(tmp_path / "images"), walk(tmp_path / "vae-sd")
    assert len(images) == len(features) == 7
    assert features[0] == "00000/img-mean-std-00000000.npy" and features[-1] == "00002/img-mean-std-00002001.npy"
    labels = dict(json.loads((tmp_path / "vae-sd" / "dataset.json").read_bytes())["labels"])
    for i, (image, feature) in enumerate(zip(images, features, strict=True)):
        pixels, moments = np.load(tmp_path / "images" / image), np.load(tmp_path / "vae-sd" / feature)
        part, row = (parts[0], i) if i < 3 else (parts[1], i - 3)
        assert pixels.dtype == np.uint8 and torch.from_numpy(pixels).equal(pictures[i])
        mean, std = torch.from_numpy(moments)[None].chunk(2, dim=1)
        assert mean[0].equal(part.mean[row]) and labels[feature] == part.labels[row]
        assert torch.allclose(std[0], (0.5 * part.logvar[row]).exp())


def test_mar(tmp_path, encoded):
    part = encoded(12, labels=False, first=5)
    part = dataclasses.replace(part, labels=[2, 0, 10] * 4)
    write(tmp_path, FORMATS["mar"].shard(0, part))
    root = tmp_path / "moments"
    # As torchvision's DatasetFolder, from which its dataset derives: classes are the folders, sorted.
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    assert folders == ["00000", "00002", "00010"]
    found = sorted(os.path.join(at, file) for at, _, files in os.walk(root) for file in files if file.endswith(".npz"))
    assert len(found) == 12
    for row, (name, label) in enumerate(zip(part.names, part.labels, strict=True)):
        data = np.load(root / f"{label:05d}" / f"{name}.npz")
        for key, mean, logvar in (
            ("moments", part.mean, part.logvar),
            ("moments_flip", part.flipped_mean, part.flipped_logvar),
        ):
            left, right = torch.from_numpy(data[key])[None].chunk(2, dim=1)
            assert left[0].equal(mean[row]) and right[0].equal(logvar[row]) and data[key].dtype == np.float32


def test_mar_keeps_different_names_apart(encoded):
    names = ["../a", "%2E%2E/a", "a\\b", "a%5Cb", "a//b", "a/%/b", "a/b", "é/ü.jpg"]
    part = dataclasses.replace(encoded(8), names=names, labels=[0] * 8)
    paths = [path for path, _ in FORMATS["mar"].shard(0, part)]
    assert len(set(paths)) == 8 and paths[-1] == "moments/00000/é/ü.jpg.npz"


def test_npy(tmp_path, encoded):
    parts = [encoded(3), encoded(2, first=11)]
    for number, part in enumerate(parts):
        write(tmp_path, FORMATS["npy"].shard(number, part))
    # As fast-DiT's dataset and loop: both folders sorted as texts and paired, batched, dimension 1 squeezed.
    names = [sorted(os.listdir(tmp_path / folder)) for folder in ("features", "labels")]
    assert names[0] == names[1] == ["0.npy", "1.npy", "11.npy", "12.npy", "2.npy"]
    x = torch.stack([torch.from_numpy(np.load(tmp_path / "features" / name)) for name in names[0]]).squeeze(dim=1)
    y = torch.stack([torch.from_numpy(np.load(tmp_path / "labels" / name)) for name in names[1]]).squeeze(dim=1)
    drawn = torch.cat([part.draw() for part in parts])
    assert x.equal(drawn[[0, 1, 3, 4, 2]]) and y.tolist() == [0, 1, 2, 0, 2]


@pytest.mark.parametrize("shape", [(4, 3, 2), (4, 2, 3, 2)])
def test_webdataset(tmp_path, encoded, shape):
    webdataset = pytest.importorskip("webdataset", reason="of the extra test")
    parts = [encoded(3, shape=shape), encoded(2, first=11, shape=shape, dtype=torch.bfloat16)]
    for number, part in enumerate(parts):
        write(tmp_path, FORMATS["webdataset"].shard(number, part))
    shards = f"{tmp_path}/latents-{{00000..00001}}.tar"
    samples = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode()
    rows = [*samples.to_tuple("npy", "flip.npy", "cls", "json", "__key__")]
    assert len(rows) == 5
    for i, (latents, mirrored, label, about, key) in enumerate(rows):
        part, row = (parts[0], i) if i < 3 else (parts[1], i - 3)
        assert torch.from_numpy(latents).equal(part.draw()[row].float())
        assert torch.from_numpy(mirrored).equal(part.draw_flipped()[row].float())
        assert label == part.labels[row] and key == f"{part.indices[row]:08d}"
        assert about == {
            "name": part.names[row],
            "index": part.indices[row],
            "label": label,
            "size": [*part.sizes[row]],
        }


def test_webdataset_without_classes(tmp_path, encoded):
    webdataset = pytest.importorskip("webdataset", reason="of the extra test")
    write(tmp_path, FORMATS["webdataset"].shard(0, encoded(2, labels=False, flip=False, gaussian=False)))
    samples = webdataset.WebDataset(str(tmp_path / "latents-00000.tar"), shardshuffle=False).decode()
    assert [set(sample) - {"__key__", "__url__", "__local_path__"} for sample in samples] == [{"npy", "json"}] * 2


@pytest.mark.parametrize(
    ("name", "fields", "wanted"),
    [
        ("mar", {"gaussian": False}, "safetensors, lightningdit, npy, webdataset"),
        ("repa", {"gaussian": False}, "safetensors, lightningdit, npy, webdataset"),
        ("lightningdit", {"flip": False}, "--flip"),
        ("mar", {"flip": False}, "--flip"),
        ("lightningdit", {"labels": False}, "class_0/picture_000.jpg has none"),
        ("repa", {"labels": False}, "safetensors, webdataset"),
        ("mar", {"labels": False}, "safetensors, webdataset"),
        ("npy", {"labels": False}, "one folder a class"),
        ("lightningdit", {"shape": (4, 2, 3, 2)}, "clips fit safetensors, webdataset"),
        ("npy", {"shape": (4, 2, 3, 2)}, "clips fit safetensors, webdataset"),
        ("repa", {}, "the pictures"),
        ("mar", {"names": ["a.jpg"] * 5, "labels": [0] * 5}, "two named a.jpg would be one file"),
    ],
)
def test_what_a_format_cannot_hold(encoded, one_sentence, name, fields, wanted):
    with pytest.raises(ValueError) as error:
        [*FORMATS[name].shard(0, encoded(**fields))]
    one_sentence(error.value, f"format {name}", wanted)
