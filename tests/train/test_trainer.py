"""The training loop: it learns, stops when told, and goes on as if nothing had happened."""

from __future__ import annotations

import csv
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

import vitok
from vitok import InputError
from vitok.evaluate.pca import fit_pca
from vitok.evaluate.perceptual import VGGHED
from vitok.train import checkpoints
from vitok.train import trainer as trainer_module
from vitok.train.trainer import Trainer, learning_rate

LIMIT = 4096  # bytes, less than any checkpoint


@contextmanager
def disk_full() -> Iterator[None]:
    """Files may not grow beyond `LIMIT`."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def identical(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_goes_down(config, precision):
    losses, rates = [], []
    run = Trainer(config(steps=20, learning_rate=3e-3, warmup=2, precision=precision))
    run.run(lambda step, metrics: (losses.append(metrics["pixel"]), rates.append(metrics["lr"])))
    assert run.step == 20 == len(losses)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert max(rates) == pytest.approx(3e-3) and rates[-1] < 1e-4
    model = vitok.load(run.out / "model")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), run.average.parameters(), strict=True))
    assert not torch.equal(model.encoder.embed.weight, run.model.encoder.embed.weight), "exported weights are averaged"


def test_metrics_are_what_they_say(config):
    run = Trainer(config(beta=0.5))
    metrics = run.train_step(run.data[0], 0)
    assert metrics["loss"] == pytest.approx(metrics["pixel"] + 0.5 * metrics["kl"], rel=1e-5)
    assert metrics["lr"] == 0.5e-3 and metrics["grad_norm"] > 0
    with torch.no_grad():
        pixels = run.data[1].pixels
        target = pixels.float().movedim(-1, 1) * (2 / 255) - 1
        reconstruction, posterior = run.model(pixels, seed=1, layout="channels_last")
        mse = (reconstruction - target).square()
        expected = 10 * torch.log10(4 / (reconstruction.clamp(-1, 1) - target).square().mean((1, 2, 3))).mean()
    metrics = run.train_step(run.data[1], 1)
    assert metrics["pixel"] == pytest.approx(mse.mean().item(), rel=1e-5)
    assert metrics["kl"] == pytest.approx(posterior.kl().mean().item(), rel=1e-5)
    assert metrics["psnr"] == pytest.approx(expected.item(), rel=1e-5)


def test_learning_rate_ends():
    rates = [learning_rate(step, peak=2.0, warmup=10, steps=100) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == 2.0 and rates[55] == pytest.approx(1.0) and rates[100] == pytest.approx(0.0, abs=1e-12)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert learning_rate(0, peak=2.0, warmup=0, steps=5) == 2.0
    assert learning_rate(4, peak=2.0, warmup=9, steps=5) < 2.0


def test_matrices_decay_and_vectors_do_not(config):
    run = Trainer(config(weight_decay=0.5, learning_rate=1e-2))
    decay, plain = run.optimizer.param_groups
    assert decay["weight_decay"] == 0.5 and plain["weight_decay"] == 0.0
    assert all(p.dim() > 1 for p in decay["params"]) and all(p.dim() <= 1 for p in plain["params"])
    assert sum(p.numel() for p in decay["params"] + plain["params"]) == run.parameters


def test_the_average_follows_the_weights(config):
    run = Trainer(config())
    before = {key: value.clone() for key, value in run.average.state_dict().items()}
    run.train_step(run.data[0], 5)
    decay = min(0.9, 6 / 15)
    for key, value in run.average.state_dict().items():
        expected = decay * before[key] + (1 - decay) * run.model.state_dict()[key]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def test_going_back_to_an_older_state_rewrites_the_log(config, tmp_path):
    settings = config(steps=4, save_every=2)
    Trainer(config(steps=2, save_every=2)).run()
    old = checkpoints.newest(Path(settings.out))
    shutil.copytree(old, tmp_path / "old")
    for _ in range(2):
        shutil.rmtree(checkpoints.newest(Path(settings.out)))
        shutil.copytree(tmp_path / "old", old)
        Trainer(settings).run()
    rows = list(csv.DictReader((Path(settings.out) / "log.csv").open()))
    assert [int(row["step"]) for row in rows] == [2, 4]


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(config, signal_number, state_of):
    whole, parts = config("whole"), config("parts")
    Trainer(whole).run()
    handler = signal.getsignal(signal_number)
    first = Trainer(parts)
    first.run(lambda step, metrics: os.kill(os.getpid(), signal_number) if step == 3 else None)
    assert 3 <= first.step < 6 and signal.getsignal(signal_number) == handler
    assert vitok.load(first.out / "model").config == first.model.config
    again = Trainer(parts)
    assert again.step == first.step
    again.run()
    assert identical(state_of(parts), state_of(whole))
    assert (first.out / "log.csv").read_text().splitlines()[-1] == (
        Path(whole.out) / "log.csv"
    ).read_text().splitlines()[-1]


def test_a_longer_run_goes_on_from_a_shorter_one(config):
    Trainer(config(steps=2)).run()
    more = Trainer(config(steps=4, log_every=1))
    assert more.step == 2
    more.run()
    assert more.step == 4
    rows = list(csv.DictReader((more.out / "log.csv").open()))
    assert [int(row["step"]) for row in rows] == [2, 3, 4] and float(rows[-1]["loss"]) > 0
    finished = Trainer(config(steps=4))
    finished.run(lambda step, metrics: pytest.fail("there is nothing left to do"))


@pytest.mark.parametrize("save_every", [2, 100], ids=["stale", "missing"])
def test_a_run_that_ended_after_its_last_checkpoint_exports_when_started_again(config, monkeypatch, save_every):
    whole, cut = (config(name, steps=4, save_every=save_every) for name in ("whole", "cut"))
    Trainer(whole).run()
    run, save = Trainer(cut), vitok.ViTok.save

    def fail(model: vitok.ViTok, path: Path) -> None:
        if run.step == 4:
            raise RuntimeError("power cut")
        save(model, path)

    monkeypatch.setattr(vitok.ViTok, "save", fail)
    with pytest.raises(RuntimeError):
        run.run()
    assert checkpoints.newest(run.out).name == "state-00000004"
    monkeypatch.undo()
    Trainer(cut).run(lambda step, metrics: pytest.fail("there is nothing left to do"))
    for name in ("model/model.safetensors", "model/config.json", "reconstructions/00000004.png"):
        assert (run.out / name).read_bytes() == (Path(whole.out) / name).read_bytes()


def test_a_crash_between_checkpoints_repeats_the_lost_steps(config, state_of):
    whole, parts = (config(name, save_every=2, log_every=1) for name in ("whole", "parts"))
    Trainer(whole).run()

    def crash(step: int, metrics: dict[str, float]) -> None:
        if step == 5:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        Trainer(parts).run(crash)
    again = Trainer(parts)
    assert again.step == 4
    again.run()
    assert identical(state_of(parts), state_of(whole))
    logs = [(Path(c.out) / "log.csv").read_text() for c in (parts, whole)]
    assert logs[0] == logs[1]


def test_a_stop_request_to_the_whole_process_group_saves_too(config, tmp_path):
    """As batch systems and terminals send it: the processes that prepare batches get it as well."""
    settings = config(steps=100_000, workers=2)
    (tmp_path / "run.json").write_text(json.dumps({**settings.__dict__}))
    code = f"""
import json, os, signal
from vitok.train.config import TrainConfig
from vitok.train.trainer import Trainer
run = Trainer(TrainConfig.from_dict(json.load(open({str(tmp_path / "run.json")!r}))))
run.run(lambda step, metrics: os.killpg(0, signal.SIGTERM) if step == 3 else None)
print(run.step)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, start_new_session=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 10 and Trainer(settings).step == int(result.stdout)


def test_init_pca_equals_pca(config, monkeypatch, sizes):
    monkeypatch.setattr(trainer_module, "PCA_CROPS", 1)
    settings = config(init="pca", overrides=sizes | {"final_norm": False, "pixel_bias": "element"})
    run = Trainer(settings)
    count = 256**2 // (4 * 16**2) + 1
    pca = fit_pca((run.data[2**32 + i].clips for i in range(count)), (1, 8), 48)
    picture = run.data[0].pixels
    for model in (run.model, run.average):
        model.eval()
        reconstruction = model.decode(model.encode(picture, layout="channels_last").mode(), size=(16, 16))
        torch.testing.assert_close(reconstruction, pca.reconstruct(picture[:, None], 4)[:, :, 0], rtol=0, atol=2e-5)


def test_several_pca_bases_start_a_decoder(config, monkeypatch):
    """Which codes these pictures, all of a kind, about as well as one; the encoder stays, the decoder learns."""
    monkeypatch.setattr(trainer_module, "PCA_CROPS", 16)
    sizes = {"encoder_width": 64, "encoder_heads": 2, "encoder_depth": 3, "decoder_width": 64, "decoder_heads": 2,
             "decoder_depth": 2, "norm": "rms", "pixel_bias": "element"}  # fmt: skip
    fields = {"init": "pca", "pca_bases": 2, "freeze_encoder": True, "overrides": sizes, "channels": 12, "steps": 2}
    shown = []

    def track(items, unit, label):
        for item in items:
            yield item
            shown.append(label)

    run = Trainer(config(**fields), track=track)
    assert {"PCA", "bases"} <= set(shown), "what takes minutes can be followed"
    start = {key: value.clone() for key, value in run.model.state_dict().items()}
    pca = fit_pca((run.data[2**32 + i].clips for i in range(16 * 256**2 // (4 * 16**2) + 1)), (1, 8), 12)
    pictures = torch.cat([run.data[2**32 + i].pixels for i in range(16)])

    def error(reconstruction):
        return (reconstruction - (pictures.movedim(-1, 1).float() * (2 / 255) - 1)).square().mean()

    with torch.no_grad():
        run.model.eval()
        own = run.model.decode(run.model.encode(pictures, layout="channels_last").mode(), size=(16, 16))
        assert error(own) < 1.1 * error(pca.reconstruct(pictures[:, None], 12)[:, :, 0])
    run.run()
    after = vitok.load(run.out / "model").state_dict()
    moved = {key for key, value in after.items() if not torch.equal(value, start[key])}
    assert moved and all(key.startswith("decoder.") for key in moved)


def test_init_pca_with_neighbours(config, monkeypatch, sizes):
    """Their decoders begin with less error, on pictures that the fit has not seen."""
    monkeypatch.setattr(trainer_module, "PCA_CROPS", 8)
    overrides = sizes | {"final_norm": False, "pixel_bias": "element", "qk_norm": True}

    def start_error(name, **fields):
        run = Trainer(config(init="pca", overrides=overrides, out=f"{name}-run", **fields))
        pictures = torch.cat([run.data[i].pixels for i in range(8)])
        with torch.no_grad():
            own = run.average.decode(run.average.encode(pictures, layout="channels_last").mode(), size=(16, 16))
        return (own - (pictures.movedim(-1, 1).float() * (2 / 255) - 1)).square().mean()

    assert start_error("fitted", pca_neighbours=64) < start_error("plain")


def test_no_steps_write_the_start(config, sizes):
    run = Trainer(config(steps=0, init="pca", overrides=sizes | {"final_norm": False, "pixel_bias": "element"}))
    start = {key: value.clone() for key, value in run.model.state_dict().items()}
    run.run()
    assert identical(vitok.load(run.out / "model").state_dict(), start)


def test_init_from_a_directory(config, tmp_path, sizes):
    source = vitok.create_model("S-S/8", channels=4, **sizes)
    source.save(tmp_path / "start")
    run = Trainer(config(init=str(tmp_path / "start")))
    for model in (run.model, run.average):
        assert identical(model.state_dict(), source.state_dict())


def test_init_from_another_kind_of_model(config, tmp_path, one_sentence, sizes):
    vitok.create_model("S-S/8", channels=5, **sizes).save(tmp_path / "start")
    for init, wanted in ((str(tmp_path / "start"), "another configuration"), ("pac", "'pac'")):
        with pytest.raises(InputError) as error:
            Trainer(config(init=init))
        one_sentence(error.value, wanted)


def test_init_pca_says_what_it_needs(config, one_sentence, monkeypatch):
    monkeypatch.setattr(trainer_module, "PCA_CROPS", 1)
    with pytest.raises(InputError) as error:
        Trainer(config(init="pca"))
    one_sentence(error.value, "init 'pca' needs final_norm false")


def test_a_run_of_another_configuration_is_not_continued(config, one_sentence):
    Trainer(config(steps=1)).run()
    with pytest.raises(InputError) as error:
        Trainer(config(learning_rate=5e-4))
    one_sentence(error.value, "holds a run with another configuration")
    assert Trainer(config(steps=9, save_every=3, workers=1)).step == 1, "these may change"


def test_a_run_goes_on_in_the_precision_that_it_began_with(config, monkeypatch, one_sentence):
    def on_a_machine(bf16: bool, precision: str = "auto") -> Trainer:
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: bf16)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
        return Trainer(config(steps=1, precision=precision))

    run = on_a_machine(bf16=True)
    assert run.dtype == torch.bfloat16
    run.run()
    for precision in ("auto", "bf16"):
        again = on_a_machine(False, precision)
        assert again.step == 1 and again.dtype == torch.bfloat16, "never another one in silence"
    with pytest.raises(InputError) as error:
        on_a_machine(True, "fp32")
    one_sentence(error.value, "holds a run in bf16", "'precision'", "got 'fp32'")


def test_damaged_checkpoints(config, one_sentence):
    settings = config(steps=1)
    Trainer(settings).run()
    path = checkpoints.newest(Path(settings.out))
    (weights,) = path.glob("*.safetensors")
    about = json.loads((path / "checkpoint.json").read_text())
    for file, content, words in (
        (weights, weights.read_bytes()[:1000], "is damaged or of another model"),
        (weights, save({"x": torch.zeros(1)}), "is damaged or of another model"),
        (path / "checkpoint.json", json.dumps(about | {"format": 99}).encode(), "has format 99"),
        (path / "checkpoint.json", b"{", "is no checkpoint"),
    ):
        good = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(InputError) as error:
            Trainer(settings)
        one_sentence(error.value, "cannot resume", str(path), words)
        file.write_bytes(good)
    assert Trainer(settings).step == 1


def test_a_full_disk_leaves_the_checkpoint_before(config, one_sentence, state_of):
    settings = config(steps=2, save_every=1)
    Trainer(config(steps=1)).run()
    before = state_of(settings)
    with disk_full(), pytest.raises(InputError) as error:
        Trainer(settings).run()
    one_sentence(error.value, "cannot write the checkpoint", "state-00000002", "File too large")
    assert identical(state_of(settings), before)
    again = Trainer(settings)
    assert again.step == 1
    again.run()
    assert [path.name for path in Path(settings.out).glob("state-*")] == ["state-00000002"]


def test_a_corrupt_picture_is_counted_and_told_once(config, pictures):
    (pictures / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    run, counts = Trainer(config(workers=1)), []
    run.run(lambda step, metrics: counts.append(metrics["skipped"]))
    assert run.step == 6 and counts[-1] == 1 and counts == sorted(counts)
    assert len(run.skipped) == 1 and "broken.jpg" in next(iter(run.skipped))


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable(config, pictures, one_sentence, workers):
    for path in pictures.iterdir():
        path.write_text("no picture")
    with pytest.raises(InputError) as error:
        Trainer(config(workers=workers)).run()
    one_sentence(error.value, "1000 samples drawn in a row cannot be read", ".png")


def test_waiting_for_data_is_told(config, monkeypatch):
    waits = []
    Trainer(config()).run(lambda step, metrics: waits.append(metrics["data_wait"]))
    assert all(0 < wait < 100 for wait in waits)
    clock = itertools.count(step=3)  # a batch takes as long as a step
    monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: next(clock))
    waits.clear()
    again = Trainer(config("again"))
    again.run(lambda step, metrics: waits.append(metrics["data_wait"]))
    assert waits == pytest.approx([50] * 6) and again.data_wait == pytest.approx(50)
    last = Trainer(config("last", steps=2))
    ticks = iter([0, 1000, 1001, 1001, 1002, 1005])  # the first batch takes long, as workers start
    monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: next(ticks))
    last.run()
    assert last.data_wait == pytest.approx(25)


def test_pictures_and_clips_in_turn(config, pictures, tmp_path):
    video = pytest.importorskip("vitok.io.video")
    pytest.importorskip("av")
    with video.ClipWriter(tmp_path / "films" / "film.mp4", 25) as writer:
        writer.write(torch.randint(0, 255, (1, 24, 32, 3), dtype=torch.uint8).expand(6, -1, -1, -1))
    data = [{"path": str(pictures)}, {"path": str(tmp_path / "films"), "weight": 2}]
    settings = config(data=data, model="S-S/4x8", frames=4, steps=4)
    run = Trainer(settings)
    assert {run.data[step].pixels.dim() for step in range(4)} == {4, 5}
    run.run()
    assert run.step == 4
    with pytest.raises(InputError, match="another configuration"):
        Trainer(config(data=[data[0], data[1] | {"weight": 1}], model="S-S/4x8", frames=4, steps=4))


def test_unusable_folders_and_models(config, tmp_path, one_sentence):
    (tmp_path / "file").write_text("")
    for fields, wanted in (
        ({"data": str(tmp_path / "nothing")}, "holds no readable picture"),
        ({"model": "S-X/8"}, "unknown size 'X'"),
        ({"overrides": {"norm": "batch"}}, "'norm' must be one of"),
    ):
        with pytest.raises(InputError) as error:
            Trainer(config(**fields))
        one_sentence(error.value, wanted)
    with pytest.raises(InputError) as error:
        Trainer(config("file/run")).run()
    one_sentence(error.value, "cannot make the run directory")


def test_a_gradient_that_is_not_finite_ends_the_run_without_touching_the_weights(config, one_sentence):
    run = Trainer(config())
    with torch.no_grad():
        run.model.encoder.embed.weight[0, 0] = float("inf")
    before = run.model.decoder.unembed.weight.clone()
    batch = run.data[0]
    with pytest.raises(InputError) as error:
        run.train_step(batch, 4)
    saved = run.out / "failed"
    one_sentence(error.value, "not finite at step 5", "picture_", f"{saved} holds", "names in checkpoint.json")
    about = json.loads((saved / "checkpoint.json").read_text())
    assert about["names"] == list(batch.names) and about["step"] == 5
    assert torch.equal(run.model.decoder.unembed.weight, before)
    (file,) = saved.glob("*.safetensors")
    state = load_file(file)
    assert torch.equal(state["batch.0"], batch.pixels) and state["model.encoder.embed.weight"][0, 0] == float("inf")


def test_a_full_disk_does_not_hide_a_loss_that_is_not_finite(config, one_sentence):
    run = Trainer(config())
    with torch.no_grad():
        run.model.encoder.embed.weight[0, 0] = float("inf")
    with disk_full(), pytest.raises(InputError) as error:
        run.train_step(run.data[0], 4)
    one_sentence(error.value, "not finite at step 5", "File too large")


def test_a_discriminator_that_is_not_finite_ends_the_run_before_anything_moves(second_stage, one_sentence):
    run = Trainer(second_stage(adversarial_weight=0.0))
    before = run.model.decoder.unembed.weight.clone()
    run.adversary.register_forward_hook(lambda module, args, loss: loss * float("nan"))
    with pytest.raises(InputError) as error:
        run.train_step(run.data[0], 2)
    one_sentence(error.value, "not finite at step 3")
    assert torch.equal(run.model.decoder.unembed.weight, before)


# --- stage 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_second_stage_trains_the_decoder_alone(second_stage, precision):
    run = Trainer(second_stage(precision=precision))
    first = vitok.load(run.config.init)
    before = {key: value.clone() for key, value in run.adversary.state_dict().items()}
    run.run()
    for name, parameter in run.model.named_parameters():
        moved = not torch.equal(parameter, first.state_dict()[name])
        assert moved == name.startswith("decoder."), name
    assert all(not torch.equal(value, before[key]) for key, value in run.adversary.state_dict().items())
    exported = vitok.load(run.out / "model")
    assert identical(exported.encoder.state_dict(), first.encoder.state_dict())
    assert not identical(exported.decoder.state_dict(), run.model.decoder.state_dict()), "averaged"


@pytest.mark.parametrize("stage", [1, 2])
def test_the_loss_is_the_weighted_sum_of_its_parts(second_stage, vgg_hed, stage):
    run = Trainer(second_stage(stage=stage, beta=0.5, eta=2.0, adversarial_weight=3.0))
    batch = run.data[0]
    target = batch.pixels.float().movedim(-1, 1) / 127.5 - 1
    with torch.no_grad():
        fakes, _ = run.model(batch.pixels, seed=0, layout="channels_last")
        distance = VGGHED(vgg_hed)(fakes, target).mean().item()
        metrics = {}
        if stage == 2:
            metrics["adversarial"] = -run.adversary.discriminator(fakes).mean().item()
            metrics["discriminator"] = run.adversary(target, fakes).item()
    found = run.train_step(batch, 0)
    assert found["perceptual"] == pytest.approx(distance, rel=1e-4)
    for name, value in metrics.items():
        assert found[name] == pytest.approx(value, rel=1e-4)
    total = found["pixel"] + 0.5 * found["kl"] + 2 * distance + 3 * metrics.get("adversarial", 0)
    assert found["loss"] == pytest.approx(total, rel=1e-4)
    assert ("discriminator" in found) == (stage == 2)


def test_a_perceptual_loss_by_a_callable(config, one_sentence):
    seen = []

    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.append((a.shape, a.requires_grad, b.requires_grad, b.min().item() >= -1 and b.max().item() <= 1))
        return (a.mean((2, 3)) - b.mean((2, 3))).square().sum(1)

    batch = Trainer(config()).data[0]
    found = Trainer(config(eta=2.0, beta=0.0), perceptual=distance).train_step(batch, 0)
    assert seen == [((4, 3, 16, 16), True, False, True)]
    assert found["perceptual"] > 0
    assert found["loss"] == pytest.approx(found["pixel"] + 2 * found["perceptual"], rel=1e-5)
    one = Trainer(config(eta=2.0, beta=0.0), perceptual=lambda a, b: distance(a, b).mean()).train_step(batch, 0)
    assert one == pytest.approx(found, rel=1e-5), "one distance for the batch does as well"
    Trainer(config(steps=1), perceptual=distance).run()
    assert Trainer(config(steps=2), perceptual=distance).step == 1
    with pytest.raises(InputError) as error:
        Trainer(config(steps=2))
    one_sentence(error.value, "holds a run with another configuration")
    with pytest.raises(InputError) as error:
        Trainer(config(perceptual="vgg_hed"), perceptual=distance)
    one_sentence(error.value, "'perceptual' must be 'none' where a callable is given, got 'vgg_hed'")


def test_the_discriminator_learns_to_tell(second_stage):
    losses = []
    run = Trainer(second_stage(steps=40, learning_rate=0.0, perceptual="none", lecam_weight=0.0))
    run.run(lambda step, metrics: losses.append(metrics["discriminator"]))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_the_decoder_learns_from_the_discriminator(second_stage):
    last = {}
    for weight in (0.0, 5.0):
        changes = {"perceptual": "none", "adversarial_weight": weight, "discriminator_learning_rate": 0.0}
        run = Trainer(second_stage(f"run{weight}", steps=20, **changes))
        run.run(lambda step, metrics, weight=weight: last.__setitem__(weight, metrics["adversarial"]))
    assert last[5.0] < last[0.0] - 0.05


def test_a_batch_in_parts_is_the_batch_with_lecam_too(second_stage):
    changes = {"perceptual": "none", "lecam_weight": 10.0, "learning_rate": 1e-5, "discriminator_learning_rate": 1e-5}
    found = []
    for parts in (1, 2):
        run, losses = Trainer(second_stage(f"parts{parts}", accumulate=parts, **changes)), list[float]()
        run.run(lambda step, metrics, losses=losses: losses.append(metrics["discriminator"]))
        found.append([*losses, run.adversary.real_logit.item(), run.adversary.fake_logit.item()])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_the_discriminator_has_a_warm_up_of_its_own(second_stage):
    run = Trainer(second_stage(discriminator_warmup=4, discriminator_learning_rate=0.8, warmup=2, learning_rate=0.2))
    run.train_step(run.data[0], 0)
    assert {group["lr"] for group in run.adversary_optimizer.param_groups} == {0.2}
    assert {group["lr"] for group in run.optimizer.param_groups} == {0.1}


def test_a_second_stage_stopped_and_resumed_equals_an_uninterrupted_one_bit_for_bit(second_stage, state_of):
    whole, parts = second_stage("whole"), second_stage("parts")
    Trainer(whole).run()
    first = Trainer(parts)
    first.run(lambda step, metrics: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None)
    again = Trainer(parts)
    assert 3 <= again.step == first.step < 6
    again.run()
    assert identical(state_of(parts), state_of(whole))
    names = {key.split(".")[0] for key in state_of(whole)}
    assert names == {"model", "average", "adversary"}
    moments = {key for key in state_of(whole) if key.endswith(".exp_avg")}
    assert {key.split(".")[0] for key in moments} == {"model", "adversary"}
    logs = [(Path(c.out) / "log.csv").read_text().splitlines() for c in (parts, whole)]
    assert logs[0][-1] == logs[1][-1] and "discriminator" in logs[0][0]


def test_a_run_goes_on_when_perceptual_weights_have_moved(second_stage, vgg_hed, tmp_path):
    Trainer(second_stage(steps=1)).run()
    elsewhere = tmp_path / "elsewhere.safetensors"
    elsewhere.write_bytes(vgg_hed.read_bytes())
    assert Trainer(second_stage(perceptual_weights=str(elsewhere))).step == 1


def test_the_second_stage_needs_a_model(second_stage, tmp_path, one_sentence):
    with pytest.raises(InputError) as error:
        Trainer(second_stage(init=str(tmp_path / "nowhere")))
    one_sentence(error.value, "nowhere")
    with pytest.raises(InputError) as error:
        second_stage(init="random")
    one_sentence(error.value, "stage-1 model", "'init'")
