// Every native kernel: its name and the struct of its arguments. A new one is a line here, a header beside this file with the
// struct, and a function of this name in cpu/ and, with _cuda behind it, in cuda/; the rest follows from the list.
#pragma once

#include "attention.h"
#include "gated_mlp_act.h"
#include "gaussian_sample.h"
#include "noise.h"
#include "norm.h"
#include "packed_linear.h"
#include "pixel_loss.h"
#include "qk_norm_rope.h"
#include "tubelet_gather.h"
#include "tubelet_scatter.h"

#define VITOK_OPS(op)                                    \
    op(gated_mlp_act_backward, GatedMlpActBackward)      \
    op(gated_mlp_act_forward, GatedMlpActForward)        \
    op(gaussian_sample_backward, GaussianSampleBackward) \
    op(gaussian_sample_forward, GaussianSampleForward)   \
    op(norm_backward, NormBackward)                      \
    op(norm_forward, NormForward)                        \
    op(normal_noise, NormalNoise)                        \
    op(pixel_loss_backward, PixelLossBackward)           \
    op(pixel_loss_forward, PixelLossForward)             \
    op(qk_norm_rope_backward, QkNormRopeBackward)        \
    op(qk_norm_rope_forward, QkNormRopeForward)          \
    op(tubelet_gather, TubeletGather)                    \
    op(tubelet_scatter, TubeletScatter)

// On the CPU alone: GPUs have Triton's attention and the attention and matrix products of other libraries.
#define VITOK_CPU_OPS(op)                     \
    op(attention_backward, AttentionBackward) \
    op(attention_forward, AttentionForward)   \
    op(linear_pack, LinearPack)               \
    op(packed_linear, PackedLinear)
