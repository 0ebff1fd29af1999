"""The training loop: resumable at any step, everything random a function of (seed, step)."""

from __future__ import annotations

import copy
import csv
import dataclasses
import hashlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vitok import ops
from vitok.checkpoint import create_model, load
from vitok.data.batches import Batch, Batches
from vitok.errors import InputError
from vitok.evaluate.pca import PCA_CROPS, fit_pca
from vitok.io.files import atomic_path
from vitok.train.config import TrainConfig
from vitok.train.discriminator import Adversary, Discriminator
from vitok.train.init import init_from_pca
from vitok.train.losses import perceptual_loss, pixel_loss, predicted_frames, target_frames

STATE, LOG, MODEL, FAILED = "state.safetensors", "log.csv", "model", "failed.safetensors"


class Trainer:
    """One run: `Trainer(config).run()` trains to the last step, from the run's checkpoint if it has one."""

    def __init__(self, config: TrainConfig, device: torch.device | str = "cpu") -> None:
        self.config, self.device = config, torch.device(device)
        self.out = Path(config.out)
        self.data = Batches(
            config.data, batch=config.batch, crop=config.crop, short_side=config.short_side, seed=config.seed,
            groups=config.groups, crop_scale=config.crop_scale, frames=config.frames,
        )  # fmt: skip
        self.skipped = dict.fromkeys(self.data.skipped)
        torch.manual_seed(config.seed)
        model = create_model(config.model, preset=config.preset, channels=config.channels, **config.overrides)
        self.model = model.to(self.device)
        self.average = copy.deepcopy(self.model).eval()
        if config.stage == 2:
            self.model.encoder.requires_grad_(False)
        self.optimizer = _adamw(self.model, config)
        network = perceptual_loss(config.perceptual, config.perceptual_weights)
        self.perceptual = None if network is None else network.to(self.device)
        self.adversary: Adversary | None = None
        if config.stage == 2:
            discriminator = Discriminator(config.crop, config.discriminator_width)
            self.adversary = Adversary(discriminator, config.lecam_weight).to(self.device)
            self.adversary_optimizer = _adamw(self.adversary, config)
        self.weights = {
            "pixel": 1.0,
            "kl": config.beta,
            "perceptual": config.eta,
            "adversarial": config.adversarial_weight,
        }
        self.autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=_use_bf16(config.precision, self.device)
        )
        self.step = 0
        if (self.out / STATE).exists():
            self._resume()
        else:
            self._start()

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def run(self, on_step: Callable[[int, dict[str, float]], None] | None = None) -> None:
        """Train to the last step. A first SIGTERM or Ctrl-C saves a checkpoint and returns; the run can go on later.

        `on_step` gets the number of steps done and the metrics of `train_step`, with `data_wait`, the percentage of the
        last ten steps' or so time spent waiting for batches, and `skipped`, the number of files that could not be read
        so far; the keys of the trainer's `skipped` say which.
        """
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the run directory {self.out}: {error.strerror}") from error
        with _stop_requests() as stopped:
            steps = range(self.step, self.config.steps)
            batches, waited, worked = self.data.stream(steps, self.config.workers), 0.0, 0.0
            for step in steps:
                begun = time.perf_counter()
                batch = next(batches)
                ready = time.perf_counter()
                metrics = self.train_step(batch, step)
                waited, worked = 0.9 * waited + ready - begun, 0.9 * worked + time.perf_counter() - ready
                self.skipped.update(dict.fromkeys(batch.skipped))
                self.step = step + 1
                last = self.step == self.config.steps or stopped()
                if on_step:
                    data_wait = 100 * waited / (waited + worked)
                    on_step(self.step, metrics | {"data_wait": data_wait, "skipped": len(self.skipped)})
                if last or self.step % self.config.save_every == 0:
                    self.save(metrics)
                if last:
                    break

    def train_step(self, batch: Batch, step: int) -> dict[str, float]:
        """One update on a batch of pictures or clips.

        Returns the loss, its parts before they are weighted, in stage 2 the discriminator's loss, PSNR of the batch
        (dB), the gradient's norm and the learning rate.
        """
        config, tubelet = self.config, self.model.config.tubelet
        target = batch.clips.to(self.device, non_blocking=True)
        self.model.decoder.train()
        self.model.encoder.train(config.stage == 1)
        with self.autocast:
            with torch.set_grad_enabled(config.stage == 1):
                posterior = self.model.encode(target, layout="channels_last")
            patches = self.model.decode_patches(posterior.sample((config.seed << 32) + step))

        parts = {"pixel": pixel_loss(patches, target, tubelet, config.pixel_loss), "kl": posterior.kl().float().mean()}
        if self.perceptual is not None or self.adversary is not None:
            reals, fakes = target_frames(target), predicted_frames(patches, tubelet, target.shape[1:4])
        if self.perceptual is not None:
            with self.autocast:
                parts["perceptual"] = self.perceptual(fakes, reals).float().mean()
        if self.adversary is not None:
            with self.autocast:
                parts["adversarial"] = self.adversary.against(fakes)
        loss = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()
        rate = learning_rate(step, config.learning_rate, config.warmup, config.steps)
        norm = self._backward(loss, self.optimizer, rate, batch, step)
        metrics = {"loss": loss.item(), **{name: part.item() for name, part in parts.items()}}

        if self.adversary is not None:
            with self.autocast:
                loss = self.adversary(reals, fakes)
            its_rate = learning_rate(
                step, config.discriminator_learning_rate, config.discriminator_warmup, config.steps
            )
            self._backward(loss, self.adversary_optimizer, its_rate, batch, step)
            self.adversary_optimizer.step()
            metrics["discriminator"] = loss.item()
        self.optimizer.step()
        self._update_average(step)

        mse = ops.pixel_loss(patches.detach().clamp(-1, 1), target, tubelet=tubelet, kind="l2")
        psnr = (10 * torch.log10(4 / mse.clamp(min=1e-10))).mean()
        return metrics | {"psnr": psnr.item(), "grad_norm": norm, "lr": rate}

    def _backward(self, loss: Tensor, optimizer: torch.optim.Optimizer, rate: float, batch: Batch, step: int) -> float:
        """Clipped gradients for a step of `optimizer` at `rate`; returns their norm before clipping.

        A loss or norm that is not finite ends the run, before anything has moved; what led there is saved.
        """
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.config.grad_clip).item()
        if not math.isfinite(norm + loss.item()):
            found = f"the loss ({loss.item():g}) or its gradient ({norm:g}) is not finite at step {step}"
            try:
                self._write_state(self.out / FAILED, batch=batch.pixels)
                kept = f"{self.out / FAILED} holds the state and this batch"
            except InputError as error:
                kept = str(error)
            raise InputError(f"{found}; lower learning_rate or check the data: {batch.listed()}; {kept}")
        return norm

    @torch.no_grad()
    def _update_average(self, step: int) -> None:
        decay = min(self.config.ema, (1 + step) / (10 + step))  # short memory at first, so that the start is forgotten
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)

    def save(self, metrics: dict[str, float]) -> None:
        """Write the averaged model, the state to resume from and a log line."""
        self.average.save(self.out / MODEL)
        self._write_state(self.out / STATE)
        log = self.out / LOG
        rows = [row for row in _read_rows(log) if int(row["step"]) < self.step]
        rows.append({"step": self.step, **{name: f"{value:.6g}" for name, value in metrics.items()}})
        with atomic_path(log) as path, open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[-1]))
            writer.writeheader()
            writer.writerows(rows)

    def _start(self) -> None:
        if self.config.init == "pca":
            tubelet, width = self.model.config.tubelet, self.model.config.encoder_width
            fit_on = (
                self.data[2**32 + i].clips
                for i in range(PCA_CROPS * 256**2 // (self.config.batch * self.config.crop**2) + 1)
            )
            init_from_pca(self.model, fit_pca(fit_on, tubelet, min(width, self.model.config.tubelet_elements)))
        elif self.config.init != "random":
            start = load(self.config.init)
            if start.config.hash() != self.model.config.hash():
                raise InputError(
                    f"init {self.config.init!r} holds a model of another configuration than this run's: "
                    f"{start.config.differences(self.model.config)}; give the run the same or another init"
                )
            self.model.load_state_dict(start.state_dict())
        self.average.load_state_dict(self.model.state_dict())

    def _resume(self) -> None:
        path = self.out / STATE
        try:
            with safe_open(path, "pt", device=str(self.device)) as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot resume: {path} is no readable safetensors file: {error}") from error
        if metadata.get("run") != self._identity():
            raise InputError(f"{self.out} holds a run with another configuration; choose another `out` or remove it")
        self.step = int(metadata["step"])
        for name, module in self._modules():
            found = {key.removeprefix(f"{name}."): v for key, v in tensors.items() if key.startswith(f"{name}.")}
            module.load_state_dict(found)
        for key, parameter, optimizer in self._optimized():
            optimizer.state[parameter] = {name: tensors[f"{key}.{name}"] for name in ("step", "exp_avg", "exp_avg_sq")}

    def _write_state(self, path: Path, **more: Tensor) -> None:
        tensors = {f"{name}.{key}": v for name, module in self._modules() for key, v in module.state_dict().items()}
        for key, parameter, optimizer in self._optimized():
            tensors |= {f"{key}.{name}": value for name, value in optimizer.state[parameter].items()}
        with atomic_path(path) as temporary:
            save_file(
                {key: value.contiguous() for key, value in (tensors | more).items()},
                temporary,
                metadata={"step": str(self.step), "run": self._identity()},
            )

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        """What a checkpoint holds, with the names it has there."""
        yield from (("model", self.model), ("average", self.average))
        if self.adversary is not None:
            yield "adversary", self.adversary

    def _optimized(self) -> Iterator[tuple[str, nn.Parameter, torch.optim.Optimizer]]:
        """Parameters that are trained, with the names and owners of their optimizer states."""
        for key, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield f"optimizer.{key}", parameter, self.optimizer
        if self.adversary is not None:
            for key, parameter in self.adversary.named_parameters():
                yield f"adversary_optimizer.{key}", parameter, self.adversary_optimizer

    def _identity(self) -> str:
        """What must be equal for a run to go on: everything but how long it is, where it lives and how it is fed."""
        fields = dataclasses.asdict(self.config)
        if isinstance(data := fields.pop("data"), tuple):
            fields["mixture"] = [{**part, "path": ""} for part in data]
        for name in ("out", "steps", "workers", "save_every", "perceptual_weights"):
            del fields[name]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def learning_rate(step: int, peak: float, warmup: int, steps: int) -> float:
    """Linear warm-up to the peak, then cosine to zero at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _adamw(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Of the module's parameters that are trained; only matrices (and kernels) decay."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    matrices, vectors = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=config.betas, fused=True,
    )  # fmt: skip


def _use_bf16(precision: str, device: torch.device) -> bool:
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return (
        device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported()
    )


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class _stop_requests:
    """Context in which SIGTERM and SIGINT set a flag, which the value answers, instead of ending the process."""

    def __enter__(self) -> Callable[[], bool]:
        self.stopped = False
        self.previous = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self.previous[number] = signal.signal(number, self._stop)
            except ValueError:  # not the main thread: the caller's signals stay the caller's
                break
        return lambda: self.stopped

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: Any) -> None:
        self.stopped = True
        for signal_number, handler in self.previous.items():
            signal.signal(signal_number, handler)  # a second one ends the process as usual
