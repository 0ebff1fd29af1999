"""A cache gives back what was written into it, in any order, in any process."""

from __future__ import annotations

import pickle
from itertools import chain

import pytest
import torch
from torch.utils.data import DataLoader

from vitok.bottlenecks import GaussianPosterior
from vitok.cache import LatentDataset, ShardSampler, Stats, sample_latents

KEYS = ("mean", "logvar", "flipped_mean", "flipped_logvar")


@pytest.mark.parametrize("shape", [(4, 3, 2), (4, 2, 3, 2)])
def test_random_access_gives_what_was_written(cache, shape):
    root, parts = cache(3, 4, 0, 2, shape=shape, dtype=torch.bfloat16)
    data = LatentDataset(root)
    assert len(data) == 9 and data.classes == ["class_0", "class_1", "class_2"]
    for i in (8, 0, 4, 3, 2, -1):
        item, part, row = data[i], *next((part, i % 9 - part.indices[0]) for part in parts if i % 9 in part.indices)
        for key in KEYS:
            assert item[key].equal(getattr(part, key)[row]) and item[key].dtype == torch.bfloat16
        assert (item["name"], item["label"], item["index"]) == (part.names[row], part.labels[row], part.indices[row])
        assert tuple(item["size"].tolist()) == part.sizes[row]
    for i in (9, -10):
        with pytest.raises(IndexError):
            data[i]


def test_without_variance_and_mirror(cache):
    root, (part,) = cache(2, gaussian=False, flip=False)
    data = LatentDataset(root)
    assert set(data[1]) == {"mean", "label", "index", "size", "name"}
    batch = next(iter(DataLoader(data, batch_size=2)))
    assert sample_latents(batch).equal(part.mean)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_it(cache, context):
    root, parts = cache(5, 6)
    data = LatentDataset(root)
    data[0]  # maps a file that the workers must not inherit
    workers = DataLoader(data, batch_size=4, num_workers=2, multiprocessing_context=context, timeout=300)
    batches = [*workers]
    assert [name for batch in batches for name in batch["name"]] == [name for part in parts for name in part.names]
    assert torch.cat([batch["mean"] for batch in batches]).equal(torch.cat([part.mean for part in parts]))
    assert batches[0]["label"].dtype == batches[0]["index"].dtype == torch.int64 and batches[0]["size"].shape == (4, 2)


def test_pickles_small_and_opens_files_late(cache):
    root, parts = cache(5)
    data = LatentDataset(root)
    data[0]
    again = pickle.loads(pickle.dumps(data))
    assert not again._open and again[3]["mean"].equal(parts[0].mean[3])


def test_items_are_memory_of_their_own(cache):
    root, parts = cache(3)
    data = LatentDataset(root)
    data[1]["mean"].zero_()
    assert data[1]["mean"].equal(parts[0].mean[1])
    assert data[1]["mean"].untyped_storage().nbytes() == 4 * data[1]["mean"].numel()


def test_posterior_samples(cache):
    root, (part,) = cache(6)
    batch = next(iter(DataLoader(LatentDataset(root), batch_size=6)))
    assert sample_latents(batch, seed=7).equal(part.draw())
    flip = torch.tensor([True, False] * 3)
    mixed = sample_latents(batch, seed=7, flip=flip)
    assert mixed[0::2].equal(part.draw_flipped()[0::2]) and mixed[1::2].equal(part.draw()[1::2])
    torch.manual_seed(0)
    first, second = sample_latents(batch), sample_latents(batch)
    torch.manual_seed(0)
    assert first.equal(sample_latents(batch)) and not first.equal(second)
    assert GaussianPosterior(part.mean, part.logvar).sample(7, torch.tensor(part.indices)).equal(part.draw())


def test_mirrored_samples_must_have_been_encoded(cache, one_sentence):
    root, _ = cache(2, flip=False)
    batch = next(iter(DataLoader(LatentDataset(root), batch_size=2)))
    with pytest.raises(ValueError) as error:
        sample_latents(batch, flip=torch.tensor([True, False]))
    one_sentence(error.value, "--flip")


def test_statistics_normalise(cache):
    root, parts = cache(40, shape=(4, 8, 8))
    stats = LatentDataset(root).stats
    drawn = parts[0].draw()
    normal = stats.normalize(drawn)  # the statistics are those of the distributions that are drawn from
    assert normal.mean((0, 2, 3)).abs().max() < 0.1 and (normal.std((0, 2, 3)) - 1).abs().max() < 0.1
    assert torch.allclose(stats.denormalize(normal), drawn, atol=1e-5)
    assert torch.allclose(stats.normalize(drawn.unsqueeze(2)).squeeze(2), normal)
    assert stats.scaling_factor == pytest.approx(1 / drawn.std().item(), rel=0.05)


def test_a_constant_channel_becomes_zero():
    stats = Stats(torch.tensor([2.0, 1.0]), torch.tensor([0.0, 2.0]), 1.0)
    latents = torch.tensor([2.0, 5.0]).view(1, 2, 1, 1)
    assert stats.normalize(latents).flatten().tolist() == [0, 2]
    assert stats.denormalize(stats.normalize(latents)).equal(latents)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("window", [1, 2, 9])
def test_each_sample_once_an_epoch(cache, ranks, window):
    data = LatentDataset(cache(7, 7, 0, 7, 3)[0])
    samplers = [ShardSampler(data, rank=rank, ranks=ranks, window=window) for rank in range(ranks)]
    orders = [[*sampler] for sampler in samplers]
    assert [len(order) for order in orders] == [len(sampler) for sampler in samplers]
    assert sorted(index for order in orders for index in order) == list(range(24))
    equal = [[*ShardSampler(data, rank=rank, ranks=ranks, window=window, drop_last=True)] for rank in range(ranks)]
    assert {len(order) for order in equal} == {24 // ranks} and len({*chain(*equal)}) == 24 // ranks * ranks


def test_order_follows_from_seed_and_epoch(cache):
    data = LatentDataset(cache(20, 20)[0])

    def order(seed, epoch, rank=0):
        sampler = ShardSampler(data, seed=seed, rank=rank, ranks=2)
        sampler.set_epoch(epoch)
        return [*sampler]

    assert order(3, 4) == order(3, 4)
    orders = [order(3, 4), order(3, 5), order(4, 4), order(3, 4, rank=1), list(range(20))]
    assert len(set(map(tuple, orders))) == 5


def test_a_rank_reads_a_window_of_files_at_a_time(cache):
    data = LatentDataset(cache(*[5] * 12)[0])
    order = torch.tensor([*ShardSampler(data, window=3)])
    for start in range(0, 60, 15):
        window = order[start : start + 15]
        assert len((window // 5).unique()) == 3 and not window.equal(window.sort().values)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [({"rank": 2, "ranks": 2}, "rank"), ({"seed": -1}, "seed"), ({"window": 0}, "window")],
)
def test_sampler_options(cache, one_sentence, options, wanted):
    data = LatentDataset(cache(2)[0])
    with pytest.raises(ValueError) as error:
        ShardSampler(data, **options)
    one_sentence(error.value, wanted)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def garble(path):
    path.write_bytes(b"\xff" * path.stat().st_size)


@pytest.mark.parametrize(
    ("file", "damage", "wanted"),
    [
        ("latents-00001.safetensors", lambda path: path.unlink(), "cannot be read"),
        ("latents-00001.safetensors", cut, "bytes and was written with"),
        ("latents-00001.safetensors", garble, "is damaged"),
        ("manifest/00001.json", lambda path: path.unlink(), "shard 1"),
        ("manifest/00001.json", garble, "shard 1"),
        ("manifest/00001.json", lambda path: path.write_text("[]"), "shard 1"),
        ("summary.json", lambda path: path.unlink(), "is not finished"),
        ("summary.json", garble, "is not finished"),
        ("manifest.json", lambda path: path.unlink(), "is no latent cache"),
        ("manifest.json", lambda path: path.write_text("{}"), "not the manifest"),
    ],
)
def test_damage_is_one_sentence(cache, one_sentence, file, damage, wanted):
    root, _ = cache(2, 2)
    damage(root / file)
    with pytest.raises(ValueError) as error:
        LatentDataset(root)[3]
    one_sentence(error.value, wanted, "cache")


def test_damage_after_opening(cache, one_sentence):
    root, _ = cache(2, 2)
    data = LatentDataset(root)
    cut(root / "latents-00001.safetensors")
    assert data[0]["index"] == 0
    with pytest.raises(ValueError) as error:
        data[2]
    one_sentence(error.value, "latents-00001.safetensors has", "vitok cache verify")


def test_other_formats_are_named(cache, one_sentence):
    root, _ = cache(2, format="webdataset")
    with pytest.raises(ValueError) as error:
        LatentDataset(root)
    one_sentence(error.value, "format webdataset", "safetensors")
