"""Latent caches through the command line: the same bytes however they were made, and nothing lost or doubled."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vitok as package
from vitok.cache import FORMATS, listing, store
from vitok.cache.store import STAGING, Store
from vitok.io import resize_and_crop
from vitok.io.images import read_image

PROGRAM = str(Path(sys.executable).with_name("vitok"))
COUNT = 22
LIMIT = 300.0  # seconds
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def photos(files, tmp_path):
    """Pictures of two classes, of sizes of their own."""
    for i in range(COUNT):
        files.picture(tmp_path / "photos" / ["cat", "dog"][i % 2] / f"{i:02d}.png", 34 + i, 40, i)
    return tmp_path / "photos"


@pytest.fixture
def options(models, photos, tmp_path):
    """`options(out, ...)`: the arguments that make a cache of the pictures in shards of four."""

    def make(out, *more, data=photos, model=models.pictures, format="safetensors"):
        given = ("--format", format, "--size", 32, "--shard", 4, "--batch", 3, "--device", "cpu", "--model", model)
        return [str(each) for each in ("encode", data, "--out", tmp_path / out, *given, *more)]

    return make


def contents(folder):
    """{path: bytes} of everything in a folder, empty folders too."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(Path(folder).rglob("*"))
    }


@pytest.fixture
def expected(vitok, options, tmp_path):
    """What an undisturbed run writes."""
    assert vitok(*options("expected", "--workers", 0)).code == 0
    return contents(tmp_path / "expected")


# --- what is in a cache


def test_a_cache_holds_what_the_model_makes_of_each_picture(vitok, options, models, photos, tmp_path):
    result = vitok(*options("c", "--workers", 0, "--flip"))
    assert result.code == 0 and result.out == f"{COUNT} encoded, cache in {tmp_path / 'c'}\n", result
    store, model = Store(tmp_path / "c"), package.load(models.pictures).for_inference(torch.float32)
    manifest = store.opened()
    assert manifest.shards == 6 and manifest.data["classes"] == ["cat", "dog"]
    assert package.ViTokConfig.from_dict(manifest.config).hash() == manifest.config_hash == model.config.hash()
    seen, means = [], []
    for number in range(manifest.shards):
        record = store.record(number)
        tensors = load_file(tmp_path / "c" / record.files[0].path)
        for place, sample in enumerate(record.samples):
            pixels = read_image(photos / sample.name).pixels
            assert sample.size == list(pixels.shape[:2]) == tensors["size"][place].tolist()
            assert manifest.data["classes"][sample.label] == sample.name.split("/")[0]
            assert tensors["label"][place] == sample.label and tensors["index"][place] == sample.index
            crop = resize_and_crop(pixels, 32)[None]
            for prefix, x in (("", crop), ("flipped_", crop.flip(2))):
                with torch.no_grad():
                    posterior = model.encode(x, layout="channels_last")
                torch.testing.assert_close(tensors[f"{prefix}mean"][place], posterior.mean[0], rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(tensors[f"{prefix}logvar"][place], posterior.logvar[0], rtol=1e-5, atol=1e-5)
            seen.append(sample.name)
            means.append((tensors["mean"][place].double(), tensors["logvar"][place].double().exp()))
    assert seen == sorted(p.relative_to(photos).as_posix() for p in photos.rglob("*.png"))
    facts = json.loads(vitok("cache", "stats", tmp_path / "c", "--json").out)
    mean, variance = (torch.stack(each).transpose(0, 1).flatten(1) for each in zip(*means, strict=True))
    std = (mean.var(1, correction=0) + variance.mean(1)).sqrt()
    torch.testing.assert_close(torch.tensor(facts["mean"]).double(), mean.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.tensor(facts["std"]).double(), std, rtol=1e-6, atol=1e-6)
    overall = (mean.var(correction=0) + variance.mean()).sqrt().item()
    assert facts["scaling_factor"] == pytest.approx(1 / overall) and facts["samples"] == COUNT
    result = vitok("cache", "stats", tmp_path / "c")
    assert result.code == 0 and "6 of 6 shards" in result.out and "scaling factor" in result.out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_latents_are_stored_in_the_dtype_asked_for(vitok, options, tmp_path, dtype):
    assert vitok(*options("c", "--workers", 0, "--latents-dtype", dtype, "--dtype", "bfloat16")).code == 0
    tensors = load_file(tmp_path / "c" / "latents-00000.safetensors")
    assert tensors["mean"].dtype == tensors["logvar"].dtype == getattr(torch, dtype)


def test_every_format_is_made_and_resumed(vitok, options, tmp_path):
    for name in FORMATS:
        arguments = options(name, "--workers", 0, "--flip", format=name)
        result = vitok(*arguments)
        assert result.code == 0, (name, result)
        whole = contents(tmp_path / name)
        assert vitok("cache", "verify", tmp_path / name).code == 0
        (tmp_path / name / "manifest" / "00003.json").unlink()
        assert vitok(*arguments).code == 0 and contents(tmp_path / name) == whole, name


def test_clips(vitok, options, models, files, tmp_path):
    pytest.importorskip("av")
    for i in range(3):
        files.clip(tmp_path / "films" / f"{i}.mp4", frames=(9, 3, 12)[i])
    for model, steps in ((models.clips, 2), (models.pictures, 8)):
        out = f"c{steps}"
        result = vitok(*options(out, "--workers", 0, "--frames", 8, data=tmp_path / "films", model=model))
        assert result.code == 2 and result.out.startswith("2 of 3 encoded") and "1.mp4 has 3 frames" in result.err
        tensors = load_file(tmp_path / out / "latents-00000.safetensors")
        assert tensors["mean"].shape == (2, 32, steps, 2, 2) and tensors["size"].tolist() == [[8, 32, 48]] * 2
        assert tensors["index"].tolist() == [0, 2] and tensors["label"].tolist() == [-1, -1]


def add(archive, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def test_tar_shards_with_classes_beside_the_pictures(vitok, options, photos, tmp_path):
    pictures = [path.read_bytes() for path in sorted(photos.rglob("*.png"))]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i, data in enumerate(pictures[:5]):
            add(archive, f"{i:03d}.png", data)
            add(archive, f"{i:03d}.cls", str(7 * i).encode())
        add(archive, "last.json", b'{"label": 3, "caption": "x"}')
        add(archive, "last.png", pictures[5])
        add(archive, "bare.png", pictures[6])
    assert vitok(*options("c", "--workers", 1, data=tmp_path / "a.tar")).code == 0
    samples = [s for record in Store(tmp_path / "c").records(Store(tmp_path / "c").opened()) for s in record.samples]
    assert [s.label for s in samples] == [0, 7, 14, 21, 28, 3, -1] and samples[5].name == "a.tar/last.png"
    assert vitok(*options("d", "--workers", 0, data=tmp_path / "?.tar")).code == 0
    assert contents(tmp_path / "d") == contents(tmp_path / "c")


def test_tricky_names_stay_inside(vitok, options, photos, tmp_path):
    data = next(photos.rglob("*.png")).read_bytes()
    tricky = [
        "../../evil.png",
        "/tmp/evil.png",
        "a/../../evil.png",
        "..\\evil.png",
        "C:\\evil.png",
        "a\nb.png",
        "a.png",
    ]
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "t.tar", "w") as archive:
        for name in tricky:
            add(archive, name, data)
            add(archive, f"{name[:-4]}.cls", b"../../evil")
    before = set(contents(tmp_path)) | {"deep", "deep/er"}
    for name in FORMATS:
        arguments = options(f"deep/er/{name}", "--workers", 0, "--flip", data=tmp_path / "in", format=name)
        result = vitok(*arguments)
        assert result.code == 0 or len(result.err.strip().splitlines()) == 1, (name, result)
        made = {path for path in set(contents(tmp_path)) - before if not path.startswith(f"deep/er/{name}")}
        assert not made, name
        before |= set(contents(tmp_path))


# --- the same bytes


def test_workers_and_ranks_write_the_same_bytes(vitok, options, torchrun, expected, tmp_path):
    for workers in (1, 2):
        assert vitok(*options(f"w{workers}", "--workers", workers)).code == 0
        assert contents(tmp_path / f"w{workers}") == expected
    result = torchrun("--no-python", PROGRAM, *options("ranks", "--workers", "1"))
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "ranks") == expected and result.stdout.count("encoded") == 1
    result = torchrun("--no-python", PROGRAM, *options("ranks", "--seed", "1"))
    assert result.returncode != 0 and result.stderr.count("made with seed 0 (here 1)") == 1, result.stderr


@pytest.fixture
def beside(processes, tmp_path):
    """`with beside(arguments) as (process, errors)`: the command, and the file of what it says on stderr."""

    @contextmanager
    def start(arguments):
        errors = tmp_path / "errors.txt"
        with (
            open(errors, "w") as file,
            processes.started([PROGRAM, *arguments], env=ONE_THREAD, stdout=subprocess.DEVNULL, stderr=file) as process,
        ):
            yield process, errors

    return start


def wait_until(condition, process):
    """Until it holds or the process has ended."""
    end = time.monotonic() + LIMIT
    while process.poll() is None and not condition():
        assert time.monotonic() < end, f"nothing has happened for {LIMIT:.0f} s"
        time.sleep(0.001)


def kill_at_random_moments(beside, arguments, folder, times, check):
    """Kill the command so often in the middle of its work; where it was done before, `check` it and begin anew.

    Returns how many shards were finished at each kill."""
    rng = random.Random(1)
    found = []
    for _ in range(3 * times):
        begun = time.time_ns()
        with beside(arguments) as (process, errors):
            wait_until(lambda since=begun: writing_since(folder / STAGING, since), process)
            time.sleep(0.005 * 100 ** rng.random())  # 5 ms to half a second, for slow machines and fast ones
            process.kill()
            process.wait(LIMIT)
            said = errors.read_text()
        assert "error" not in said, said
        if process.returncode == -signal.SIGKILL:
            found.append(len(list(folder.glob("manifest/*.json"))))
        if (folder / "summary.json").exists():
            check(folder)
            shutil.rmtree(folder)
        if len(found) == times:
            return found
    raise AssertionError(f"of {3 * times} runs only {len(found)} were killed in time")


def writing_since(staging, moment):
    try:
        return staging.stat().st_ctime_ns > moment
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.long)])
def test_a_run_killed_again_and_again_ends_like_one_that_was_not(vitok, beside, options, expected, tmp_path, times):
    arguments = options("killed", "--workers", "1")

    def check(folder):
        assert vitok(*arguments).code == 0
        assert contents(folder) == expected

    finished = kill_at_random_moments(beside, arguments, tmp_path / "killed", times, check)
    check(tmp_path / "killed")
    assert times < 20 or len(set(finished)) > 2, "the moments are spread over the work"


def test_a_stopped_run_cleans_up_and_goes_on(vitok, beside, options, expected, tmp_path):
    arguments = options("stopped", "--workers", "1")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # `expected` has left it ignored, which a child would inherit
    with beside(arguments) as (process, errors):
        wait_until((tmp_path / "stopped" / "manifest.json").exists, process)
        process.terminate()
        process.wait(LIMIT)
        said = errors.read_text()
    assert process.returncode == 128 + signal.SIGTERM and said.startswith("error: interrupted"), said
    assert not (tmp_path / "stopped" / STAGING).exists()
    assert vitok(*arguments).code == 0
    assert contents(tmp_path / "stopped") == expected


# A rank that kills itself in the middle of its work, when it is about to flush a file or folder for the n-th time.
KILLED_RANK = """
import os, signal, sys
from vitok.cli import main

rank, left, flush = sys.argv.pop(1), int(sys.argv.pop(1)), os.fsync
def counted(descriptor):
    global left
    left -= 1
    if os.environ["RANK"] == rank and left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    flush(descriptor)

os.fsync = counted
main()
"""


@pytest.mark.parametrize("rank, times", [(1, 1), *(pytest.param(rank, 3, marks=pytest.mark.long) for rank in (0, 1))])
def test_one_rank_of_two_killed(options, torchrun, expected, tmp_path, rank, times):
    (tmp_path / "killed.py").write_text(KILLED_RANK)
    arguments = options("ranks", "--workers", "1")
    for moment in random.Random(rank).sample(range(14), times):  # of the 15 that a rank has at least
        result = torchrun(str(tmp_path / "killed.py"), str(rank), str(moment), *arguments)
        assert result.returncode != 0 and "Signal 9" in result.stderr, (moment, result.stderr)
        assert not (tmp_path / "ranks" / "summary.json").exists()
        result = torchrun("--no-python", PROGRAM, *arguments)
        assert result.returncode == 0, (moment, result.stderr)
        assert contents(tmp_path / "ranks") == expected, moment
        shutil.rmtree(tmp_path / "ranks")


@pytest.mark.parametrize("workers, moments", [(0, [6]), (1, [6]), pytest.param(0, None, marks=pytest.mark.long)])
def test_a_full_disk_loses_nothing_that_is_finished(vitok, options, expected, tmp_path, monkeypatch, workers, moments):
    """At those calls that flush to it, or at all there are."""
    calls, fsync = [], os.fsync
    arguments, folder = options("full", "--workers", workers), tmp_path / "full"

    def run(room):
        def flush(descriptor):
            calls.append(descriptor)
            if len(calls) > room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        calls.clear()
        with monkeypatch.context() as patched:
            patched.setattr(store.os, "fsync", flush)
            return vitok(*arguments)

    if moments is None:
        assert run(1000).code == 0
        moments = range(len(calls) - 1)  # the last is of the folder of a cache that is whole, and may fail
    for moment in moments:
        shutil.rmtree(folder, ignore_errors=True)
        result = run(moment)
        assert result.code == 2 and len(result.err.splitlines()) == 1, (moment, result)
        assert "No space left on device; what is finished stays, and the same command goes on" in result.err
        assert not (folder / STAGING).exists() and not (folder / "summary.json").exists()
        finished = {path: data for path, data in contents(folder).items() if path.startswith("manifest/")}
        assert finished.items() <= expected.items() and (moment != 6 or 0 < len(finished) < 6)
        assert vitok(*arguments).code == 0
        assert contents(folder) == expected, moment


# --- going on and refusing


def test_resuming_opens_no_sample_and_redoes_what_was_lost(vitok, options, expected, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(listing, "read_image", lambda path: opened.append(path.name) or read_image(path))
    times = {path: (tmp_path / "expected" / path).stat().st_mtime_ns for path in expected}
    assert vitok(*options("expected", "--workers", 0)).code == 0
    assert not opened and times == {path: (tmp_path / "expected" / path).stat().st_mtime_ns for path in expected}
    (tmp_path / "expected" / "latents-00002.safetensors").unlink()
    (tmp_path / "expected" / "manifest" / "00004.json").write_text("{}")
    (tmp_path / "expected" / "summary.json").write_text("")
    assert vitok(*options("expected", "--workers", 0)).code == 0
    assert len(opened) == 8 and contents(tmp_path / "expected") == expected


def refused(result, *words):
    assert result.code == 2 and result.out == "" and len(result.err.splitlines()) == 1, result
    assert result.err.startswith("error: ") and all(word in result.err for word in words), result.err


def test_a_cache_made_otherwise_is_refused(vitok, options, models, photos, files, expected, tmp_path):
    refused(vitok(*options("expected", model=models.wider)), "made by a model of config")
    refused(vitok(*options("expected", model=models.retrained)), "made by a model of weights")
    refused(vitok(*options("expected", "--batch", 2)), "made with batch 3 (here 2)")
    refused(vitok(*options("expected", "--flip")), "made with flip False (here True)")
    refused(vitok(*options("expected", "--dtype", "bfloat16")), "made with arithmetic float32 (here bfloat16)")
    (photos / "cat" / "00.png").rename(photos / "cat" / "a.png")
    refused(vitok(*options("expected")), "made of a data set of other listing_hash")
    files.picture(photos / "cow" / "a.png")
    refused(vitok(*options("expected")), f"other samples: {COUNT} (here {COUNT + 1})")
    assert contents(tmp_path / "expected") == expected


def test_a_second_process_is_refused(vitok, options, expected, tmp_path):
    with Store(tmp_path / "expected").locked():
        refused(vitok(*options("expected")), "another process is writing the cache")
    assert contents(tmp_path / "expected") == expected
    assert vitok(*options("expected")).code == 0


@pytest.mark.parametrize(
    "change, words",
    [
        ({"data": "nowhere"}, "data set nowhere does not exist"),
        ({"data": "mixed"}, "holds pictures and tar shards"),
        ({"data": "empty"}, "holds no pictures, videos or tar shards"),
        ({"out": "photos/inside"}, "lies in the data set"),
        ({"out": "occupied"}, "holds other files, such as mine.txt"),
        ({"out": "occupied/mine.txt"}, "cannot write the cache"),
        ({"more": ("--engine", "ray")}, "pip install vitok[ray]"),
        ({"data": "hf:nobody/nothing"}, "pip install vitok[datasets]"),
    ],
)
def test_bad_input(vitok, options, photos, files, tmp_path, monkeypatch, change, words):
    for name in ("ray", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    files.picture(tmp_path / "mixed" / "a.png")
    (tmp_path / "mixed" / "a.tar").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "mine.txt").write_text("mine")
    data = change.get("data", photos)
    data = tmp_path / data if isinstance(data, str) and (tmp_path / data).exists() else data
    refused(vitok(*options(change.get("out", "c"), *change.get("more", ()), data=data)), words)
    assert (tmp_path / "occupied" / "mine.txt").read_text() == "mine"


def test_a_folder_that_is_refused_stays_as_it_is(vitok, options, expected, tmp_path):
    """With what lies there under the name that a cache in the making uses for itself."""
    for folder, more in (("occupied", ()), ("expected", ("--seed", 1))):
        (tmp_path / folder / STAGING).mkdir(parents=True)
        (tmp_path / folder / STAGING / "mine.txt").write_text("mine")
        (tmp_path / folder / "other.txt").write_text("mine")
        before = contents(tmp_path / folder)
        assert vitok(*options(folder, *more)).code == 2
        assert contents(tmp_path / folder) == before


def test_options_of_caches_need_a_format(vitok, photos, tmp_path):
    refused(vitok("encode", photos, "--out", tmp_path / "o", "--shard", 3), "--shard is of latent caches")
    refused(vitok("encode", photos, photos, "--out", tmp_path / "o", "--format", "npy"), "one data set, got 2")
    assert not (tmp_path / "o").exists()


def test_unreadable_samples_are_counted_and_told(vitok, options, photos, tmp_path):
    (photos / "cat" / "00.png").write_text("just words")
    for name in ("01", "03", "05", "07"):  # a whole shard and what follows
        (photos / "dog" / f"{name}.png").write_bytes(b"")
    for workers in (0, 2):
        result = vitok(*options(f"c{workers}", "--workers", workers))
        assert result.code == 2 and result.out.startswith(f"{COUNT - 5} of {COUNT} encoded"), result
        assert result.err.count("error: ") == 5 and "error: cat/00.png is not a picture" in result.err
        assert vitok("cache", "verify", tmp_path / f"c{workers}").code == 0
    assert contents(tmp_path / "c0") == contents(tmp_path / "c2")
    records = list(Store(tmp_path / "c0").records(Store(tmp_path / "c0").opened()))
    assert [each.index for each in records[0].unreadable] == [0] and len(records[0].samples) == 3
    assert vitok(*options("c0")).code == 2, "the same is said of a cache that stands"
    for path in photos.rglob("*.png"):
        path.write_bytes(b"")
    refused(vitok(*options("none", "--workers", 0)), "no sample of the data set can be read, such as this: cat/00.png")


# --- vitok cache


def test_verify_names_what_was_altered(vitok, options, expected, tmp_path):
    assert vitok("cache", "verify", tmp_path / "expected").out == "13 files as they were written\n"
    path = tmp_path / "expected" / "latents-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    (tmp_path / "expected" / "latents-00003.safetensors").unlink()
    record = tmp_path / "expected" / "manifest" / "00001.json"
    record.write_text(record.read_text().replace('"label": 0', '"label": 1'))
    result = vitok("cache", "verify", tmp_path / "expected")
    assert result.code == 2 and result.out == "10 of 13 files as they were written, 3 failed\n"
    first, second, third = result.err.splitlines()
    assert "latents-00002.safetensors has been altered" in first and "latents-00003.safetensors is missing" in second
    assert "00001.json has been altered" in third
    refused(vitok("cache", "verify", tmp_path), "is no latent cache: it has no manifest.json")
    (tmp_path / "expected" / "manifest.json").write_text('{"format": "x"}')
    refused(vitok("cache", "stats", tmp_path / "expected"), "is not the manifest of a latent cache")


def test_verify_and_merge_of_an_unfinished_cache(vitok, options, expected, tmp_path):
    (tmp_path / "expected" / "summary.json").unlink()
    result = vitok("cache", "verify", tmp_path / "expected")
    assert result.code == 2 and "is not finished" in result.err
    merging = ("cache", "merge", tmp_path / "expected", tmp_path / "expected", "--out", tmp_path / "m")
    refused(vitok(*merging), "is not finished")


def test_merge(vitok, options, photos, files, models, tmp_path):
    (photos / "cat" / "02.png").write_text("just words")
    files.picture(tmp_path / "more" / "ant" / "x.png")
    files.picture(tmp_path / "more" / "dog" / "y.png", seed=5)
    arguments = {"a": options("a"), "b": options("b", data=tmp_path / "more")}
    assert [vitok(*each).code for each in arguments.values()] == [2, 0]
    merging = ("cache", "merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "m")
    result = vitok(*merging)
    assert result.code == 0 and result.out.startswith(f"{COUNT + 1} samples"), result
    assert vitok("cache", "verify", tmp_path / "m").code == 0
    store = Store(tmp_path / "m")
    manifest = store.opened()
    samples = [s for record in store.records(manifest) for s in record.samples]
    assert manifest.data["classes"] == ["ant", "cat", "dog"] and manifest.data["samples"] == COUNT + 2
    assert [s.index for s in samples] == [i for i in range(COUNT + 2) if i != 1]
    assert all(manifest.data["classes"][s.label] == s.name.split("/")[0] for s in samples)
    last = load_file(tmp_path / "m" / "latents-00006.safetensors")
    assert last["index"].tolist() == [COUNT, COUNT + 1] and last["label"].tolist() == [0, 2]
    assert torch.equal(last["mean"], load_file(tmp_path / "b" / "latents-00000.safetensors")["mean"])
    whole = contents(tmp_path / "m")
    (tmp_path / "m" / "manifest" / "00001.json").unlink()
    assert vitok(*merging).code == 0 and contents(tmp_path / "m") == whole
    assert vitok(*options("other", model=models.retrained, data=tmp_path / "more")).code == 0
    merging = ("cache", "merge", tmp_path / "a", tmp_path / "other", "--out", tmp_path / "n")
    refused(vitok(*merging), "made by a model of weights")
    path = tmp_path / "a" / "latents-00001.safetensors"
    path.write_bytes(path.read_bytes() + b" ")
    result = vitok("cache", "merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "n")
    assert result.code == 2 and "latents-00001.safetensors has been altered" in result.err
    refused(vitok("cache", "merge", tmp_path / "a", "--out", tmp_path / "n"), "two caches or more")


def test_the_page_runs(photos, tmp_path, monkeypatch):
    page = Path(__file__).parents[2] / "docs" / "integrations" / "caches.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["found"].samples == COUNT and names["latents"].dim() == 3


# --- other packages


def test_a_hugging_face_data_set(vitok, options, photos, tmp_path):
    datasets = pytest.importorskip("datasets")
    paths = sorted(photos.rglob("*.png"))
    rows = {
        "image": [{"bytes": path.read_bytes(), "path": None} for path in paths],
        "label": [i % 2 for i in range(COUNT)],
    }
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["no", "yes"]))
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    assert vitok(*options("hf", "--workers", 1, data=tmp_path / "saved")).code == 0
    assert vitok(*options("folder", "--workers", 0)).code == 0
    for number in range(6):
        ours, theirs = (load_file(tmp_path / c / f"latents-{number:05d}.safetensors") for c in ("hf", "folder"))
        assert torch.equal(ours["mean"], theirs["mean"])
    assert Store(tmp_path / "hf").opened().data["classes"] == ["no", "yes"]


BUSY_CLUSTER = """
import ray
from vitok.cache import cluster
from vitok.cli import main

@ray.remote(num_cpus=1)
class Other:
    def works(self):
        return True

ray.init(num_cpus=1, log_to_driver=False)
other = Other.remote()
assert ray.get(other.works.remote())
cluster.PATIENCE = 3.0
main()
"""


@pytest.mark.long
def test_a_busy_ray_cluster_is_not_waited_for_without_end(processes, options, tmp_path):
    pytest.importorskip("ray")
    (tmp_path / "busy.py").write_text(BUSY_CLUSTER)
    result = processes.run([sys.executable, tmp_path / "busy.py", *options("ray", "--engine", "ray")])
    assert result.returncode == 2 and "the Ray cluster is busy: no CPU was free within 3 seconds" in result.stderr


@pytest.mark.long
def test_ray_writes_the_same_bytes(processes, options, expected, tmp_path):
    pytest.importorskip("ray")
    arguments = options("ray", "--engine", "ray", "--workers", "1")
    result = processes.run([PROGRAM, *arguments])
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "ray") == expected
