"""ViTok-v2 at its published sizes, with random weights: ours beside its plain definition, and what loading costs.

The plain definition (arXiv:2605.05331) is what one writes with torch's own functions, run eagerly: rms_norm, linear,
scaled_dot_product_attention. Reading is that of the files' bytes into memory; what was loaded is touched page by page,
so that weights which are mapped from a file count as read.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from vitok.bench import models
from vitok.bench.models import PROVIDERS, Coder, Workload
from vitok.bench.rows import Rows
from vitok.bench.timing import timing
from vitok.checkpoint import load
from vitok.config import StackConfig, ViTokConfig
from vitok.integrations.published import PUBLISHED, load_vitok_v2, v2_shapes
from vitok.model import ViTok

PLAIN = "plain"
SPEEDS = (PLAIN, "vitok", "vitok fast bf16", "vitok fast fp32")
READ = "read"
LOADS = (READ, "load_vitok_v2", "vitok.load")
COLUMNS = tuple(
    column
    for name in models.COLUMNS
    for column in (("ratio_to_plain", "ratio_to_read", "file_mb") if name == "ratio_to_reference" else (name,))
)


# --- the plain definition


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring channels 2i and 2i + 1 of x [B, heads, L, d] by the angles of cos and sin [L, d / 2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)


def angles(grid: tuple[int, int], head_dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [L, d / 2], at least float32: half of a head turns with the row, the other half with the column."""
    half = head_dim // 2
    frequencies = 10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float64, device=device) / half)
    index = torch.arange(grid[0] * grid[1], device=device)
    turns = torch.cat([place[:, None] * frequencies for place in (index // grid[1], index % grid[1])], 1)
    wide = torch.promote_types(dtype, torch.float32)
    return turns.cos().to(wide), turns.sin().to(wide)


def blocks(x: Tensor, w: Mapping[str, Tensor], prefix: str, stack: StackConfig, grid: tuple[int, int]) -> Tensor:
    """Tokens [B, L, width] through the blocks whose weights begin with `prefix`."""
    table = angles(grid, stack.head_dim, x.dtype, x.device)
    for i in range(stack.depth):
        at = f"{prefix}.{i}"
        h = F.rms_norm(x, x.shape[-1:], w[f"{at}.norm1.weight"], 1e-6)
        qkv = F.linear(h, w[f"{at}.attn.qkv_proj.weight"]).unflatten(-1, (3, stack.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (
            rotated(F.rms_norm(part, part.shape[-1:], w[f"{at}.attn.norm_{name}.weight"], 1e-6), *table)
            for name, part in zip("qk", qkv[:2], strict=True)
        )
        attended = F.scaled_dot_product_attention(q, k, qkv[2]).transpose(1, 2).flatten(2)
        value, gate = F.linear(h, w[f"{at}.ffn.fc1.weight"]).chunk(2, -1)
        branch = F.linear(attended, w[f"{at}.attn.out_proj.weight"])
        branch = branch + F.linear(F.silu(gate) * value, w[f"{at}.ffn.fc2.weight"])
        x = x + w[f"{at}.layer_scale.gamma"] * branch
    return x


def plain_encode(pixels: Tensor, w: Mapping[str, Tensor], config: ViTokConfig) -> Tensor:
    """Pixels [B, 3, H, W] in [-1, 1], in the dtype of the weights, to codes [B, c, h, w]; padded with zeros."""
    p = config.patch
    pixels = F.pad(pixels, (0, -pixels.shape[3] % p, 0, -pixels.shape[2] % p))
    grid = (pixels.shape[2] // p, pixels.shape[3] // p)
    patches = pixels.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    x = F.linear(patches, w["patch_embed.weight"], w["patch_embed.bias"])
    x = blocks(x, w, "encoder_blocks", config.encoder, grid)
    code = F.linear(x, w["to_code.weight"], w["to_code.bias"])
    return F.layer_norm(code, code.shape[-1:], eps=1e-6).transpose(1, 2).unflatten(2, grid)


def plain_decode(codes: Tensor, w: Mapping[str, Tensor], config: ViTokConfig) -> Tensor:
    """Codes [B, c, h, w] to pixels [B, 3, h * p, w * p]."""
    p, grid = config.patch, (codes.shape[2], codes.shape[3])
    x = F.linear(codes.flatten(2).transpose(1, 2), w["decoder_embed.weight"], w["decoder_embed.bias"])
    x = blocks(x, w, "decoder_blocks", config.decoder, grid)
    rows = F.linear(x, w["to_pixels.weight"], w["to_pixels.bias"])
    return rows.unflatten(2, (3, p, p)).unflatten(1, grid).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


# --- speed


def random_weights(config: ViTokConfig) -> dict[str, dict[str, Tensor]]:
    """{"encoder": ..., "decoder": ...} as they are published, float32, rounded to bfloat16."""
    generator = torch.Generator().manual_seed(0)

    def made(key: str, shape: tuple[int, ...]) -> Tensor:
        x = torch.randn(shape, generator=generator).mul_(shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
        return (x + 1 if "norm" in key or "gamma" in key else x).bfloat16().float()

    return {part: {k: made(k, shape) for k, shape in shapes.items()} for part, shapes in v2_shapes(config).items()}


class Published(Workload):
    """A model of a published name or variant with random weights, in our layout and in that of its authors."""

    def __post_init__(self) -> None:
        self.config = ViTokConfig.from_name(PUBLISHED.get(self.name, self.name), preset="v2")
        parts = random_weights(self.config)
        self.weights = {k: x.to(self.device) for part in parts.values() for k, x in part.items()}
        self.models[torch.float32] = load_vitok_v2(parts["encoder"], parts["decoder"], device=self.device)
        self.providers = PROVIDERS | {PLAIN: plain}


def plain(work: Workload, dtype: torch.dtype) -> Coder:
    assert isinstance(work, Published)
    config, weights = work.config, {key: x.to(dtype) for key, x in work.weights.items()}

    def encode(pixels: Tensor) -> Tensor:
        return plain_encode((pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).to(dtype), weights, config)

    decode = partial(plain_decode, w=weights, config=config)
    return Coder(torch.inference_mode()(encode), torch.inference_mode()(decode), dtype)


# --- loading


def load_key(name: str) -> dict[str, object]:
    values = (name, 1, "", "", "float32", "load")
    return dict(zip(models.KEY, values, strict=True))


def measure_load(name: str, seconds: float, rows: Rows) -> None:
    """A row for reading the two files and for each way of loading them, in turn, on the CPU."""
    config = ViTokConfig.from_name(PUBLISHED.get(name, name), preset="v2")
    with TemporaryDirectory() as folder:
        files = [Path(folder) / f"{part}.safetensors" for part in ("encoder", "decoder")]
        for file, weights in zip(files, random_weights(config).values(), strict=True):
            save_file(weights, file)
        load_vitok_v2(*files).save(Path(folder) / "model")
        size = sum(file.stat().st_size for file in files) / 1e6
        calls: dict[str, Callable[[], object]] = {
            READ: lambda: [file.read_bytes() for file in files],
            "load_vitok_v2": lambda: _touched(load_vitok_v2(*files)),
            "vitok.load": lambda: _touched(load(Path(folder) / "model")),
        }
        taken: dict[str, list[float]] = {provider: [] for provider in LOADS}
        while min(map(len, taken.values())) < 3 or min(map(sum, taken.values())) < seconds:
            for provider in LOADS:
                taken[provider].append(_fresh_seconds(calls[provider]))
    timings = {provider: timing(times) for provider, times in taken.items()}
    rows.replace(
        load_key(name),
        [
            {
                **load_key(name), "provider": provider, "ms_p20": t.p20, "ms_p50": t.p50, "ms_p95": t.p95,
                "samples": t.samples, "ratio_to_read": t.p50 / timings[READ].p50, "file_mb": size,
            }
            for provider, t in timings.items()
        ],
    )  # fmt: skip


def _touched(model: ViTok) -> ViTok:
    for x in model.parameters():
        x.detach().flatten().view(torch.uint8)[::4096].sum()
    return model


def _fresh_seconds(call: Callable[[], object]) -> float:
    """Of a call that finds no memory left from the one before, as in a process that loads once."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
