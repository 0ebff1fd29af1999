"""Train a small diffusion transformer on a latent cache and sample pictures: a generator on top of the tokenizer.

    vitok encode examples/photos --out cache --format safetensors --size 128 --flip
    python examples/train_dit.py cache --out dit

On four photographs and a CPU this is a laptop toy: in four minutes of one core it learns them by heart (loss 2.0 to
0.3, with mirrored halves still mixed), which shows that cache, generator and decoder fit together and nothing else. On
a folder with one subfolder a class, the same file trains a class-conditional model on GPUs: `torchrun
--nproc-per-node 8 examples/train_dit.py cache --out dit --width 1152 --depth 28 --heads 16 --batch 32 --lr 1e-4
--steps 400000`, or `accelerate launch` in place of torchrun.

The transformer is diffusers' DiT (Peebles and Xie, arXiv:2212.09748), trained by flow matching (Lipman et al.,
arXiv:2210.02747): between latents x, normalised by the cache's statistics, and noise e lie x_t = (1 - t) x + t e; the
network predicts the velocity e - x, and sampling follows it from t = 1 to 0 by Euler's method.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

import vitok
from vitok.cache import LatentDataset, ShardSampler, sample_latents
from vitok.checkpoint import weights_hash
from vitok.io import atomic_path, grid, write_image
from vitok.parallel import Ranks, joined, replicated

CLASS_DROPOUT = 0.1  # share of samples trained without their class, for classifier-free guidance


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("cache", type=Path, help="cache of format safetensors, as vitok encode makes it")
    add("--out", type=Path, required=True, help="folder for dit.safetensors, dit.json and samples.png")
    add("--checkpoint", type=Path, help="dit.safetensors of an earlier run with the same sizes to start from")
    add("--model", help="tokenizer that decodes, a name or folder; by default the one named in the cache")
    for name, default in {"steps": 1000, "batch": 8, "width": 256, "depth": 4, "heads": 4, "patch": 1}.items():
        add(f"--{name}", type=int, default=default, help=f"{default} by default; the batch is that of one process")
    add("--lr", type=float, default=1e-3, help="peak learning rate, 1e-3 by default; large models want 1e-4")
    add("--samples", type=int, default=8, help="pictures on the sheet, 8 by default")
    add("--sampling-steps", type=int, default=50)
    add("--guidance", type=float, default=1.0, help="classifier-free guidance; 1 is none")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=0, help="processes that read the cache")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    for name in ("batch", "width", "depth", "heads", "patch", "samples", "sampling_steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.width % options.heads:
        parser.error("--width must be a multiple of --heads")
    return options


def open_tokenizer(data: LatentDataset, options: argparse.Namespace, device: torch.device) -> vitok.ViTok:
    """The model that made the cache."""
    model = vitok.load(options.model or data.manifest.model, device=device)
    made_by = data.manifest.config_hash, data.manifest.weights_hash
    if made_by != (model.config.hash(), weights_hash(model)):
        raise vitok.InputError(f"{data.root} was made by another model; name the one that made it by --model")
    return model


def make_dit(shape: torch.Size, classes: int, options: argparse.Namespace) -> torch.nn.Module:
    """A DiT for latents [c, h, w]; class number `classes` stands for none."""
    try:
        from diffusers import DiTTransformer2DModel
    except ImportError:
        raise vitok.InputError("this example needs diffusers: pip install vitok[diffusers]") from None
    if len(shape) != 3 or shape[1] != shape[2] or shape[1] % options.patch:
        raise vitok.InputError(f"this DiT wants square latents [c, h, w] of whole patches, not {list(shape)}")
    dit = DiTTransformer2DModel(
        num_attention_heads=options.heads, attention_head_dim=options.width // options.heads, in_channels=shape[0],
        out_channels=shape[0], num_layers=options.depth, sample_size=shape[1], patch_size=options.patch,
        attention_bias=True, num_embeds_ada_norm=classes,
    )  # fmt: skip
    # As in DiT's own code every block begins as the identity and the output as zero.
    for layer in (*(block.norm1.linear for block in dit.transformer_blocks), dit.proj_out_1, dit.proj_out_2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return dit.eval()  # its only dropout is that of classes, once a block; here they are dropped once a sample


def endless(sampler: ShardSampler) -> Iterator[int]:
    """Epoch after epoch, so that a batch may be larger than the data."""
    epoch = 0
    while len(sampler):
        sampler.set_epoch(epoch)
        yield from sampler
        epoch += 1
    raise vitok.InputError("the cache has fewer samples than there are processes")


def train(dit: torch.nn.Module, data: LatentDataset, classes: int, options: argparse.Namespace) -> list[float]:
    """The loss of every step."""
    ranks, device = Ranks.current(), next(dit.parameters()).device
    network = replicated(dit)
    optimizer = torch.optim.AdamW(dit.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0)
    warmup = min(100, 1 + options.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / options.steps))
    )
    sampler: Iterable[int] = endless(ShardSampler(data, seed=options.seed))
    loader = DataLoader(
        data, batch_size=options.batch, sampler=sampler, num_workers=options.workers, pin_memory=device.type == "cuda"
    )
    torch.manual_seed(options.seed + 1 + ranks.rank)  # of noise, times, mirroring and dropped classes
    losses: list[Tensor] = []
    began = told = time.monotonic()
    for step, batch in zip(range(options.steps), loader, strict=False):
        count = len(batch["label"])
        flip = torch.rand(count) < 0.5 if "flipped_mean" in batch else None
        x = data.stats.normalize(sample_latents(batch, flip=flip).float()).to(device)
        labels = batch["label"].clamp(min=0).where(torch.rand(count) >= CLASS_DROPOUT, classes).to(device)
        noise, t = torch.randn(x.shape).to(device), torch.rand(count).to(device)
        amount = t.view(-1, 1, 1, 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            velocity = network(x + amount * (noise - x), timestep=1000 * t, class_labels=labels).sample
        loss = (velocity.float() - (noise - x)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(dit.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
        now = time.monotonic()
        if ranks.rank == 0 and (now - told > 2 or step + 1 == options.steps):
            told, recent = now, torch.stack(losses[-50:]).mean().item()
            left = (now - began) / (step + 1) * (options.steps - step - 1)
            print(f"step {step + 1}/{options.steps}  loss {recent:.4f}  {left:.0f} s left", flush=True)
    return [loss.item() for loss in losses]


@torch.no_grad()
def sample(dit: torch.nn.Module, shape: torch.Size, classes: int, options: argparse.Namespace) -> Tensor:
    """Normalised latents [samples, c, h, w], of the classes in turn."""
    device = next(dit.parameters()).device
    x = torch.randn(options.samples, *shape, generator=torch.Generator().manual_seed(options.seed)).to(device)
    labels = torch.arange(options.samples, device=device) % classes
    times = torch.linspace(1, 0, options.sampling_steps + 1).tolist()
    for now, then in pairwise(times):
        t = torch.full((len(x),), 1000 * now, device=device)
        velocity = dit(x, timestep=t, class_labels=labels).sample
        if options.guidance != 1:
            free = dit(x, timestep=t, class_labels=torch.full_like(labels, classes)).sample
            velocity = free + options.guidance * (velocity - free)
        x = x + (then - now) * velocity
    return x


def main(arguments: Sequence[str] | None = None) -> list[float]:
    options = parse(arguments)
    with joined(torch.device(options.device)) as device:
        data = LatentDataset(options.cache)
        tokenizer = open_tokenizer(data, options, device)
        shape, classes = data[0]["mean"].shape, max(len(data.classes), int(data.labels.max()) + 1, 1)
        torch.manual_seed(options.seed)
        dit = make_dit(shape, classes, options).to(device)
        if options.checkpoint:
            dit.load_state_dict(load_file(options.checkpoint))
        losses = train(dit, data, classes, options) if options.steps > 0 else []
        if Ranks.current().rank == 0:
            with atomic_path(options.out / "dit.safetensors") as path:
                save_file(dit.state_dict(), path)
            with atomic_path(options.out / "dit.json") as path:
                path.write_text(json.dumps(dict(dit.config), indent=2) + "\n")
            latents = data.stats.denormalize(sample(dit, shape, classes, options))
            pixels = torch.cat([tokenizer.decode(each[None].to(tokenizer.dtype)) for each in latents]).float()
            pictures = pixels.add(1).mul(127.5).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
            write_image(options.out / "samples.png", grid(pictures))
            print(f"wrote {options.out}/dit.safetensors and samples.png")
    return losses


if __name__ == "__main__":
    try:
        main()
    except vitok.InputError as error:
        sys.exit(f"error: {error}")
