"""vitok bench: which rows it writes and when it refuses to. How long anything takes is nobody's business here."""

import csv
import itertools
import json
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vitok.bench import cache_samples, caching, peers, published, series
from vitok.bench import models as suites
from vitok.bench.machine import FACTS
from vitok.cli import Stopped
from vitok.errors import InputError
from vitok.model import ViTok

PICTURES, CLIPS = "Tiw64d1h1-Tiw64d1h1/16", "Tiw64d1h1-Tiw64d1h1/4x16"
QUICK = ("--seconds", "0", "--dtype", "float32", "--device", "cpu")
MODEL = ("bench", "model", PICTURES, "--size", "32", "--batch", "2", "--what", "encode", *QUICK)


SIDES = ("encoder", "decoder")


def rows(folder: Path, kind: str) -> list[dict[str, str]]:
    (path,) = folder.glob(f"{kind}-cpu*.csv")
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def timed(found: list[dict[str, str]]) -> list[str]:
    return [row["provider"] for row in found if row["ms_p50"]]


def generated(folder: Path, name: str) -> str:
    tables = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "generate.py"))["TABLES"]
    tables[name].__globals__["RESULTS"] = folder
    return tables[name]()


FAST = ViTok.for_inference


def no_fast_path(model, **_):
    raise InputError("this device cannot")


@pytest.fixture(autouse=True)
def nothing_slow(monkeypatch):
    monkeypatch.setattr(ViTok, "for_inference", no_fast_path, raising=False)
    monkeypatch.setattr(suites, "product", lambda *_: (lambda: None, 1))


def test_a_row_for_every_provider_size_and_task(vitok, tmp_path):
    what = "encode,decode,both,train"
    providers = f"reference,vitok,vitok fast bf16,{suites.LINEAR}"
    command = ("bench", "model", PICTURES, "--size", "40", "--batch", "1,2", "--what", what, "--providers", providers)
    result = vitok(*command, *QUICK, "--out", tmp_path)
    assert result.code == 0, result.err
    found = rows(tmp_path, "model")
    assert list(found[0]) == list(suites.COLUMNS) and len(found) == 2 * 4 * 4
    for row in found:
        assert row["device"] and row["threads"] and row["torch"] and row["commit"] and row["date"]
        if row["provider"] == "vitok fast bf16":
            assert row["refused"] == "skipped: this device cannot" and not row["ms_p50"]
        elif row["provider"] != suites.LINEAR:
            assert float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p95"])
            assert float(row["gflop"]) == pytest.approx(2 * float(row["gmac"]), rel=1e-3)
            assert row["images_per_s"] and row["tokens_per_s"] and row["mpixel_per_s"] and row["percent_of_matmul"]
            assert row["linear_share"]
    gmac = {
        row["what"]: float(row["gmac"]) for row in found if row["provider"] == suites.LINEAR and row["batch"] == "2"
    }
    assert gmac["train"] == pytest.approx(3 * gmac["both"], rel=1e-3) and gmac["both"] > 0
    stored = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert [(r["provider"], r["what"], str(r["batch"])) for r in stored] == [
        (r["provider"], r["what"], f"{r['batch']}.0") for r in found
    ]
    assert all(isinstance(r.get("ms_p50", 0.0), float) for r in stored)
    assert suites.LINEAR in result.out and "linear share" in result.out
    assert "skipped: this device cannot" in generated(tmp_path, "whole_models")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_wrong_numbers_have_no_time(vitok, tmp_path, monkeypatch):
    def wrong(work, dtype):
        coder = suites.plain(work, dtype)
        return replace(coder, encode=lambda pixels: coder.encode(pixels) * 1.001)

    monkeypatch.setitem(suites.PROVIDERS, "vitok", wrong)
    result = vitok(*MODEL, "--providers", "vitok,reference", "--out", tmp_path)
    assert result.code == 1
    assert timed(rows(tmp_path, "model")) == ["reference"]
    last = result.err.splitlines()[-1]
    assert "vitok: its numbers are not those of the reference: largest error" in last


@pytest.mark.parametrize(("change", "code"), [(-0.1, 0), (-0.2, 1)])
def test_8_bits_are_judged_by_what_the_demo_weights_lose(vitok, tmp_path, monkeypatch, change, code):
    monkeypatch.setattr(ViTok, "for_inference", lambda model, **_: model)
    monkeypatch.setattr(suites, "psnr_change", lambda *_: change)
    result = vitok(*MODEL, "--providers", "vitok fast int8", "--out", tmp_path)
    (row,) = rows(tmp_path, "model")
    assert result.code == code and bool(row["ms_p50"]) == (code == 0)
    assert code == 1 or float(row["psnr_change_db"]) == change
    assert code == 0 or row["refused"] == "it loses 0.20 dB on the demo weights, more than 0.15"


def test_psnr_change_is_of_the_demo_weights_on_photographs(monkeypatch, files, tmp_path):
    monkeypatch.setattr(ViTok, "for_inference", lambda model, **_: model)
    files.picture(tmp_path / "a.png", 64, 64)
    monkeypatch.setattr(suites, "load", lambda name, device: suites.create_model(PICTURES))
    through, psnr = [], iter((30.0, 28.0))

    def scored(folder, size, reconstruct):
        assert folder == tmp_path and size == 256
        through.append(reconstruct(torch.zeros(1, 64, 64, 3, dtype=torch.uint8)))
        return [SimpleNamespace(error=None, psnr=next(psnr))]

    monkeypatch.setattr(suites, "score_folder", scored)
    assert suites.psnr_change("int8", torch.device("cpu"), tmp_path) == -2.0  # each score of the second is 2 dB less
    with pytest.raises(InputError, match="--photos"):
        suites.psnr_change("int8", torch.device("cpu"), None)


PUBLISHED = "w64_d1_h2-w64_d2_h2/1x4x6"


def test_published_models_beside_their_plain_definition(vitok, tmp_path, monkeypatch):
    monkeypatch.setattr(ViTok, "for_inference", FAST)
    command = ("bench", "published", PUBLISHED, "--size", "16", "--batch", "1,2", "--device", "cpu", "--seconds", "0")
    result = vitok(*command, "--what", "load,encode,both", "--dtype", "bfloat16", "--out", tmp_path)
    assert result.code == 0, result.err
    found = rows(tmp_path, "published")
    assert list(found[0]) == list(published.COLUMNS)
    loads = [row for row in found if row["what"] == "load"]
    assert [row["provider"] for row in loads] == ["read", "load_vitok_v2", "vitok.load"]
    assert all(float(row["ratio_to_read"]) > 0 and float(row["file_mb"]) == 0.6358 for row in loads)
    speeds = [row for row in found if row["what"] != "load"]
    assert [(row["what"], row["batch"], row["provider"]) for row in speeds] == [
        (what, batch, provider) for batch in "12" for what in ("encode", "both") for provider in published.SPEEDS
    ]
    assert all(row["ms_p50"] and row["ratio_to_plain"] and row["commit"] for row in speeds)
    assert {row["ratio_to_plain"] for row in speeds if row["provider"] == "plain"} == {"1"}
    assert PUBLISHED in generated(tmp_path, "published")
    result = vitok("bench", "published", "350M", "--out", tmp_path)
    assert result.code == 2 and "unknown model '350M'" in result.err


@torch.no_grad()
def test_the_plain_definition_is_the_one_of_the_formulas():
    """Written once from first principles for the tests, once as one writes it with torch's functions."""
    formulas = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "plain_formulas.py")))
    work = published.Published(PUBLISHED, 16, 1, torch.device("cpu"))
    weights = {key: x.double() for key, x in work.weights.items()}
    pixels = torch.rand(2, 3, 11, 18, dtype=torch.float64) * 2 - 1
    codes = published.plain_encode(pixels, weights, work.config)
    part = {side: {k: x for k, x in weights.items() if k in published.v2_shapes(work.config)[side]} for side in SIDES}
    assert torch.allclose(codes, formulas.v2_encode(pixels, part["encoder"], 4, 2), atol=1e-9)
    decoded = published.plain_decode(codes, weights, work.config)
    assert torch.allclose(decoded, formulas.v2_decode(codes, part["decoder"], 4, 2), atol=1e-9) and decoded.std() > 0.1


def test_an_interrupted_run_keeps_its_rows(vitok, tmp_path, monkeypatch):
    command = ("bench", "model", PICTURES, "--size", "32", "--batch", "1,2,3", "--what", "encode", *QUICK)
    command = (*command, "--providers", "vitok", "--out", tmp_path)
    measure, done = suites.Models.measure, []

    def stopped(self, batch, what, rows):
        if batch == 3:
            raise Stopped(2)
        done.append(batch)
        measure(self, batch, what, rows)

    monkeypatch.setattr(suites.Models, "measure", stopped)
    result = vitok(*command)
    assert result.code == 130 and "interrupted" in result.err
    assert [row["batch"] for row in rows(tmp_path, "model")] == ["1", "2"]
    assert len(json.loads(next(tmp_path.glob("*.json")).read_text())) == 2
    monkeypatch.setattr(suites.Models, "measure", lambda *a: (done.append(a[1]), measure(*a)))
    assert vitok(*command, "--resume").code == 0
    assert done == [1, 2, 3] and [row["batch"] for row in rows(tmp_path, "model")] == ["1", "2", "3"]


class FakePeer(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 8, 8), nn.ConvTranspose2d(4, 3, 8, 8)

    def encode(self, pixels):
        return (self.down(pixels),)

    def decode(self, latents):
        return SimpleNamespace(sample=self.up(latents))


PEERS = ("bench", "peers", "--cases", "32", "--picture-model", PICTURES, *QUICK)


def test_peers_beside_ours(vitok, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: True)
    monkeypatch.setattr(peers, "library", lambda: None)
    broken = peers.Peer("broken", lambda d: 1 / 0)
    monkeypatch.setattr(peers, "PEERS", (peers.Peer("fake", lambda d: FakePeer()), broken))
    monkeypatch.setattr(peers, "CLOSE", 1e9)
    monkeypatch.setattr(peers, "FAR", 1e9)
    result = vitok(*PEERS, "--peers", "fake", "--out", tmp_path)
    assert result.code == 0, result.err
    found = rows(tmp_path, "peers")
    assert list(found[0]) == list(peers.COLUMNS) and set(FACTS) <= set(found[0])
    ours = [row for row in found if row["provider"] == "vitok"]
    assert [row["macs_ratio"] for row in ours] == ["1", "1"] and [row["time_ratio"] for row in ours] == ["1", "1"]
    fake = [row for row in found if row["provider"] == "fake"]
    assert len(fake) == 2 * 4 and {(row["dtype"], row["layout"]) for row in fake} == {
        (dtype, layout) for dtype in ("float32", "bfloat16") for layout in ("contiguous", "channels last")
    }
    assert all(float(row["gmac"]) == pytest.approx(16 * 4 * 192 / 1e9, rel=1e-3) for row in fake)
    assert "| fake |" in generated(tmp_path, "peers") and "| fake |" in generated(tmp_path, "speed")
    assert "| 1 x 32 x 32 | fake | encode |" in generated(tmp_path, "flop_claim")

    result = vitok(*PEERS, "--peers", "fake", "--limit", "0", "--out", tmp_path)
    assert result.code == 0 and "fake" not in timed(rows(tmp_path, "peers"))
    assert "skipped: it would take about" in result.out
    result = vitok(*PEERS, "--peers", "broken", "--out", tmp_path)
    assert result.code == 1 and "broken: division by zero" in result.err


def test_absent_peers_are_skipped_by_name(vitok, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    result = vitok(*PEERS, "--out", tmp_path)
    assert result.code == 0, result.err
    assert result.out.count("skipped: diffusers is not installed (pip install vitok[peers])") == 2  # encode, decode
    assert set(timed(rows(tmp_path, "peers"))) == {"vitok"}


def test_scale_stops_by_name(vitok, tmp_path):
    command = ("bench", "scale", "--picture-model", PICTURES, "--clip-model", CLIPS, "--providers", "vitok", *QUICK)
    result = vitok(*command, "--sizes", "48,32", "--frames", "1,4", "--limit", "0", "--out", tmp_path)
    assert result.code == 0, result.err
    found = rows(tmp_path, "scale")
    assert list(found[0]) == list(series.SCALE_COLUMNS)
    assert [(row["frames"], row["size"], bool(row["ms_p50"])) for row in found] == [
        ("1", "32", True), ("1", "48", False), ("1", "128", True), ("4", "128", False),
    ]  # fmt: skip
    assert found[1]["refused"].startswith("skipped: it would take about") and "--limit 0" in found[1]["refused"]
    assert float(found[0]["ns_per_pixel"]) > 0 and "| ns a pixel |" in generated(tmp_path, "scale")


def test_packed(vitok, tmp_path, monkeypatch):
    monkeypatch.setattr(ViTok, "for_inference", FAST)
    assert vitok("bench", "packed", PICTURES, *QUICK, "--out", tmp_path).code == 0
    found = rows(tmp_path, "packed")
    assert [(row["path"], row["what"], row["provider"]) for row in found] == list(
        itertools.product(series.PATHS, ("encode", "decode"), series.PACKED)
    )
    assert sum(y * x for y, x in series.MIXED) == 8 * 16 * 16 == int(found[0]["tokens"])
    assert all(row["percent_of_uniform"] == "100" for row in found if row["provider"] == "uniform batch")


def test_cache(vitok, tmp_path, monkeypatch):
    monkeypatch.setattr(ViTok, "for_inference", FAST)
    monkeypatch.setattr(cache_samples, "SAMPLES", 80)
    command = ("bench", "cache", PICTURES, "--size", "32", "--batch", "2,3", "--pictures", "5", "--workers", "1")
    result = vitok(*command, *QUICK, "--out", tmp_path)
    assert result.code == 0, result.err
    found = rows(tmp_path, "cache")
    assert list(found[0]) == list(caching.COLUMNS)
    timed, many = found[:6], found[6:]
    assert [(row["batch"], row["provider"], row["workers"]) for row in timed] == [
        (batch, *provider) for batch in "23" for provider in zip(caching.PROVIDERS, ("", "1", "0"), strict=True)
    ]
    for row in timed:
        assert float(row["images_per_s"]) == pytest.approx(1e3 / float(row["ms_p50"]), rel=1e-2)
        assert (row["percent_of_encode"] == "100") == (row["provider"] == caching.ENCODE)
    assert [(row["provider"], row["pictures"]) for row in many] == [
        (cache_samples.FILL_PART, "10"), (cache_samples.FILL, "80"), (cache_samples.RESUME, "80"),
    ]  # fmt: skip
    assert all(float(row["seconds"]) > 0 and float(row["peak_mb"]) > 1 for row in many)


def test_ops(vitok, tmp_path):
    result = vitok("bench", "ops", "--case", "noise", *QUICK, "--out", tmp_path)
    assert result.code == 0, result.err
    assert {row["provider"] for row in rows(tmp_path, "ops")} >= {"randn", "reference"}


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("model", "--providers", "compile freesing"), "is unknown, the nearest is 'compile freezing'"),
        (("model", "--what", "encode,dekode"), "--what 'dekode' is unknown, the nearest is 'decode'"),
        (("model", "--batch", ","), "--batch is an empty list"),
        (("model", "--batch", "1,0"), "--batch must be a list such as it shows by default, got '1,0'"),
        (("model", "no-such-model"), "no-such-model"),
        (("model", "--device", "tpu"), "--device 'tpu' cannot be used"),
        (("peers", "--peers", "SD-VAE"), "the nearest is 'SD-VAE f8'"),
        (("peers", "--cases", "16x"), "--cases must be a list"),
        (("scale", "--sizes", ""), "--sizes is an empty list"),
        (("ops", "--case", "nothing of that name"), "is in the name of no case"),
        (("packed", "no-such-model"), "no-such-model"),
    ],
)  # fmt: skip
def test_bad_input(vitok, tmp_path, command, said):
    result = vitok("bench", *command, "--out", tmp_path / "o")
    assert result.code == 2 and said in result.err and result.err.count("\n") == 1, result.err
    assert not list(tmp_path.glob("o/*"))


def test_help_names_every_option(vitok):
    for name in ("model", "ops", "peers", "scale", "packed", "cache"):
        result = vitok("bench", name, "--help")
        assert result.code == 0 and "--out" in result.out and "--resume" in result.out
