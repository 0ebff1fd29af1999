"""What a run leaves to look at, and that a kill at any moment does not change it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from vitok import InputError
from vitok.count import count
from vitok.evaluate.metrics import to_uint8
from vitok.train import records
from vitok.train.records import Log, Pace, draw_curves, lacking
from vitok.train.trainer import Trainer

RUN = """
import json, os, signal, sys
import torch
from vitok.train.config import TrainConfig
from vitok.train.trainer import Trainer

fields, names, killed = json.loads(sys.argv[1])
torch.set_num_threads(1)

class Told(Trainer):
    def train_step(self, batch, step):
        if step == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        with open(names, "a") as file:
            file.write(json.dumps([step, batch.names]) + "\\n")
        return super().train_step(batch, step)

Told(TrainConfig.from_dict(fields)).run()
"""


@pytest.fixture
def process(tmp_path):
    """`process(config, killed=step)`: run it in a process of its own, which kills itself there; gives the exit status
    and what was trained on, as pairs of step and names, in that order."""

    def run(config, killed=None):
        told = tmp_path / "names.txt"
        told.unlink(missing_ok=True)
        arguments = json.dumps([config.__dict__, str(told), killed])
        status = subprocess.run([sys.executable, "-c", RUN, arguments], timeout=120).returncode
        return status, [json.loads(line) for line in told.read_text().splitlines()]

    return run


def test_killed_and_resumed_equals_uninterrupted(config, process, state_of, monkeypatch):
    """Weights, log and order of samples, with a kill after the checkpoint of step 10 and a row after that."""
    fields = {"steps": 20, "save_every": 10, "log_every": 3, "workers": 1, "latent_noise": 0.5}
    whole, parts = config("whole", **fields), config("parts", **fields)
    straight, step = [], Trainer.train_step

    def told(self, batch, number):
        straight.append([number, list(batch.names)])
        return step(self, batch, number)

    monkeypatch.setattr(Trainer, "train_step", told)
    Trainer(whole).run()
    log = Path(parts.out, "log.csv")
    status, first = process(parts, killed=14)
    assert status == -signal.SIGKILL and log.read_text().splitlines()[-1].startswith("12,")
    with open(log, "a") as file:
        file.write("15,0.06")  # as if the kill had come in the middle of a row
    status, second = process(parts)
    assert status == 0 and first == straight[:14] and second == straight[10:]
    assert log.read_bytes() == Path(whole.out, "log.csv").read_bytes()
    steps = [line.split(",")[0] for line in log.read_text().splitlines()]
    assert steps == ["step", "3", "6", "9", "12", "15", "18", "20"]
    a, b = state_of(whole), state_of(parts)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    for name in ("model/model.safetensors", "reconstructions/00000020.png"):
        assert Path(whole.out, name).read_bytes() == Path(parts.out, name).read_bytes()


def test_a_log_cut_anywhere_goes_on_as_if_it_were_whole(tmp_path):
    def write(log, steps):
        for step in steps:
            log.add(step, {"loss": 1 / step, "lr": 1e-4 * step})

    path = tmp_path / "log.csv"
    write(Log(path, 0), range(4, 13, 4))
    whole = path.read_bytes()
    assert whole == b"step,loss,lr\n4,0.25,0.0004\n8,0.125,0.0008\n12,0.0833333,0.0012\n"
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        done = 4 if end >= whole.index(b"8,0") else 0  # the row of a checkpoint's step is whole
        write(Log(path, done), range(done + 4, 13, 4))
        assert path.read_bytes() == whole, whole[:end]


def test_columns_may_grow(tmp_path):
    log = Log(tmp_path / "log.csv", 0)
    log.add(1, {"loss": 0.5})
    log.add(2, {"loss": 0.25, "adversarial": 3.0})
    Log(tmp_path / "log.csv", 2).add(3, {"loss": 0.125})
    assert (tmp_path / "log.csv").read_text() == "step,loss,adversarial\n1,0.5,\n2,0.25,3\n3,0.125,\n"


def test_a_log_of_before_the_first_checkpoint_does_not_count(tmp_path):
    Log(tmp_path / "log.csv", 0).add(1, {"loss": 0.5, "discriminator": 1.0})
    Log(tmp_path / "log.csv", 0).add(1, {"loss": 0.25})
    assert (tmp_path / "log.csv").read_text() == "step,loss\n1,0.25\n"


def test_rows_are_appended(tmp_path, one_sentence):
    path = tmp_path / "log.csv"
    log = Log(path, 0)
    log.add(1, {"loss": 0.5})
    before = path.stat()
    log.add(2, {"loss": 0.5})
    assert path.stat().st_ino == before.st_ino and path.stat().st_size > before.st_size
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError) as error:
        log.add(3, {"loss": 0.5})
    one_sentence(error.value, "cannot write", "log.csv")


def test_a_stop_between_rows_leaves_no_trace_in_the_log(config):
    whole, parts = config("whole", log_every=4), config("parts", log_every=4)
    Trainer(whole).run()
    first = Trainer(parts)
    first.run(lambda step, metrics: signal.raise_signal(signal.SIGTERM) if step == 3 else None)
    assert first.step < 6
    Trainer(parts).run()
    logs = [Path(run.out, "log.csv").read_text() for run in (whole, parts)]
    assert logs[0] == logs[1] and [row.split(",")[0] for row in logs[0].splitlines()] == ["step", "4", "6"]


def test_the_log_has_the_metrics_of_its_steps(config):
    told = {}
    run = Trainer(config(log_every=2))
    run.run(lambda step, metrics: told.__setitem__(step, metrics))
    header, *rows = [line.split(",") for line in Path(run.out, "log.csv").read_text().splitlines()]
    assert header == ["step", "loss", "pixel", "kl", "psnr", "grad_norm", "lr"]
    for row, step in zip(rows, (2, 4, 6), strict=True):
        assert [float(value) for value in row] == pytest.approx(
            [step, *(told[step][key] for key in header[1:])], rel=1e-5
        )


def test_looking_does_not_change_the_run(config, state_of):
    looked, blind = config("looked", sample_every=1, log_every=1), config("blind", sample_every=0, log_every=100)
    for settings in (looked, blind):
        Trainer(settings).run()
    a, b = state_of(looked), state_of(blind)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not Path(blind.out, "reconstructions").exists()
    Trainer(config("looked", steps=7, sample_every=5, log_every=3)).run()  # is the same run still


# --- reconstructions


def sizes_of(folder):
    return {path.name: Image.open(path).size for path in sorted(folder.iterdir())}


def test_sheets_show_the_same_samples_by_the_averaged_model(config, monkeypatch):
    pairs = []
    add = records.ContactSheet.add

    def told(self, original, reconstruction, caption):
        pairs.append((original, reconstruction, caption))
        add(self, original, reconstruction, caption)

    monkeypatch.setattr(records.ContactSheet, "add", told)
    run = Trainer(config(steps=5, sample_every=2))
    run.run()
    sizes = sizes_of(run.out / "reconstructions")
    assert list(sizes) == ["00000002.png", "00000004.png", "00000005.png"] and len(set(sizes.values())) == 1
    width, height = sizes["00000002.png"]
    assert 8 * 128 < width <= 8 * 128 + 160 and 2 * 128 < height < 4 * 128, "two rows of four pairs"
    first, second, third = (pairs[i : i + 8] for i in (0, 8, 16))
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[0], c[0])
    assert not all(torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))
    drawn = [run.data.first(2**33 + i, 1) for i in range(8)]
    assert all(torch.equal(sample.pixels[0], pair[0]) for sample, pair in zip(drawn, first, strict=True))
    assert len({sample.pixels.sum().item() for sample in drawn}) == 8
    original, reconstruction, caption = third[3]
    with torch.no_grad():
        mode = run.average.encode(original[None], layout="channels_last").mode()
        expected = to_uint8(run.average.decode(mode, size=(16, 16)))[0].movedim(0, -1)
    assert (expected.int() - reconstruction.int()).abs().max() <= 1
    error = (original.double() - reconstruction.double()).square().mean()
    number = f"{10 * torch.log10(255**2 / error).item():.2f} dB"
    assert caption == f"{number}\n{drawn[3].names[0]}"


def test_of_clips_the_first_and_the_last_frame_are_drawn(config, tmp_path):
    video = pytest.importorskip("vitok.io.video")
    pytest.importorskip("av")
    with video.ClipWriter(tmp_path / "films" / "film.mp4", 25) as writer:
        writer.write(torch.randint(0, 255, (12, 24, 32, 3), dtype=torch.uint8))
    run = Trainer(config(data=str(tmp_path / "films"), model="S-S/4x8", frames=6, steps=1))
    captions = []
    sheet = records.ContactSheet()
    sheet.add = lambda original, reconstruction, caption: captions.append((original.shape, caption))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "ContactSheet", lambda **options: sheet)
        patch.setattr(records, "write_image", lambda path, pixels: None)
        patch.setattr(sheet, "render", lambda: None)
        run.run()
    assert len(captions) == 16 and all(shape == (16, 16, 3) for shape, _ in captions)
    assert captions[0][1].endswith("\nfilm.mp4, first frame") and captions[1][1].endswith("\nfilm.mp4, last frame")
    clip = run.data.first(2**33, 1).clips
    assert run.reconstruct(clip).shape == clip.shape == (1, 6, 16, 16, 3)


def test_the_first_samples_of_a_step_do_not_depend_on_batch_or_rank(config):
    few, many = Trainer(config(batch=2)).data, Trainer(config(batch=8)).data
    assert torch.equal(few.first(5, 3).pixels, many[5].pixels[:3]) and few.first(5, 3).names == many[5].names[:3]


# --- TensorBoard and curves


@pytest.fixture
def tensorboard(monkeypatch):
    """A stand-in for the package; gives the calls of its writers."""
    calls = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            calls.append(("open", folder, purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def flush(self):
            calls.append(("flush",))

        def close(self):
            calls.append(("close",))

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return calls


@pytest.fixture
def without_tensorboard(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


def test_scalars_for_tensorboard(config, tensorboard):
    told = {}
    Trainer(config(steps=4, log_every=2)).run(lambda step, metrics: told.__setitem__(step, metrics))
    run = Trainer(config(steps=6, log_every=2))

    def fail(step: int, metrics: dict[str, float]) -> None:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        run.run(fail)
    folder = str(run.out / "tensorboard")
    opened = [call for call in tensorboard if call[0] in ("open", "close")]
    assert opened == [("open", folder, 1), ("close",), ("open", folder, 5), ("close",)], "closed whatever happens"
    scalars = [call for call in tensorboard if len(call) == 3 and call[0] != "open"]
    assert {name for name, _, _ in scalars} == {
        "loss", "pixel", "kl", "psnr", "grad_norm", "lr", "images_per_s", "operations_per_s", "data_wait",
    }  # fmt: skip
    assert [step for name, _, step in scalars if name == "psnr"] == [2, 4]
    assert all(value == told[step][name] for name, value, step in scalars)
    assert not any("TensorBoard" in sentence for sentence in lacking())


def test_without_tensorboard(config, without_tensorboard):
    run = Trainer(config(steps=1))
    run.run()
    assert Path(run.out, "log.csv").exists() and not Path(run.out, "tensorboard").exists()
    assert "TensorBoard: not installed (pip install tensorboard)" in lacking()


@pytest.mark.parametrize("rows", [1, 7, 900])
def test_curves(tmp_path, rows):
    figure = pytest.importorskip("matplotlib.figure")
    with open(tmp_path / "log.csv", "w") as file:
        file.write("step,loss,psnr,lr\n")
        file.writelines(f"{10 * i},{1 / i},{i % 3},{1e-4 * i}\n" for i in range(1, rows + 1))
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        save = figure.Figure.savefig
        patch.setattr(figure.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
        draw_curves(tmp_path)
    assert Image.open(tmp_path / "curves.png").size == (770, 660)
    loss, psnr, rate = drawn[0].axes
    assert [axes.get_ylabel() for axes in drawn[0].axes] == ["loss", "PSNR, dB", "learning rate"]
    assert loss.get_yscale() == "log" and ("mean of 3 rows" in rate.get_xlabel()) == (rows == 900)
    (line,) = psnr.lines
    assert len(line.get_xdata()) == min(rows, 300) and line.get_xdata()[-1] == 10 * rows
    assert list(line.get_ydata()) == ([1.0] * 300 if rows == 900 else [i % 3 for i in range(1, rows + 1)])


def test_curves_of_nothing_and_of_a_negative_loss(tmp_path):
    pytest.importorskip("matplotlib")
    draw_curves(tmp_path)
    assert not list(tmp_path.iterdir())
    Log(tmp_path / "log.csv", 0).add(1, {"loss": -3.0, "psnr": 3.0, "lr": 1.0})  # as log_l2 has it
    draw_curves(tmp_path)
    assert (tmp_path / "curves.png").exists()


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "find_spec", lambda name: None)
    Log(tmp_path / "log.csv", 0).add(1, {"loss": 3.0, "psnr": 3.0, "lr": 1.0})
    draw_curves(tmp_path)
    assert not (tmp_path / "curves.png").exists()
    assert "curves.png: matplotlib is not installed (pip install matplotlib)" in lacking()


# --- pace


def test_the_pace_is_that_of_the_last_steps():
    pace = Pace()
    assert pace.add(1.0, 3.0, images=8, operations=12.0) == {
        "images_per_s": 2.0, "operations_per_s": 3.0, "data_wait": 25.0,
    }  # fmt: skip
    for _ in range(300):
        found = pace.add(0.0, 2.0, images=16, operations=2.0)
    assert found == pytest.approx({"images_per_s": 8.0, "operations_per_s": 1.0, "data_wait": 0.0})


def test_operations_of_a_step(config, second_stage):
    run = Trainer(config())
    one = count(run.model.config, size=16)
    assert run.operations(1) == 6 * one.macs
    assert Trainer(second_stage("second")).operations(1) == 2 * one.encoder_macs + 6 * one.decoder_macs
    metrics = {}
    run.run(lambda step, found: metrics.update(found))
    ratio = metrics["operations_per_s"] / metrics["images_per_s"]
    assert ratio == pytest.approx(run.operations(1))
