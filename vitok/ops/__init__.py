"""The mathematics of a ViTok: one module an op, each a function, its eager reference and faster implementations."""

from vitok.ops._registry import Choice, ImplementationError, Preference, check_environment, choices, preferences
from vitok.ops.attention import attention
from vitok.ops.gated_mlp_act import gated_mlp_act
from vitok.ops.gaussian_bottleneck import gaussian_bottleneck, gaussian_sample
from vitok.ops.linear import linear
from vitok.ops.noise import normal_noise
from vitok.ops.norm import add_norm, norm
from vitok.ops.packed_linear import PackedLinear, pack_linear
from vitok.ops.pixel_loss import pixel_loss
from vitok.ops.qk_norm_rope import qk_norm_rope
from vitok.ops.quantize_rows import dequantize, quantize_rows
from vitok.ops.tubelet_embed import tubelet_embed, tubelet_gather
from vitok.ops.tubelet_unembed import tubelet_scatter, tubelet_unembed

__all__ = [
    "Choice",
    "ImplementationError",
    "PackedLinear",
    "Preference",
    "add_norm",
    "attention",
    "choices",
    "dequantize",
    "gated_mlp_act",
    "gaussian_bottleneck",
    "gaussian_sample",
    "linear",
    "norm",
    "normal_noise",
    "pack_linear",
    "pixel_loss",
    "preferences",
    "qk_norm_rope",
    "quantize_rows",
    "tubelet_embed",
    "tubelet_gather",
    "tubelet_scatter",
    "tubelet_unembed",
]

check_environment()
