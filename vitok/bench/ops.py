"""What the benchmarks of ops time: an op on the shapes of a ViTok, its implementations, and what people use instead.

A case makes its inputs for a device and a dtype; a provider is a function of them. The first provider is the eager
composition that the ratios are against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitok import _native, ops
from vitok.positions import coordinates, rope_table

BATCH, SIDE, PATCH, WIDTH, HEADS, HIDDEN, CHANNELS = 8, 256, 16, 768, 12, 2048, 16
GRID = (1, SIDE // PATCH, SIDE // PATCH)
TOKENS = GRID[1] * GRID[2]


@dataclass(frozen=True)
class Case:
    """One op on one shape. `bytes` and `flops` are the least that a forward call has to move and to compute,
    `backward_bytes` and `backward_flops` those of the gradients."""

    name: str
    shape: str
    inputs: Callable[[torch.device, torch.dtype, torch.Generator], tuple[Any, ...]]
    eager: str
    providers: dict[str, Callable[..., Any]]
    op: str
    bytes: Callable[[int], int] = lambda size: 0
    backward_bytes: Callable[[int], int] = lambda size: 0
    flops: int = 0
    backward_flops: int = 0
    backward: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    tolerance: float = 0.03
    different: tuple[str, ...] = ()  # providers that compute less or draw other numbers, there to compare times


def implementations(
    op: str, call: Callable[..., Any], leave_out: tuple[str, ...] = ()
) -> dict[str, Callable[..., Any]]:
    """`call(*inputs, impl=...)` with every implementation of an op that can be used on this machine."""
    return {
        choice.implementation: partial(call, impl=choice.implementation)
        for choice in ops.choices()
        if choice.op == op and choice.usable and choice.implementation not in leave_out
    }


def fused(eager: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """What the compiler makes of an eager composition, compiled when it is first called."""
    return {"torch.compile": torch.compile(eager, fullgraph=True, dynamic=False)}


def normal(generator: torch.Generator, device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(device, dtype)


def embed_inputs(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> tuple[Any, ...]:
    pixels = torch.randint(0, 256, (BATCH, 1, SIDE, SIDE, 3), dtype=torch.uint8, generator=g).to(device)
    return pixels, normal(g, device, dtype, WIDTH, PATCH * PATCH * 3) / 28, normal(g, device, dtype, WIDTH)


def eager_embed(pixels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A float image and Conv3d with kernel = stride, as most code bases embed patches."""
    kernel = weight.view(WIDTH, 1, PATCH, PATCH, 3).permute(0, 4, 1, 2, 3)
    image = (pixels.permute(0, 4, 1, 2, 3).float() / 127.5 - 1).to(weight.dtype)
    return F.conv3d(image, kernel, bias, stride=kernel.shape[2:]).flatten(2).transpose(1, 2)


def eager_gather(pixels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    image = (pixels.float() / 127.5 - 1).to(weight.dtype)
    _, t, h, w, _ = image.shape
    rows = image.view(BATCH, t, h // PATCH, PATCH, w // PATCH, PATCH, 3).permute(0, 1, 2, 4, 3, 5, 6)
    return rows.reshape(BATCH, TOKENS, -1)


def unembed_inputs(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> tuple[Any, ...]:
    return (normal(g, device, dtype, BATCH, TOKENS, PATCH * PATCH * 3),)


def eager_scatter(rows: Tensor) -> Tensor:
    pixels = rows.view(BATCH, *GRID, 1, PATCH, PATCH, 3).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return pixels.reshape(BATCH, 3, 1, SIDE, SIDE)


def projection_inputs(
    device: torch.device, dtype: torch.dtype, g: torch.Generator, columns: int = 3 * WIDTH
) -> tuple[Any, ...]:
    """Tokens, and the weight and bias that make `columns` of their width."""
    weight = normal(g, device, dtype, columns, WIDTH) / 28
    return normal(g, device, dtype, BATCH, TOKENS, WIDTH), weight, normal(g, device, dtype, columns)


def eager_unembed(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return eager_scatter(F.linear(tokens, weight, bias))


def noise_inputs(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> tuple[Any, ...]:
    return (torch.arange(BATCH, device=device),)


def eager_noise(sample_ids: Tensor) -> Tensor:
    """Torch's own noise, which depends on the batch."""
    return torch.randn(BATCH, TOKENS * CHANNELS, device=sample_ids.device)


def noise(sample_ids: Tensor, impl: str) -> Tensor:
    return ops.normal_noise(0, sample_ids, TOKENS * CHANNELS, impl=impl)


def norm_inputs(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> tuple[Any, ...]:
    return normal(g, device, dtype, BATCH, TOKENS, WIDTH), 1 + 0.1 * normal(g, device, dtype, WIDTH)


def add_norm_inputs(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> tuple[Any, ...]:
    x, weight = norm_inputs(device, dtype, g)
    return x, torch.randn_like(x), weight


def eager_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (WIDTH,), weight, 1e-6)


def eager_layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,), weight, None, 1e-6)


def eager_add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, (WIDTH,), weight, 1e-6), total


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return ops.add_norm(x, residual, weight, kind="rms", eps=1e-6, impl=impl)


def qkv_inputs(
    device: torch.device,
    dtype: torch.dtype,
    g: torch.Generator,
    batch: int = BATCH,
    side: int = GRID[1],
    heads: int = HEADS,
    head_dim: int = WIDTH // HEADS,
    weights: bool = False,
) -> tuple[Any, ...]:
    grid = (1, side, side)
    qkv = normal(g, device, dtype, batch, side * side, 3, heads, head_dim)
    table = rope_table(coordinates(grid, device), grid, head_dim, "3d", 1e4)
    pair = [1 + 0.1 * normal(g, device, dtype, head_dim) for _ in range(2)] if weights else [None, None]
    return qkv, *pair, table


def eager_rope(qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, table: Tensor) -> Tensor:
    """As transformers in eager mode do it: split, normalise, rotate in fp32, cast back, join."""
    q, k, v = qkv.unbind(2)
    if q_weight is not None and k_weight is not None:
        q, k = (F.rms_norm(x, x.shape[-1:], w, 1e-6) for x, w in ((q, q_weight), (k, k_weight)))
    cos, sin = (torch.cat((x, x), -1)[:, None] for x in table)

    def rotate(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, -1)
        return (x.float() * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)

    return torch.stack((rotate(q), rotate(k), v), 2)


def sdpa(qkv: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2)


def eager_attention(qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, table: Tensor) -> Tensor:
    return sdpa(eager_rope(qkv, q_weight, k_weight, table))


def plain_sdpa(qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, table: Tensor) -> Tensor:
    return sdpa(qkv)


def gate_inputs(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> tuple[Any, ...]:
    return (normal(g, device, dtype, BATCH, TOKENS, 2 * HIDDEN),)


def eager_gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def tiny_inputs(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> tuple[Any, ...]:
    return normal(g, device, dtype, 1, 16), torch.empty(1, 8, dtype=dtype, device=device)


def eager_tiny(gate_up: Tensor, out: Tensor) -> Tensor:
    return torch.mul(out, out)


def library_call(gate_up: Tensor, out: Tensor) -> Tensor:
    """The compiled function on memory that is there: what Python, pybind11 and the kernel's own checks cost."""
    _native.run("gated_mlp_act_forward", gate_up, gate_up.data_ptr(), "float32", 1, 8, 16, False, out.data_ptr())
    return out


def tiny_gate(gate_up: Tensor, out: Tensor) -> Tensor:
    return ops.gated_mlp_act(gate_up)


def moments_inputs(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> tuple[Any, ...]:
    return (normal(g, device, dtype, BATCH, TOKENS, 2 * CHANNELS),)


def eager_sample(moments: Tensor) -> tuple[Tensor, Tensor]:
    """With torch's own noise, which depends on the batch."""
    mean, logvar = moments.chunk(2, -1)
    logvar = logvar.clamp(-30, 20)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).mean(1)
    return mean + (0.5 * logvar).exp() * torch.randn_like(mean), kl


def eager_bottleneck(tokens: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return eager_sample(F.linear(tokens, weight, bias))


def bottleneck(tokens: Tensor, weight: Tensor, bias: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    z, _, _, kl = ops.gaussian_bottleneck(tokens, weight, bias, seed=0, impl=impl)
    return z, kl


def loss_inputs(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> tuple[Any, ...]:
    target = torch.randint(0, 256, (BATCH, 1, SIDE, SIDE, 3), dtype=torch.uint8, generator=g).to(device)
    return normal(g, device, dtype, BATCH, TOKENS, PATCH * PATCH * 3), target


def eager_loss(rows: Tensor, target: Tensor) -> Tensor:
    image = (target.permute(0, 4, 1, 2, 3).float() / 127.5 - 1).to(rows.dtype)
    return (eager_scatter(rows) - image).square().flatten(1).mean(1)


# Two draws differ, so these are timed without comparing numbers; tests/ops does that.
DRAWN = ("native", "triton", "reference", "torch.compile", "linear, clamp, randn, KL", "clamp, randn, KL")
ELEMENTS, PIXELS = BATCH * TOKENS * WIDTH, BATCH * SIDE * SIDE * 3


def attention_case(name: str, batch: int, side: int, heads: int, head_dim: int) -> Case:
    length = side * side
    flops = 4 * batch * heads * length**2 * head_dim
    return Case(
        name,
        f"{batch} x {length} tokens, {heads} heads of {head_dim}",
        partial(qkv_inputs, batch=batch, side=side, heads=heads, head_dim=head_dim),
        "rope + SDPA",
        {
            "rope + SDPA": eager_attention,
            "SDPA alone": plain_sdpa,
            # They build the L x L matrix: at these lengths minutes a run to learn that it is slow.
            **implementations(
                "attention",
                lambda *inputs, impl: ops.attention(*inputs, impl=impl),
                leave_out=("reference", "sdpa:math") if length > 1024 else (),
            ),
        },
        "attention",
        different=("SDPA alone",),
        flops=flops,
        backward_flops=5 * flops // 2,
    )


def cases() -> list[Case]:
    rms = partial(ops.norm, kind="rms", eps=1e-6)
    layer = partial(ops.norm, kind="layer", eps=1e-6)
    embed = partial(ops.tubelet_embed, tubelet=(1, PATCH))
    unembed = partial(ops.tubelet_unembed, tubelet=(1, PATCH), size=(1, SIDE, SIDE))
    loss = partial(ops.pixel_loss, tubelet=(1, PATCH), kind="l2")
    return [
        Case(
            "tubelet_embed",
            f"uint8 {BATCH} x {SIDE} x {SIDE} channels-last, width {WIDTH}",
            embed_inputs,
            "float image + Conv3d",
            {"float image + Conv3d": eager_embed, **implementations("tubelet_embed", embed)},
            "tubelet_embed",
            bytes=lambda size: PIXELS + size * (ELEMENTS + WIDTH * PATCH * PATCH * 3),
            flops=2 * ELEMENTS * PATCH * PATCH * 3,
            backward=False,
        ),
        Case(
            "tubelet_gather",
            f"uint8 {BATCH} x {SIDE} x {SIDE} channels-last",
            embed_inputs,
            "float image + permute",
            {
                "float image + permute": eager_gather,
                **implementations(
                    "tubelet_gather",
                    lambda pixels, weight, bias, impl: ops.tubelet_gather(
                        pixels, tubelet=(1, PATCH), dtype=weight.dtype, impl=impl
                    ),
                ),
            },
            "tubelet_gather",
            bytes=lambda size: PIXELS * (1 + size),
            backward=False,
        ),
        Case(
            "tubelet_scatter",
            f"{BATCH} x {SIDE} x {SIDE}",
            unembed_inputs,
            "permute",
            {
                "permute": eager_scatter,
                **implementations(
                    "tubelet_scatter",
                    lambda rows, impl: ops.tubelet_scatter(rows, tubelet=(1, PATCH), size=(1, SIDE, SIDE), impl=impl),
                ),
            },
            "tubelet_scatter",
            bytes=lambda size: 2 * size * PIXELS,
            backward_bytes=lambda size: 2 * size * PIXELS,
        ),
        Case(
            "tubelet_unembed",
            f"{BATCH} x {SIDE} x {SIDE}, width {WIDTH}",
            partial(projection_inputs, columns=PATCH * PATCH * 3),
            "linear + permute",
            {
                "linear + permute": eager_unembed,
                **implementations("tubelet_unembed", unembed),
            },
            "tubelet_unembed",
            bytes=lambda size: size * (ELEMENTS + WIDTH * PATCH * PATCH * 3 + PIXELS),
            flops=2 * ELEMENTS * PATCH * PATCH * 3,
            backward_flops=4 * ELEMENTS * PATCH * PATCH * 3,
        ),
        Case(
            "linear",
            f"{BATCH * TOKENS} x {WIDTH} to {3 * WIDTH}",
            projection_inputs,
            "F.linear",
            {"F.linear": F.linear, **implementations("linear", ops.linear)},
            "linear",
            flops=2 * ELEMENTS * 3 * WIDTH,
            backward_flops=4 * ELEMENTS * 3 * WIDTH,
        ),
        Case(
            "rms_norm",
            f"{BATCH * TOKENS} x {WIDTH}",
            norm_inputs,
            "F.rms_norm",
            {"F.rms_norm": eager_rms_norm, **implementations("norm", rms), **fused(eager_rms_norm)},
            "norm",
            bytes=lambda size: 2 * size * ELEMENTS,
            backward_bytes=lambda size: 3 * size * ELEMENTS,
        ),
        Case(
            "layer_norm",
            f"{BATCH * TOKENS} x {WIDTH}",
            norm_inputs,
            "F.layer_norm",
            {"F.layer_norm": eager_layer_norm, **implementations("norm", layer), **fused(eager_layer_norm)},
            "norm",
            bytes=lambda size: 2 * size * ELEMENTS,
            backward_bytes=lambda size: 3 * size * ELEMENTS,
        ),
        Case(
            "add_norm",
            f"{BATCH * TOKENS} x {WIDTH}, rms",
            add_norm_inputs,
            "x + residual, F.rms_norm",
            {
                "x + residual, F.rms_norm": eager_add_norm,
                **implementations("add_norm", add_norm),
                **fused(eager_add_norm),
            },
            "add_norm",
            bytes=lambda size: 4 * size * ELEMENTS,
            backward_bytes=lambda size: 4 * size * ELEMENTS,
        ),
        *(
            Case(
                name,
                f"{BATCH} x {TOKENS} tokens, {HEADS} heads of {WIDTH // HEADS}",
                partial(qkv_inputs, weights=weights),
                "eager rope",
                {
                    "eager rope": eager_rope,
                    **implementations("qk_norm_rope", lambda *inputs, impl: ops.qk_norm_rope(*inputs, impl=impl)),
                    **fused(eager_rope),
                },
                "qk_norm_rope",
                bytes=lambda size: 6 * size * ELEMENTS,
                backward_bytes=lambda size: 8 * size * ELEMENTS,
            )
            for name, weights in (("rope", False), ("qk_norm_rope", True))
        ),
        attention_case("attention 256", BATCH, 16, HEADS, 64),
        attention_case("attention 1024", 1, 32, HEADS, 64),
        attention_case("attention 4096", 1, 64, HEADS, 64),
        attention_case("attention 1024, head_dim 72", 1, 32, 16, 72),
        Case(
            "gated_mlp_act",
            f"{BATCH * TOKENS} x 2 x {HIDDEN}, silu",
            gate_inputs,
            "chunk, F.silu, *",
            {
                "chunk, F.silu, *": eager_gate,
                **implementations("gated_mlp_act", ops.gated_mlp_act),
                **fused(eager_gate),
            },
            "gated_mlp_act",
            bytes=lambda size: 3 * size * BATCH * TOKENS * HIDDEN,
            backward_bytes=lambda size: 5 * size * BATCH * TOKENS * HIDDEN,
        ),
        Case(
            "call of 8 numbers",
            "1 x 2 x 8",
            tiny_inputs,
            "torch.mul",
            {"torch.mul": eager_tiny, "the library alone": library_call, "gated_mlp_act": tiny_gate},
            "gated_mlp_act",
            dtypes=(torch.float32,),
            backward=False,
            different=("the library alone", "gated_mlp_act"),
        ),
        Case(
            "gaussian_bottleneck",
            f"{BATCH} x {TOKENS} tokens, width {WIDTH} to {CHANNELS} channels",
            partial(projection_inputs, columns=2 * CHANNELS),
            "linear, clamp, randn, KL",
            {"linear, clamp, randn, KL": eager_bottleneck, **implementations("gaussian_bottleneck", bottleneck)},
            "gaussian_bottleneck",
            different=DRAWN,
            bytes=lambda size: size * ELEMENTS,
            backward_bytes=lambda size: 2 * size * ELEMENTS,
        ),
        Case(
            "gaussian_sample",
            f"{BATCH} x {TOKENS} tokens, {CHANNELS} channels",
            moments_inputs,
            "clamp, randn, KL",
            {
                "clamp, randn, KL": eager_sample,
                **implementations(
                    "gaussian_bottleneck", lambda moments, impl: ops.gaussian_sample(moments, seed=0, impl=impl)
                ),
                **fused(eager_sample),
            },
            "gaussian_bottleneck",
            different=DRAWN,
            bytes=lambda size: 3 * size * BATCH * TOKENS * CHANNELS,
            backward_bytes=lambda size: 5 * size * BATCH * TOKENS * CHANNELS,
        ),
        Case(
            "normal_noise",
            f"{BATCH} samples of {TOKENS * CHANNELS}",
            noise_inputs,
            "randn",
            {"randn": eager_noise, **implementations("normal_noise", noise)},
            "normal_noise",
            dtypes=(torch.float32,),
            different=("native", "triton", "reference"),
            bytes=lambda size: size * BATCH * TOKENS * CHANNELS,
            backward=False,
        ),
        Case(
            "pixel_loss",
            f"{BATCH} x {SIDE} x {SIDE} uint8, l2",
            loss_inputs,
            "image, permute, mse",
            {"image, permute, mse": eager_loss, **implementations("pixel_loss", loss), **fused(eager_loss)},
            "pixel_loss",
            bytes=lambda size: PIXELS * (1 + size),
            backward_bytes=lambda size: PIXELS * (1 + 2 * size),
        ),
    ]
