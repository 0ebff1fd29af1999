"""The mathematics of a ViTok: one module an op, each a function, its eager reference and faster implementations."""

from vitok.ops._registry import Choice, ImplementationError, choices
from vitok.ops.attention import attention
from vitok.ops.gated_mlp_act import gated_mlp_act
from vitok.ops.noise import normal_noise
from vitok.ops.norm import norm
from vitok.ops.qk_norm_rope import qk_norm_rope
from vitok.ops.tubelet_embed import tubelet_embed, tubelet_gather
from vitok.ops.tubelet_unembed import tubelet_scatter, tubelet_unembed

__all__ = [
    "Choice",
    "ImplementationError",
    "attention",
    "choices",
    "gated_mlp_act",
    "norm",
    "normal_noise",
    "qk_norm_rope",
    "tubelet_embed",
    "tubelet_gather",
    "tubelet_scatter",
    "tubelet_unembed",
]
