"""Arguments for every public op: a few fixed cases of each, and random ones. Tests load this file by runpy.

`CASES[op]` holds parameters; `sample(op, dtype, device, **parameters)` makes arguments of them; `evaluate` calls the op
with one implementation, forward and backward.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitok import _native, ops
from vitok.ops import _triton


class Sample(NamedTuple):
    """`tensors` are differentiated where they are floating point, `constants` never are."""

    op: str
    dtype: torch.dtype
    tensors: dict[str, Tensor | None]
    constants: dict[str, Tensor | None]
    options: dict[str, Any]
    grad_layout: str


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "packed": lambda x: x,
    "offset": lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape),  # not aligned to 16 bytes
    "window": lambda x: torch.cat((x, x, x), -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "turned": lambda x: x.transpose(0, -2).contiguous().transpose(0, -2) if x.dim() > 1 else x,
    "every_second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand_as(x),
}


class Maker:
    """Random tensors of one dtype and device, the same numbers on every device."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, layout: str = "packed", mixed: bool = False) -> Tensor:
        x = torch.randn(shape, generator=self.generator)
        return LAYOUTS[layout](x.to(self.device, torch.float32 if mixed else self.dtype))

    def weight(self, *shape: int, wanted: bool = True, mixed: bool = False) -> Tensor | None:
        return 1 + 0.5 * self.normal(*shape, mixed=mixed) if wanted else None

    def image(self, shape: tuple[int, ...], uint8: bool, planar: bool) -> Tensor:
        """[B, T, H, W, 3] pixels, channels last or a view of a channels-first clip."""
        if uint8:
            x = torch.randint(0, 256, shape, generator=self.generator).to(self.device, torch.uint8)
        else:
            x = (2 * torch.rand(shape, generator=self.generator) - 1).to(self.device, self.dtype)
        return x.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1) if planar else x


# Each: (maker, parameters) -> (tensors, constants, options).
Parts = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]


def norm(make: Maker, shape: tuple[int, ...], kind: str, layout: str, affine: bool, bias: bool, mixed: bool) -> Parts:
    width = shape[-1]
    tensors = {
        "x": make.normal(*shape, layout=layout),
        "weight": make.weight(width, wanted=affine, mixed=mixed),
        "bias": make.weight(width, wanted=bias, mixed=mixed),
    }
    return tensors, {}, {"kind": kind, "eps": 1e-6}


def add_norm(make: Maker, scale: bool, **parameters: Any) -> Parts:
    shape = parameters["shape"]
    tensors, constants, options = norm(make, **parameters)
    tensors |= {"residual": make.normal(*shape), "scale": make.weight(shape[-1], wanted=scale)}
    return tensors, constants, options


def table(make: Maker, length: int, head_dim: int) -> Tensor:
    angles = torch.rand(length, head_dim // 2, generator=make.generator) * 2 * math.pi
    return torch.stack((angles.cos(), angles.sin())).to(make.device)


def qk_norm_rope(
    make: Maker, shape: tuple[int, int, int, int], layout: str, normed: bool, rotated: bool, mixed: bool
) -> Parts:
    batch, length, heads, head_dim = shape
    tensors = {
        "qkv": make.normal(batch, length, 3, heads, head_dim, layout=layout),
        "q_weight": make.weight(head_dim, wanted=normed, mixed=mixed),
        "k_weight": make.weight(head_dim, wanted=normed, mixed=mixed),
    }
    return tensors, {"table": table(make, length, head_dim) if rotated else None}, {}


def attention(
    make: Maker, window: int | None, causal_block: int | None, segments: tuple[int, ...] | None, **parameters: Any
) -> Parts:
    tensors, constants, options = qk_norm_rope(make, **parameters)
    ends = None if segments is None else torch.tensor(segments, dtype=torch.int32, device=make.device)
    return tensors, constants | {"cu_seqlens": ends}, options | {"window": window, "causal_block": causal_block}


def gated_mlp_act(make: Maker, shape: tuple[int, ...], layout: str, gate: str) -> Parts:
    return {"gate_up": make.normal(*shape[:-1], 2 * shape[-1], layout=layout)}, {}, {"gate": gate}


def tubelet_gather(
    make: Maker, size: tuple[int, int, int, int], tubelet: tuple[int, int], pad: str, uint8: bool, planar: bool
) -> Parts:
    pixels = make.image((*size, 3), uint8, planar)
    return {"pixels": pixels}, {}, {"tubelet": tubelet, "pad": pad, "dtype": make.dtype}


def tubelet_embed(make: Maker, width: int, bias: bool, tubelet: tuple[int, int], **parameters: Any) -> Parts:
    tensors, constants, options = tubelet_gather(make, tubelet=tubelet, **parameters)
    del options["dtype"]
    elements = 3 * tubelet[0] * tubelet[1] ** 2
    weight = make.normal(width, elements) * elements**-0.5
    return tensors | {"weight": weight, "bias": make.weight(width, wanted=bias)}, constants, options


def tubelet_unembed(
    make: Maker, size: tuple[int, int, int, int], tubelet: tuple[int, int], width: int, bias: int, layout: str,
    to_bytes: bool, last: bool,
) -> Parts:  # fmt: skip
    """`bias`: 0 for none, 3 for one a colour, 1 for one an element."""
    batch, frames, height, width_out = size
    (q, p), elements = tubelet, 3 * tubelet[0] * tubelet[1] ** 2
    tokens = -(-frames // q) * -(-height // p) * -(-width_out // p)
    tensors = {
        "tokens": make.normal(batch, tokens, width, layout=layout),
        "weight": make.normal(elements, width) * (0.3 * width**-0.5),
        "bias": None if bias == 0 else 0.1 * make.normal(3 if bias == 3 else elements),
    }
    options = {"tubelet": tubelet, "size": size[1:], "layout": "channels_last" if last else "channels_first"}
    return tensors, {}, options | {"out_dtype": torch.uint8 if to_bytes else None}


def pixel_loss(
    make: Maker, size: tuple[int, int, int, int], tubelet: tuple[int, int], kind: str, uint8: bool, planar: bool,
    layout: str,
) -> Parts:  # fmt: skip
    batch, frames, height, width = size
    q, p = tubelet
    tokens = -(-frames // q) * -(-height // p) * -(-width // p)
    tensors = {"prediction": make.normal(batch, tokens, 3 * q * p * p, layout=layout)}
    constants = {"target": make.image((*size, 3), uint8, planar)}
    return tensors, constants, {"tubelet": tubelet, "kind": kind}


def gaussian_sample(
    make: Maker, shape: tuple[int, int, int], layout: str, sample: bool, ids: bool, seed_tensor: bool
) -> Parts:
    batch, tokens, channels = shape
    moments = make.normal(batch, tokens, 2 * channels, layout=layout)
    constants = {"sample_ids": torch.arange(batch, device=make.device) * 7 + 2**33 if ids else None}
    seed = torch.tensor([12345], device=make.device) if seed_tensor else 2**63 + 5
    return {"moments": moments}, constants, {"seed": seed, "sample": sample}


def gaussian_bottleneck(make: Maker, width: int, bias: bool, **parameters: Any) -> Parts:
    batch, tokens, channels = parameters["shape"]
    _, constants, options = gaussian_sample(make, **parameters)
    tensors = {
        "tokens": make.normal(batch, tokens, width),
        "weight": make.normal(2 * channels, width) * width**-0.5,
        "bias": make.weight(2 * channels, wanted=bias),
    }
    return tensors, constants, options


def normal_noise(make: Maker, batch: int, elements: int) -> Parts:
    return {}, {"sample_ids": torch.arange(batch, device=make.device)}, {"seed": 7, "elements": elements}


MAKERS: dict[str, Callable[..., Parts]] = {
    "norm": norm,
    "add_norm": add_norm,
    "qk_norm_rope": qk_norm_rope,
    "attention": attention,
    "gated_mlp_act": gated_mlp_act,
    "tubelet_gather": tubelet_gather,
    "tubelet_embed": tubelet_embed,
    "tubelet_unembed": tubelet_unembed,
    "pixel_loss": pixel_loss,
    "gaussian_sample": gaussian_sample,
    "gaussian_bottleneck": gaussian_bottleneck,
    "normal_noise": normal_noise,
}


def sample(
    op: str, dtype: torch.dtype, device: str = "cpu", *, seed: int = 0, grad_layout: str = "packed", **parameters: Any
) -> Sample:
    return Sample(op, dtype, *MAKERS[op](Maker(dtype, device, seed), **parameters), grad_layout)


def in_float64(given: Sample) -> Sample:
    """The same numbers in float64 on the CPU."""

    def wide(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.detach().cpu().double() if x.is_floating_point() else x.cpu()
        return torch.float64 if x is given.dtype else x

    constants = {name: None if x is None else x.cpu() for name, x in given.constants.items()}
    tensors, options = ({name: wide(x) for name, x in part.items()} for part in (given.tensors, given.options))
    return Sample(given.op, given.dtype, tensors, constants, options, given.grad_layout)


def incoming(given: Sample, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A gradient for every floating-point output, the same for every implementation and device."""
    seeds = {}
    for n, (name, x) in enumerate(outputs.items()):
        if name.startswith("output") and x.is_floating_point():
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(100 + n)).to(given.dtype)
            layout = LAYOUTS[given.grad_layout] if x.dim() else LAYOUTS["packed"]
            seeds[name] = layout(noise.to(x.device, x.dtype))
    return seeds


def evaluate(given: Sample, impl: str, seeds: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Outputs and gradients by name; `seeds` are the incoming gradients, by default those of `incoming`."""
    leaves = {name: x if x is None else x.detach() for name, x in given.tensors.items()}
    floats = {name: x.requires_grad_() for name, x in leaves.items() if x is not None and x.is_floating_point()}
    made = getattr(ops, given.op)(**leaves, **given.constants, **given.options, impl=impl)
    outputs = {f"output {n}": x for n, x in enumerate(made if isinstance(made, tuple) else (made,))}
    found = {name: x.detach() for name, x in outputs.items()}
    differentiable = {name: x for name, x in outputs.items() if x.requires_grad}
    if differentiable:
        seeds = incoming(given, found) if seeds is None else seeds
        grads = torch.autograd.grad(
            list(differentiable.values()),
            list(floats.values()),
            [seeds[name] for name in differentiable],
            allow_unused=True,
        )
        found |= {f"gradient of {n}": x for n, x in zip(floats, grads, strict=True) if x is not None}
    return found


def unavailable(op: str, impl: str, device: str) -> str:
    """Why this machine cannot run an implementation, or ""; only then may a test of it be skipped."""
    if impl == "native" and _native.library() is None:
        return f"no native library: {_native.reason()}"
    if impl == "native" and device == "cuda":
        return (
            "attention has no native CUDA kernel"
            if op == "attention"
            else _native.refuses(torch.empty(0, device=device))
        )
    if impl == "triton":
        return _triton.MISSING or _triton.refuses(torch.empty(0, device=device))
    return ""


def compare(given: Sample, impl: str, judge: Callable[[Tensor, Tensor, Tensor], None]) -> None:
    """`judge` every output and gradient of an implementation by the eager composition and float64."""
    found, baseline = evaluate(given, impl), evaluate(given, "reference")
    oracle = evaluate(in_float64(given), "reference")
    assert found.keys() == baseline.keys() == oracle.keys()
    for name, x in oracle.items():
        print(name, end=": ")
        if x.numel():
            judge(found[name].cpu(), baseline[name].cpu(), x.double())
        else:
            assert found[name].shape == x.shape


# What differs from one case to the next, op by op. Small enough for the sanitizers, with the odd sizes that occur.
ROWS = {"layout": "packed", "affine": True, "bias": False, "mixed": False}
FULL = {"layout": "packed", "normed": False, "rotated": False, "mixed": False, "window": None, "causal_block": None,
        "segments": None}  # fmt: skip
CASES: dict[str, list[dict[str, Any]]] = {
    "norm": [
        {"shape": (5, 768), "kind": "rms", **ROWS},
        {"shape": (3, 2050), "kind": "layer", **ROWS, "bias": True, "grad_layout": "expanded"},
        {"shape": (2, 3, 77), "kind": "layer", **ROWS, "layout": "turned", "affine": False},
        {"shape": (4, 96), "kind": "rms", **ROWS, "layout": "window", "mixed": True},
        {"shape": (70, 3075), "kind": "rms", **ROWS, "layout": "offset"},
        {"shape": (0, 64), "kind": "rms", **ROWS},
    ],
    "add_norm": [
        {"shape": (5, 768), "kind": "rms", "scale": False, **ROWS},
        {"shape": (2, 9, 2050), "kind": "layer", "scale": True, **ROWS, "bias": True, "mixed": True},
        {"shape": (3, 77), "kind": "rms", "scale": True, **ROWS, "layout": "turned", "grad_layout": "turned"},
    ],
    "qk_norm_rope": [
        {"shape": (2, 20, 3, 64), "layout": "packed", "normed": True, "rotated": True, "mixed": False},
        {"shape": (1, 33, 2, 72), "layout": "window", "normed": False, "rotated": True, "mixed": False},
        {"shape": (2, 7, 2, 80), "layout": "turned", "normed": True, "rotated": False, "mixed": True},
        {"shape": (1, 5, 1, 128), "layout": "expanded", "normed": True, "rotated": True, "mixed": False,
         "grad_layout": "turned"},
    ],
    "attention": [
        {"shape": (2, 70, 3, 64), **FULL},
        {"shape": (1, 130, 2, 72), **FULL, "normed": True, "rotated": True},
        {"shape": (2, 65, 2, 80), **FULL, "window": 9, "layout": "window"},
        {"shape": (1, 96, 1, 96), **FULL, "causal_block": 16, "rotated": True, "grad_layout": "expanded"},
        {"shape": (1, 129, 1, 128), **FULL, "segments": (0, 1, 65, 65, 129), "normed": True, "mixed": True},
    ],
    "gated_mlp_act": [
        {"shape": (6, 2048), "layout": "packed", "gate": "silu"},
        {"shape": (3, 2050), "layout": "window", "gate": "gelu", "grad_layout": "expanded"},
        {"shape": (2, 3, 77), "layout": "turned", "gate": "silu"},
    ],
    "tubelet_gather": [
        {"size": (2, 1, 33, 48), "tubelet": (1, 16), "pad": "edge", "uint8": True, "planar": False},
        {"size": (1, 5, 16, 20), "tubelet": (4, 8), "pad": "zero", "uint8": False, "planar": True},
    ],
    "tubelet_embed": [
        {"size": (2, 1, 33, 48), "tubelet": (1, 16), "pad": "edge", "uint8": True, "planar": False, "width": 96,
         "bias": True},
        {"size": (1, 5, 16, 20), "tubelet": (4, 8), "pad": "zero", "uint8": False, "planar": True, "width": 40,
         "bias": False},
    ],
    "tubelet_unembed": [
        {"size": (2, 1, 33, 48), "tubelet": (1, 16), "width": 96, "bias": 1, "layout": "packed", "to_bytes": False,
         "last": False},
        {"size": (1, 5, 16, 20), "tubelet": (4, 8), "width": 40, "bias": 3, "layout": "window", "to_bytes": False,
         "last": True},
    ],
    "pixel_loss": [
        {"size": (2, 1, 33, 48), "tubelet": (1, 16), "kind": "l2", "uint8": True, "planar": False, "layout": "packed"},
        {"size": (2, 5, 16, 20), "tubelet": (4, 8), "kind": "charbonnier", "uint8": False, "planar": True,
         "layout": "window", "grad_layout": "expanded"},
        {"size": (3, 1, 16, 20), "tubelet": (1, 8), "kind": "l1", "uint8": True, "planar": True, "layout": "turned"},
    ],
    "gaussian_sample": [
        {"shape": (3, 65, 16), "layout": "packed", "sample": True, "ids": False, "seed_tensor": False},
        {"shape": (2, 9, 7), "layout": "turned", "sample": True, "ids": True, "seed_tensor": True,
         "grad_layout": "turned"},
        {"shape": (2, 33, 64), "layout": "window", "sample": False, "ids": False, "seed_tensor": False},
    ],
    "gaussian_bottleneck": [
        {"shape": (3, 65, 16), "layout": "packed", "sample": True, "ids": False, "seed_tensor": True, "width": 96,
         "bias": True},
    ],
    "normal_noise": [{"batch": 3, "elements": 4099}],
}  # fmt: skip


def random_parameters(op: str, rng: random.Random) -> dict[str, Any]:
    """Parameters for `sample`, drawn anew: any layout, odd widths, absent tensors."""

    def flag() -> bool:
        return rng.random() < 0.5

    def size(most: int) -> int:
        return min(most, rng.choice([1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 48, 63, 64, 65, 77, 100, 129, 257]))

    common: dict[str, Any] = {"grad_layout": rng.choice(list(LAYOUTS)), "seed": rng.randrange(1000)}
    layout = rng.choice(list(LAYOUTS))
    shape = tuple(size(9) for _ in range(rng.randrange(3)))
    if op in ("norm", "add_norm"):
        common |= {"shape": (*shape, size(300)), "kind": rng.choice(["rms", "layer"]), "layout": layout}
        common |= {"affine": flag(), "bias": flag(), "mixed": flag()}
        return common | ({"scale": flag()} if op == "add_norm" else {})
    if op in ("qk_norm_rope", "attention"):
        length, head_dim = size(129), rng.choice([8, 16, 24, 64, 72, 80, 96, 128, rng.randrange(2, 140, 2)])
        common |= {"shape": (size(3), length, size(3), head_dim), "layout": layout}
        common |= {"normed": flag(), "rotated": flag(), "mixed": flag()}
        if op == "attention":
            kind = rng.randrange(4)
            common |= {"window": size(40) - 1 if kind == 1 else None, "causal_block": size(40) if kind == 2 else None}
            ends = None
            if kind == 3:
                common["shape"] = (1, *common["shape"][1:])
                ends = (0, *sorted(rng.randint(0, length) for _ in range(rng.randrange(4))), length)
            common["segments"] = ends
        return common
    if op == "gated_mlp_act":
        return common | {"shape": (*shape, size(300)), "layout": layout, "gate": rng.choice(["silu", "gelu"])}
    if op in ("tubelet_gather", "tubelet_embed"):
        frames, edge = rng.randint(1, 3), rng.choice([1, 2, 3, 4, 8, 16])
        common |= {"size": (rng.randint(0, 2), size(5), size(40), size(40)), "tubelet": (frames, edge)}
        common |= {"pad": rng.choice(["edge", "zero"]), "uint8": flag(), "planar": flag()}
        return common | ({"width": size(33), "bias": flag()} if op == "tubelet_embed" else {})
    if op == "tubelet_unembed":
        common |= {"size": (rng.randint(0, 2), size(5), size(40), size(40)), "tubelet": (rng.randint(1, 3), size(16))}
        common |= {"width": size(33), "bias": rng.choice([0, 1, 3]), "layout": layout}
        return common | {"to_bytes": False, "last": flag()}  # bytes differ by one where float64 rounds otherwise
    if op == "pixel_loss":
        common |= {"size": (rng.randint(0, 2), size(5), size(40), size(40)), "tubelet": (rng.randint(1, 3), size(16))}
        return common | {
            "kind": rng.choice(["l1", "l2", "charbonnier"]), "uint8": flag(), "planar": flag(), "layout": layout,
        }  # fmt: skip
    if op in ("gaussian_sample", "gaussian_bottleneck"):
        common |= {"shape": (size(4), size(100), size(33)), "layout": layout, "sample": flag(), "ids": flag()}
        common |= {"seed_tensor": flag()}
        return common | ({"width": size(33), "bias": flag()} if op == "gaussian_bottleneck" else {})
    if op == "normal_noise":
        return {"batch": size(5), "elements": rng.choice([0, 1, 2, 3, 4, 5, 100, 4099]), "seed": common["seed"]}
    raise KeyError(op)
