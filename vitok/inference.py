"""A model made ready for inference once: folded, packed, quantised, captured; the same `encode` and `decode`.

Folded are the weights of a norm into the matrix after it and LayerScale into the matrix before the sum; the scale of q
costs nothing inside the attention kernels. A block is then a few maps of `vitok.ops.pack_linear` around its attention:

    serial     x += proj(attention(qkv(norm x)));  x += down(gate * up (norm x))
    parallel   x += proj(attention(qkv(norm x))) + down(gate * up (norm x))

On the CPU norm, gate and residual sum are done inside the products. Elsewhere norms and gates are kernels between the
library's products, and quantise what they make where those are of 8 bits; a parallel block has two products there,
qkv|gate|up and proj|down.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from vitok import ops
from vitok.errors import InputError
from vitok.graphs import Graphs
from vitok.layers import Attention, Branch, FeedForward, Grid, Linear, Norm, ParallelBlock, Places, SerialBlock, Stack
from vitok.model import Decoder, Encoder, ViTok
from vitok.ops.packed_linear import QUANTIZED, pack_linear

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
KEPT = 16  # grids whose positions are kept
M = TypeVar("M", bound=nn.Module)


class FastViTok(ViTok):
    """What `ViTok.for_inference` makes: a `ViTok` with fixed weights, device and dtype, without gradients."""

    def __init__(self, model: ViTok, dtype: torch.dtype | str, graphs: bool | str) -> None:
        nn.Module.__init__(self)
        self.config = model.config
        folder = _folder(dtype, model.device)
        captured = _graphs(graphs, model.device)
        self.encoder = FoldedEncoder(model.encoder, folder, captured)
        self.decoder = FoldedDecoder(model.decoder, folder, captured)
        self.eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FastViTok:
        raise InputError("a model made by for_inference stays on its device and in its dtype; make another one instead")

    def for_inference(self, dtype: torch.dtype | str = torch.bfloat16, *, graphs: bool | str = "auto") -> FastViTok:
        raise InputError("a model made by for_inference cannot be made into another; use the model it was made of")

    def save(self, directory: object) -> None:
        raise InputError("a model made by for_inference cannot be saved; save the model it was made of")


class FoldedEncoder(Encoder):
    stack: FoldedStack

    def __init__(self, encoder: Encoder, folder: Folder, graphs: Graphs | None) -> None:
        nn.Module.__init__(self)
        self.config, self.graphs = encoder.config, graphs
        self.embed = folder.frozen(encoder.embed)
        self.stack = FoldedStack(encoder.stack, folder)
        linears = dict(encoder.bottleneck.named_children())
        self.bottleneck = folder.frozen(encoder.bottleneck, *linears)
        for name, linear in linears.items():
            assert isinstance(linear, Linear)
            setattr(self.bottleneck, name, folder.map(linear, encoder.stack.norm, exact=True))
        self.stack.norm = None

    def code(self, clip: Tensor, chunk: int | None = None) -> Tensor:
        run = super().code
        if self.graphs is None or chunk is not None:
            return run(clip, chunk)
        return self.graphs(run, clip, reads=self.stack.known)


class FoldedDecoder(Decoder):
    from_latents: nn.Module  # type: ignore[assignment]
    stack: FoldedStack

    def __init__(self, decoder: Decoder, folder: Folder, graphs: Graphs | None) -> None:
        nn.Module.__init__(self)
        self.config, self.graphs = decoder.config, graphs
        self.from_latents = folder.map(decoder.from_latents, exact=True)
        self.stack = FoldedStack(decoder.stack, folder)
        self.unembed = folder.frozen(decoder.unembed)

    def forward(self, latents: Tensor, size: tuple[int, int, int], chunk: int | None = None) -> Tensor:
        run = super().forward
        if self.graphs is None or chunk is not None:
            return run(latents, size, chunk)
        return self.graphs(run, latents, size, reads=self.stack.known)


class FoldedStack(Stack):
    """A `Stack` of folded blocks that keeps the positions of the grids it met last."""

    def __init__(self, stack: Stack, folder: Folder) -> None:
        nn.Module.__init__(self)
        self.config, self.stack = stack.config, stack.stack
        self.blocks = nn.ModuleList(folder.block(block) for block in stack.blocks)
        self.norm = None if stack.norm is None else folder.frozen(stack.norm)
        self.known: dict[Grid, tuple[Tensor | None, Tensor | None]] = {}

    def _tables(self, grid: Grid, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        if grid not in self.known:
            if len(self.known) == KEPT:
                del self.known[next(iter(self.known))]
            self.known[grid] = super()._tables(grid, device)
        return self.known[grid]


class FoldedSerialBlock(nn.Module):
    """A `SerialBlock` in four maps; adds to x where it lies and leaves no branch to be added."""

    def __init__(self, block: SerialBlock, folder: Folder) -> None:
        super().__init__()
        norms, scales = (
            (block.attention_norm, block.feed_forward_norm),
            (block.attention_scale, block.feed_forward_scale),
        )
        self._fold(block.attention, block.feed_forward, norms, scales, folder)

    def _fold(
        self,
        attention: Attention,
        feed_forward: FeedForward,
        norms: tuple[Norm, Norm],
        scales: tuple[Tensor | None, Tensor | None],
        folder: Folder,
    ) -> None:
        after, before = (feed_forward.gate, None) if folder.gates_after else (None, feed_forward.gate)
        self.qkv = folder.map(attention.qkv, norms[0])
        self.attention = folder.frozen(attention, "qkv", "proj")
        self.proj = folder.map(attention.proj, scale=scales[0])
        self.gate_up = folder.map(feed_forward.gate_up, norms[1], after=after)
        self.down = folder.map(feed_forward.down, scale=scales[1], before=before)

    def forward(self, x: Tensor, branch: Branch | None, places: Places) -> tuple[Tensor, None]:
        return self.leave(x, self.attention.attend(self.qkv(x), places))

    def enter(self, x: Tensor, branch: Branch | None) -> tuple[Tensor, Tensor]:
        return self.qkv(x), x

    def leave(self, x: Tensor, attended: Tensor) -> tuple[Tensor, None]:
        x = self.proj(attended, x)
        return self.down(self.gate_up(x), x), None


class FoldedParallelBlock(FoldedSerialBlock):
    """A `ParallelBlock` in four maps, for the CPU, where norm, gate and sum are part of them."""

    def __init__(self, block: ParallelBlock, folder: Folder) -> None:
        nn.Module.__init__(self)
        self._fold(block.attention, block.feed_forward, (block.norm,) * 2, (block.scale,) * 2, folder)

    def leave(self, x: Tensor, attended: Tensor) -> tuple[Tensor, None]:
        gated = self.gate_up(x)
        return self.down(gated, self.proj(attended, x)), None


class JoinedParallelBlock(nn.Module):
    """A `ParallelBlock` in two maps, qkv|gate|up and out|down: fewer and larger products."""

    def __init__(self, block: ParallelBlock, folder: Folder) -> None:
        super().__init__()
        attention, feed_forward = block.attention, block.feed_forward
        self.attention = folder.frozen(attention, "qkv", "proj")
        self.gate, self.qkv_width = feed_forward.gate, attention.qkv.out_features
        self.inner = folder.map(_joined(attention.qkv, feed_forward.gate_up, dim=0), block.norm)
        self.outer = folder.map(_joined(attention.proj, feed_forward.down, dim=1), scale=block.scale)

    def forward(self, x: Tensor, branch: Branch | None, places: Places) -> tuple[Tensor, None]:
        inner = self.inner(x)
        attended = self.attention.attend(inner[..., : self.qkv_width], places)
        return self._outer(x, attended, inner), None

    def enter(self, x: Tensor, branch: Branch | None) -> tuple[Tensor, Tensor]:
        return self.inner(x)[..., : self.qkv_width], x

    def leave(self, x: Tensor, attended: Tensor) -> tuple[Tensor, None]:
        return self._outer(x, attended, self.inner(x)), None  # once more: keeping it would take several times x

    def _outer(self, x: Tensor, attended: Tensor, inner: Tensor) -> Tensor:
        gated = ops.gated_mlp_act(inner[..., self.qkv_width :], gate=self.gate)
        return self.outer(torch.cat((attended, gated), -1), x)


class Map(nn.Module):
    """A `vitok.ops.PackedLinear` as a module."""

    def __init__(self, packed: ops.PackedLinear) -> None:
        super().__init__()
        self.packed = packed

    def forward(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        return self.packed(x, add_to=add_to)


@dataclass(frozen=True)
class Folder:
    """Makes the parts of a fast model: maps of `dtype` on `device`, of 8 bits where `quantize` says so."""

    dtype: torch.dtype
    device: torch.device
    quantize: str | None

    @property
    def gates_after(self) -> bool:
        """Whether a gate is part of the product before it, as on the CPU; elsewhere it quantises for the one after."""
        return self.device.type == "cpu"

    def block(self, block: nn.Module) -> nn.Module:
        if isinstance(block, SerialBlock):
            return FoldedSerialBlock(block, self)
        assert isinstance(block, ParallelBlock)
        # Measured on two cores, 3 + 3 blocks of width 768: four maps take 0.95 of the time of two (int8 0.96).
        return FoldedParallelBlock(block, self) if self.gates_after else JoinedParallelBlock(block, self)

    def map(
        self,
        linear: Linear,
        norm: Norm | None = None,
        *,
        scale: Tensor | None = None,
        before: str | None = None,
        after: str | None = None,
        exact: bool = False,
    ) -> Map:
        """scale * linear(norm(x)) with a gate before or after it; `exact` is never quantised."""
        weight = linear.weight.detach().float()
        bias = None if linear.bias is None else linear.bias.detach().float()
        if norm is not None and norm.bias is not None:
            shift = weight @ norm.bias.detach().float()
            bias = shift if bias is None else bias + shift
        if norm is not None:
            weight = weight * norm.weight.detach()
        if scale is not None:
            weight, bias = scale.detach()[:, None] * weight, None if bias is None else scale.detach() * bias
        # The library's products of 8 bits want multiples of 16.
        odd = self.device.type != "cpu" and any(n % 16 for n in weight.shape)
        return Map(
            pack_linear(
                weight, bias, dtype=self.dtype, quantize=None if exact or odd else self.quantize, after=after,
                before=before if norm is None else norm.kind, eps=0.0 if norm is None else norm.eps,
            )
        )  # fmt: skip

    def frozen(self, module: M, *without: str) -> M:
        """A copy in `dtype` that is not trained, with None for the children named."""
        left_out = {id(getattr(module, name)): None for name in without}
        return copy.deepcopy(module, left_out).to(self.dtype).requires_grad_(False)


def _joined(first: Linear, second: Linear, dim: int) -> Linear:
    """Two maps of one input (dim 0), or the sum of maps of two inputs (dim 1), as one."""
    weight = torch.cat((first.weight.detach(), second.weight.detach()), dim)
    biases = [x.weight.new_zeros(len(x.weight)) if x.bias is None else x.bias.detach() for x in (first, second)]
    outputs, inputs = weight.shape
    joined = Linear(inputs, outputs, bias=first.bias is not None or second.bias is not None, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if joined.bias is not None:
        joined.bias = nn.Parameter(torch.cat(biases) if dim == 0 else biases[0] + biases[1], requires_grad=False)
    return joined


def _folder(dtype: torch.dtype | str, device: torch.device) -> Folder:
    if dtype in FLOATS:
        return Folder(dtype, device, None)
    if dtype not in tuple(QUANTIZED):
        raise InputError(f"dtype must be torch.float32, torch.bfloat16, torch.float16, 'int8' or 'fp8', got {dtype!r}")
    if dtype == "fp8" and not (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)):
        raise InputError(
            f"dtype 'fp8' needs a CUDA device of compute capability 9.0 or newer, the model is on {device}; "
            "'int8' works there"
        )
    return Folder(torch.bfloat16, device, dtype)


def _graphs(graphs: bool | str, device: torch.device) -> Graphs | None:
    if graphs not in (True, False, "auto"):
        raise InputError(f"graphs must be True, False or 'auto', got {graphs!r}")
    if graphs is True and device.type != "cuda":
        raise InputError(f"graphs=True needs a model on a CUDA device, this one is on {device}; 'auto' goes without")
    return Graphs() if graphs and device.type == "cuda" else None
