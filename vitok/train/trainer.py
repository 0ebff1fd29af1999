"""The training loop: resumable at any step, everything random a function of (seed, step)."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitok import ops
from vitok.checkpoint import create_model, load
from vitok.count import count
from vitok.data.batches import Batch, Batches
from vitok.errors import InputError
from vitok.evaluate.metrics import to_uint8
from vitok.evaluate.pca import PCA_CROPS, fit_pca
from vitok.model import ViTok
from vitok.parallel import Ranks, averaging, local, replicated, sharded, whole
from vitok.train import checkpoints
from vitok.train.autoencoder import Autoencoder
from vitok.train.config import TrainConfig
from vitok.train.discriminator import Adversary, Discriminator
from vitok.train.init import Track, init_from_pca, untracked
from vitok.train.local_pca import count_components, count_flags, fit_local_pca, init_from_local_pca, matching
from vitok.train.losses import perceptual_loss, pixel_loss, predicted_frames, target_frames
from vitok.train.neighbours import fit_neighbours
from vitok.train.optimizer import make_optimizer, set_optimizer_step
from vitok.train.records import Pace, Records

MODEL, FAILED = "model", "failed"
CALLABLE = "a callable"
"""What stands for a perceptual loss that has no name."""
HOW = (
    "out", "steps", "workers", "save_every", "log_every", "sample_every", "perceptual_weights", "parallel",
    "accumulate", "checkpointing", "compile", "optimizer",
)  # fmt: skip
"""Fields that a run may go on with other values of: where and how long it is, how it is fed, computed and seen."""


class Trainer:
    """One run: `Trainer(config).run()` trains to the last step, from the run's checkpoint if it has one.

    Where there is a process group (torch.distributed) its ranks share each batch.

    Args:
        config: `perceptual` must be "none" where there is a callable.
        perceptual: a perceptual loss in place of those that have a name (`vitok.train.losses.perceptual_loss`), and
            weighted by `eta` like them. It maps two batches of pictures [B, 3, H, W], RGB in [-1, 1], float32 on
            `device`, to distances [B] or one for all of them, differentiable in the first; a network in it should be
            frozen and on the device. A run that began with one goes on only with one, the same if you give the same.
        track: shows how far the start of a new run is (`vitok.train.init.Track`).
    """

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device | str = "cpu",
        *,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
        track: Track = untracked,
    ) -> None:
        if perceptual is not None:
            if config.perceptual != "none":
                raise InputError(
                    f"training field 'perceptual' must be 'none' where a callable is given, got {config.perceptual!r}"
                )
            config = dataclasses.replace(config, perceptual=CALLABLE)
        self.config, self.device = config, torch.device(device)
        self.out = Path(config.out)
        self.ranks = Ranks.current()
        self.fsdp = config.parallel == "fsdp" and self.ranks.count > 1
        if config.batch % (self.ranks.count * config.accumulate):
            raise InputError(
                f"training field 'batch' must be a multiple of ranks x accumulate, {self.ranks.count} x "
                f"{config.accumulate}, got {config.batch}"
            )
        self.data = _batches(config, self.ranks)
        self.skipped = dict.fromkeys(self.data.skipped)
        torch.manual_seed(config.seed)
        found = checkpoints.newest(self.out)
        about = checkpoints.read_about(found) if found else {}
        kept = about.get("precision")
        self.precision: str = kept or _precision(config.precision, self.device, self.ranks)
        if found and about.get("run") != self._identity(kept or config.precision):
            raise InputError(f"{self.out} holds a run with another configuration; choose another `out` or remove it")
        if config.precision not in ("auto", self.precision):
            raise InputError(
                f"{self.out} holds a run in {kept}, which training field 'precision' must name or leave at auto, got "
                f"{config.precision!r}"
            )
        self.model = create_model(config.model, preset=config.preset, channels=config.channels, **config.overrides)
        if not found:
            self._start(track)
        self.model.to(self.device)
        self.average = copy.deepcopy(self.model).eval()
        self.frozen = config.freeze_encoder or config.stage == 2
        self.autoencoder = self._prepared(Autoencoder(self.model, self.frozen, config.latent_noise))
        self.averaged = Autoencoder(self.average)
        if self.fsdp:
            sharded(self.averaged, self.averaged.blocks)
        self.optimizer = make_optimizer(config, self.model)
        self.perceptual = perceptual
        if perceptual is None:
            network = perceptual_loss(config.perceptual, config.perceptual_weights)
            self.perceptual = None if network is None else network.to(self.device)
        self.adversary: Adversary | None = None
        if config.stage == 2:
            discriminator = Discriminator(config.crop, config.discriminator_width)
            self.adversary = Adversary(discriminator, config.lecam_weight).to(self.device)
            self.judging = replicated(self.adversary)
            self.adversary_optimizer = make_optimizer(config, self.adversary)
        self.weights = {
            "pixel": 1.0,
            "kl": config.beta,
            "perceptual": config.eta,
            "adversarial": config.adversarial_weight,
        }
        bf16 = self.precision == "bf16"
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)
        self.step, self.data_wait = 0, 0.0
        if found:
            self._resume(found, about["step"])

    def _prepared(self, autoencoder: Autoencoder) -> nn.Module:
        """Ready for training steps: recomputing, compiled and shared out as the configuration says."""
        if self.config.checkpointing:
            autoencoder.recompute()
        if self.config.compile:
            for block in autoencoder.blocks:
                block.compile(dynamic=False)
        if self.fsdp:
            return sharded(autoencoder, autoencoder.blocks)
        return replicated(autoencoder)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def run(self, on_step: Callable[[int, dict[str, float]], None] | None = None) -> None:
        """Train to the last step. A first SIGTERM or Ctrl-C, to any rank, saves a checkpoint and returns; the run can
        go on later.

        `on_step` gets the number of steps done and the metrics of `train_step`; over the last ten steps or so
        `images_per_s`, which counts the frames of clips, over all ranks, `operations_per_s` of each rank (`operations`)
        and `data_wait`, the percentage of the time spent waiting for batches; and `skipped`, the number of files that
        could not be read so far; the keys of the trainer's `skipped` say which. At the end the trainer's `data_wait` is
        the percentage over the whole run.
        """
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the run directory {self.out}: {error.strerror}") from error
        with Records(self.config, self.step, self.ranks.rank) as records, _stop_requests() as stopped:
            steps, pace = range(self.step, self.config.steps), Pace()
            if not steps:  # whatever ended the run after its last checkpoint may have kept these from being written
                self._export()
                records.show(self.step, self.data, self.reconstruct)
            batches = self.data.stream(steps, self.config.workers)
            for step in steps:
                begun = time.perf_counter()
                batch = next(batches)
                ready = time.perf_counter()
                own = self.train_step(batch, step)
                samples, frames = batch.clips.shape[:2]
                own |= pace.add(
                    ready - begun, time.perf_counter() - ready,
                    images=samples * frames * self.ranks.count, operations=samples * self.operations(frames),
                )  # fmt: skip
                told = {"stopped": float(stopped()), "skipped": float(len(batch.skipped))}
                metrics = self.ranks.mean(own | told, self.device)  # the same on all ranks, and so is what follows
                self.step = step + 1
                last = metrics.pop("stopped") > 0 or self.step == self.config.steps
                if metrics.pop("skipped"):
                    self.skipped.update(dict.fromkeys(self.ranks.gathered(batch.skipped)))
                records.add(self.step, metrics)
                if on_step:
                    on_step(self.step, metrics | {"skipped": len(self.skipped)})
                if last or self.step % self.config.save_every == 0:
                    self.save()
                records.show(self.step, self.data, self.reconstruct)
                if last:
                    break
            self.data_wait = self.ranks.mean({"data_wait": pace.data_wait}, self.device)["data_wait"]

    def train_step(self, batch: Batch, step: int) -> dict[str, float]:
        """One update on this rank's part of a batch of pictures or clips.

        Returns the loss, its parts before they are weighted, in stage 2 the discriminator's loss, PSNR of the batch
        (dB), the gradient's norm and the learning rate; but for the last two, means over this rank's part.
        """
        config = self.config
        self.autoencoder.train()
        target = batch.clips.to(self.device, non_blocking=True)
        first = self.ranks.rank * len(target)
        ids = torch.arange(first, first + len(target), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        if self.adversary is not None:
            self.adversary_optimizer.zero_grad(set_to_none=True)
        found: dict[str, Tensor] = {}
        pieces = list(zip(target.chunk(config.accumulate), ids.chunk(config.accumulate), strict=True))
        for number, (clips, sample_ids) in enumerate(pieces, 1):
            for name, value in self._backward(clips, sample_ids, step, now=number == len(pieces)).items():
                found[name] = found.get(name, 0) + value / len(pieces)
        metrics = {name: value.item() for name, value in found.items()}

        rate = learning_rate(step, config.learning_rate, config.warmup, config.steps)
        norm = self._clip(self.optimizer, rate, metrics["loss"], batch, step)
        if self.adversary is not None:
            its_rate = learning_rate(
                step, config.discriminator_learning_rate, config.discriminator_warmup, config.steps
            )
            self._clip(self.adversary_optimizer, its_rate, metrics["discriminator"], batch, step)
            self.adversary_optimizer.step()
            self.adversary.move_averages()
        self.optimizer.step()
        self._update_average(step)
        return metrics | {"grad_norm": norm, "lr": rate}

    def _backward(self, clips: Tensor, sample_ids: Tensor, step: int, now: bool) -> dict[str, Tensor]:
        """Add the gradients of some of a batch's clips, an `accumulate`-th of it, to those there are; the ranks average
        them `now`. Returns loss, parts and PSNR."""
        config, tubelet = self.config, self.model.config.tubelet
        seed = (config.seed << 32) + step
        with averaging(self.autoencoder, now):
            with self.autocast:
                patches, kl = self.autoencoder(clips, seed, sample_ids)
            parts = {"pixel": pixel_loss(patches, clips, tubelet, config.pixel_loss), "kl": kl.mean()}
            if self.perceptual is not None or self.adversary is not None:
                reals, fakes = target_frames(clips), predicted_frames(patches, tubelet, clips.shape[1:4])
            if self.perceptual is not None:
                with self.autocast:
                    parts["perceptual"] = self.perceptual(fakes, reals).float().mean()
            if self.adversary is not None:
                with self.autocast:
                    parts["adversarial"] = self.adversary.against(fakes)
            loss = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()
            (loss / config.accumulate).backward()
        found = {"loss": loss, **parts}
        if self.adversary is not None:
            with averaging(self.judging, now):
                with self.autocast:
                    found["discriminator"] = self.judging(reals, fakes)
                (found["discriminator"] / config.accumulate).backward()
        mse = ops.pixel_loss(patches.detach().clamp(-1, 1), clips, tubelet=tubelet, kind="l2")
        found["psnr"] = (10 * torch.log10(4 / mse.clamp(min=1e-10))).mean()
        return {name: value.detach() for name, value in found.items()}

    def _clip(self, optimizer: torch.optim.Optimizer, rate: float, loss: float, batch: Batch, step: int) -> float:
        """Clip the gradients for a step of `optimizer` at `rate`; returns their norm before.

        A loss or norm that is not finite ends the run, before anything has moved; what led there is saved.
        """
        for group in optimizer.param_groups:
            group["lr"] = rate
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = whole(nn.utils.clip_grad_norm_(parameters, self.config.grad_clip)).item()
        if not math.isfinite(norm + loss):
            found = f"the loss ({loss:g}) or its gradient ({norm:g}) is not finite at step {step + 1}"
            try:
                pixels = {f"batch.{self.ranks.rank}": batch.pixels}
                about = {"step": step + 1, "names": self.ranks.gathered(batch.names), **self._about()}
                checkpoints.write(self.out / FAILED, self._tensors() | pixels, about)
                kept = f"{self.out / FAILED} holds the state and this batch, its file names in {checkpoints.ABOUT}"
            except InputError as error:
                kept = str(error)
            raise InputError(f"{found}; lower learning_rate or check the data: {batch.listed()}; {kept}")
        return norm

    @torch.no_grad()
    def _update_average(self, step: int) -> None:
        decay = min(self.config.ema, (1 + step) / (10 + step))  # short memory at first, so that the start is forgotten
        means, values = ([local(p) for p in model.parameters()] for model in (self.average, self.model))
        torch._foreach_lerp_(means, values, 1 - decay)

    @torch.no_grad()
    def reconstruct(self, clips: Tensor) -> Tensor:
        """uint8 clips [B, T, H, W, 3] by the averaged model, from the posteriors' modes; all ranks take part."""
        with self.autocast:
            patches, _ = self.averaged(clips.to(self.device))
        frames = to_uint8(predicted_frames(patches, self.model.config.tubelet, clips.shape[1:4]))
        return frames.movedim(1, -1).reshape(clips.shape).cpu()

    def operations(self, frames: int) -> float:
        """Of the matrix products in a training step on one clip (1 frame: a picture), two for each multiply-accumulate.

        Backward has twice those of forward, of a frozen encoder none; what is computed again, the discriminator and the
        perceptual network are not counted.
        """
        one = count(self.model.config, size=self.config.crop, frames=frames)
        return 2.0 * ((1 if self.frozen else 3) * one.encoder_macs + 3 * one.decoder_macs)

    def save(self) -> None:
        """Write the checkpoint to resume from, then the averaged model."""
        checkpoints.write_step(self.out, self.step, self._tensors(), self._about())
        self._export()

    def _export(self) -> None:
        """Write the averaged model, from all ranks together."""
        weights = {key: whole(value).cpu() for key, value in self.average.state_dict().items()}
        if self.ranks.rank > 0:
            return
        with torch.device("meta"):
            exported = ViTok(self.model.config)
        exported.load_state_dict(weights, assign=True)
        exported.save(self.out / MODEL)

    def _start(self, track: Track) -> None:
        """Give the model the weights that a run begins with; the same on all ranks."""
        if self.config.init == "pca":
            self._start_from_pca(track)
        elif self.config.init != "random":
            start = load(self.config.init)
            if start.config.hash() != self.model.config.hash():
                raise InputError(
                    f"init {self.config.init!r} holds a model of another configuration than this run's: "
                    f"{start.config.differences(self.model.config)}; give the run the same or another init"
                )
            self.model.load_state_dict(start.state_dict())

    def _start_from_pca(self, track: Track) -> None:
        model, bases, data = self.model.config, self.config.pca_bases, _batches(self.config)

        def batch(number: int) -> Tensor:
            return data[2**32 + number].clips

        crops = PCA_CROPS * 256**2 // batch(0).shape[:-1].numel() + 1  # batches of as many pixels
        if bases == 1:
            seen = map(batch, track(range(crops), "batches", "PCA"))
            pca = fit_pca(seen, model.tubelet, min(model.encoder_width, model.tubelet_elements))
            init_from_pca(self.model, pca, self.config.beta)
        else:
            components, channels = count_components(model, bases), model.channels - count_flags(bases)
            local = fit_local_pca(batch, crops, model.tubelet, components, bases, channels, track)
            init_from_local_pca(self.model, local, self.config.beta)
            pca = local.pca
        if self.config.pca_neighbours:
            numbers = range(crops, crops + math.ceil(self.config.pca_neighbours / self.config.batch))
            seen = map(batch, track(numbers, "batches", "tubelets for neighbours"))
            classes = matching(model.decoder_width, min(model.decoder_width - 1, len(pca.components)), bases)
            fit_neighbours(self.model, pca, seen, classes, skip=int(bases > 1), track=track)

    def _resume(self, path: Path, step: int) -> None:
        self.step = step
        for optimizer in self._optimizers().values():
            set_optimizer_step(optimizer, step)
        checkpoints.read_into(path, self._tensors())

    def _tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        modules: dict[str, nn.Module] = {"model": self.model, "average": self.average}
        if self.adversary is not None:
            modules["adversary"] = self.adversary
        tensors = {f"{name}.{key}": x for name, module in modules.items() for key, x in module.state_dict().items()}
        for name, optimizer in self._optimizers().items():
            for key, parameter in modules[name].named_parameters():
                for moment in ("exp_avg", "exp_avg_sq"):
                    if parameter in optimizer.state:
                        tensors[f"{name}.{key}.{moment}"] = optimizer.state[parameter][moment]
        return tensors

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """By the names of what they train."""
        return {"model": self.optimizer} | ({"adversary": self.adversary_optimizer} if self.adversary else {})

    def _about(self) -> dict[str, str]:
        """What a checkpoint says of its run."""
        return {"run": self._identity(self.precision), "precision": self.precision}

    def _identity(self, precision: str) -> str:
        """What must be equal for a run to go on: everything but how long it is, where it lives and how it is fed."""
        fields = dataclasses.asdict(self.config) | {"precision": precision}
        if isinstance(data := fields.pop("data"), tuple):
            fields["mixture"] = [{**part, "path": ""} for part in data]
        for name in HOW:
            del fields[name]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def learning_rate(step: int, peak: float, warmup: int, steps: int) -> float:
    """Linear warm-up to the peak, then cosine to zero at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _batches(config: TrainConfig, ranks: Ranks | None = None) -> Batches:
    ranks = ranks or Ranks()
    return Batches(
        config.data, batch=config.batch, crop=config.crop, short_side=config.short_side, seed=config.seed,
        groups=config.groups, crop_scale=config.crop_scale, frames=config.frames, rank=ranks.rank, ranks=ranks.count,
    )  # fmt: skip


def _precision(wanted: str, device: torch.device, ranks: Ranks) -> str:
    """What a run begins in, "bf16" or "fp32"; "auto" is what suits the first rank's device."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported()
    else:
        native = (
            device.type == "cpu"
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()
            and torch.cpu._is_avx512_bf16_supported()
        )
    return ranks.gathered(["bf16" if native else "fp32"])[0]


class _stop_requests:
    """Context in which SIGTERM and SIGINT set a flag, which the value answers, instead of ending the process.

    A second one ends it as usual, but not under torchrun, which hands on to its processes what batch systems and
    terminals have sent to them as well.
    """

    def __enter__(self) -> Callable[[], bool]:
        self.stopped, self.handed_on = False, "TORCHELASTIC_RUN_ID" in os.environ
        self.previous = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self.previous[number] = signal.signal(number, self._stop)
            except ValueError:  # not the main thread: the caller's signals stay the caller's
                break
        return lambda: self.stopped

    def __exit__(self, *_: object) -> None:
        if not (self.stopped and self.handed_on):  # the second one may come while the process ends
            self._restore()

    def _stop(self, number: int, frame: Any) -> None:
        self.stopped = True
        if not self.handed_on:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
