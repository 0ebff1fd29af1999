"""The published models written out plainly, as their weights have it: neighbouring pairs, colours first."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def interleaved(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate channels 2i and 2i + 1 of x [B, heads, L, n] by angles [L, n / 2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack(
        (even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin()), -1
    ).flatten(-2)


def frequencies(channels: int) -> Tensor:
    return 10000.0 ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)


def rotate_1d(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """By the flattened token index."""
    return interleaved(x, torch.arange(math.prod(grid)).double()[:, None] * frequencies(x.shape[-1]))


def rotate_2d(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The first half of the head by the row, the second by the column."""
    index, half = torch.arange(math.prod(grid)), x.shape[-1] // 2
    places = (index // grid[1], index % grid[1])
    parts = [
        interleaved(part, at.double()[:, None] * frequencies(half))
        for part, at in zip(x.chunk(2, -1), places, strict=True)
    ]
    return torch.cat(parts, -1)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1)
    return (weights @ v).transpose(1, 2).flatten(2)


def heads_of(x: Tensor, heads: int) -> list[Tensor]:
    """q, k, v [B, heads, L, d] of a projection [B, L, 3 * heads * d] ordered q | k | v."""
    batch, tokens, width = x.shape
    return list(x.view(batch, tokens, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4))


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight


def author_v1_block(x: Tensor, w: dict[str, Tensor], heads: int, grid: tuple[int, int]) -> Tensor:
    h = F.layer_norm(x, x.shape[-1:], w["norm1.weight"], w["norm1.bias"], 1e-5)
    q, k, v = heads_of(h @ w["attn.qkv.weight"].T, heads)
    mixed = softmax_attention(rotate_1d(q, grid), rotate_1d(k, grid), v)
    x = x + mixed @ w["attn.proj.weight"].T + w["attn.proj.bias"]
    h = F.layer_norm(x, x.shape[-1:], w["norm2.weight"], w["norm2.bias"], 1e-5)
    gate, up = (h @ w[f"mlp.{name}.weight"].T + w[f"mlp.{name}.bias"] for name in ("fc1", "fc2"))
    gelu = 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2)))
    return x + (gelu * up) @ w["mlp.fc3.weight"].T + w["mlp.fc3.bias"]


def v2_block(x: Tensor, w: dict[str, Tensor], heads: int, grid: tuple[int, int]) -> Tensor:
    h = rms(x, w["norm1.weight"])
    q, k, v = heads_of(h @ w["attn.qkv_proj.weight"].T, heads)
    q, k = (rotate_2d(rms(t, w[f"attn.norm_{name}.weight"]), grid) for t, name in ((q, "q"), (k, "k")))
    attention = softmax_attention(q, k, v) @ w["attn.out_proj.weight"].T
    value, gate = (h @ w["ffn.fc1.weight"].T).chunk(2, -1)
    feed_forward = (gate / (1 + torch.exp(-gate)) * value) @ w["ffn.fc2.weight"].T
    return x + w["layer_scale.gamma"] * (attention + feed_forward)


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {
        key: torch.randn(shape, dtype=torch.float64) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.3)
        + (1.0 if "norm" in key and key.endswith("weight") else 0.0)
        for key, shape in shapes.items()
    }


def author_v1_weights(width: int, hidden: int) -> dict[str, Tensor]:
    vectors = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.proj.bias", "mlp.fc3.bias")
    return random_weights({
        **{key: (width,) for key in vectors}, "mlp.fc1.bias": (hidden,), "mlp.fc2.bias": (hidden,),
        "attn.qkv.weight": (3 * width, width), "attn.proj.weight": (width, width), "mlp.fc1.weight": (hidden, width),
        "mlp.fc2.weight": (hidden, width), "mlp.fc3.weight": (width, hidden),
    })  # fmt: skip


def v2_weights(width: int, hidden: int, heads: int) -> dict[str, Tensor]:
    return random_weights({
        "norm1.weight": (width,), "attn.norm_q.weight": (width // heads,), "attn.norm_k.weight": (width // heads,),
        "attn.qkv_proj.weight": (3 * width, width), "attn.out_proj.weight": (width, width),
        "ffn.fc1.weight": (2 * hidden, width), "ffn.fc2.weight": (width, hidden), "layer_scale.gamma": (width,),
    })  # fmt: skip


def blocks(x: Tensor, w: dict[str, Tensor], prefix: str, block, heads: int, grid: tuple[int, int]) -> Tensor:
    """The blocks whose keys begin with `prefix`, one after the other."""
    numbers = sorted({int(key.removeprefix(prefix).split(".")[0]) for key in w if key.startswith(prefix)})
    for i in numbers:
        start = f"{prefix}{i}."
        x = block(x, {key.removeprefix(start): value for key, value in w.items() if key.startswith(start)}, heads, grid)
    return x


def linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def v2_encode(pixels: Tensor, w: dict[str, Tensor], patch: int, heads: int) -> Tensor:
    """Pixels [B, 3, H, W] in [-1, 1] to codes [B, c, h, w]; padded with zeros at the bottom and on the right."""
    pixels = F.pad(pixels, (0, -pixels.shape[3] % patch, 0, -pixels.shape[2] % patch))
    grid = (pixels.shape[2] // patch, pixels.shape[3] // patch)
    tokens = F.unfold(pixels, patch, stride=patch).transpose(1, 2)
    x = blocks(linear(tokens, w, "patch_embed"), w, "encoder_blocks.", v2_block, heads, grid)
    code = linear(x, w, "to_code")
    return F.layer_norm(code, code.shape[-1:], eps=1e-6).transpose(1, 2).unflatten(2, grid)


def v2_decode(codes: Tensor, w: dict[str, Tensor], patch: int, heads: int) -> Tensor:
    """Codes [B, c, h, w] to pixels [B, 3, h * patch, w * patch]."""
    grid = (codes.shape[2], codes.shape[3])
    x = linear(codes.flatten(2).transpose(1, 2), w, "decoder_embed")
    rows = linear(blocks(x, w, "decoder_blocks.", v2_block, heads, grid), w, "to_pixels")
    return F.fold(rows.transpose(1, 2), (grid[0] * patch, grid[1] * patch), patch, stride=patch)


def v2_model(shapes: dict[str, int], heads: int) -> dict[str, dict[str, Tensor]]:
    """Random weights by part; `shapes` has width, hidden, depth, patch and channels, the same of both parts."""
    width, elements, channels = shapes["width"], 3 * shapes["patch"] ** 2, shapes["channels"]
    ends = {
        "encoder": {
            "patch_embed.weight": (width, elements), "patch_embed.bias": (width,), "to_code.weight": (channels, width),
            "to_code.bias": (channels,),
        },
        "decoder": {
            "decoder_embed.weight": (width, channels), "decoder_embed.bias": (width,),
            "to_pixels.weight": (elements, width), "to_pixels.bias": (elements,),
        },
    }  # fmt: skip
    return {
        part: random_weights(end)
        | {
            f"{part}_blocks.{i}.{key}": value
            for i in range(shapes["depth"])
            for key, value in v2_weights(width, shapes["hidden"], heads).items()
        }
        for part, end in ends.items()
    }


def author_v1_stack(x: Tensor, w: dict[str, Tensor], part: str, heads: int, grid: tuple[int, int]) -> Tensor:
    x = blocks(x, w, f"{part}.blocks.", author_v1_block, heads, grid)
    return F.layer_norm(x, x.shape[-1:], w[f"{part}.norm.weight"], w[f"{part}.norm.bias"], 1e-5)


def author_v1_encode(clips: Tensor, w: dict[str, Tensor], heads: int) -> tuple[Tensor, Tensor]:
    """Clips [B, 3, T, H, W], multiples of the tubelet, to mean and logvar [B, c, t, h, w]."""
    kernel = w["tubelet_embed.proj.weight"]
    x = F.conv3d(clips, kernel, w["tubelet_embed.proj.bias"], stride=kernel.shape[2:])
    sizes = x.shape[2:]
    tokens = x.flatten(2).transpose(1, 2)
    # Positions are the flattened index, so the grid may as well be one row.
    code = linear(author_v1_stack(tokens, w, "encoder", heads, (1, tokens.shape[1])), w, "encoder_to_code")
    mean, logvar = code.transpose(1, 2).unflatten(2, sizes).chunk(2, 1)
    return mean, logvar


def author_v1_decode(latents: Tensor, w: dict[str, Tensor], heads: int) -> Tensor:
    kernel = w["tubelet_decode.proj.weight"]
    tokens = linear(latents.flatten(2).transpose(1, 2), w, "code_to_decoder")
    x = author_v1_stack(tokens, w, "decoder", heads, (1, tokens.shape[1]))
    x = x.transpose(1, 2).unflatten(2, latents.shape[2:])
    return F.conv_transpose3d(x, kernel, w["tubelet_decode.proj.bias"], stride=kernel.shape[2:])


def author_v1_model(width: int, hidden: int, depth: int, tubelet: tuple[int, int], channels: int) -> dict[str, Tensor]:
    q, p = tubelet
    kernel = (width, 3, q, p, p)
    ends = {
        "tubelet_embed.proj.bias": (width,), "encoder_to_code.weight": (2 * channels, width),
        "encoder_to_code.bias": (2 * channels,), "code_to_decoder.weight": (width, channels),
        "code_to_decoder.bias": (width,), "tubelet_decode.proj.bias": (3,),
        **{f"{part}.norm.{name}": (width,) for part in ("encoder", "decoder") for name in ("weight", "bias")},
    }  # fmt: skip
    kernels = {
        f"tubelet_{end}.proj.weight": torch.randn(kernel, dtype=torch.float64) * 0.05 for end in ("embed", "decode")
    }
    stacks = {
        f"{part}.blocks.{i}.{key}": value
        for part in ("encoder", "decoder")
        for i in range(depth)
        for key, value in author_v1_weights(width, hidden).items()
    }
    return random_weights(ends) | kernels | stacks
