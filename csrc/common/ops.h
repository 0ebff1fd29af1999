// Every native kernel: its name and the struct of its arguments. A new one is a line here, a header beside this file with the
// struct, and a function of this name in cpu/ and, with _cuda behind it, in cuda/; the rest follows from the list.
#pragma once

#include "gated_mlp_act.h"
#include "pixel_loss.h"
#include "tubelet_gather.h"

#define VITOK_OPS(op)                                \
    op(gated_mlp_act_forward, GatedMlpActForward)    \
    op(gated_mlp_act_backward, GatedMlpActBackward)  \
    op(pixel_loss_forward, PixelLossForward)         \
    op(pixel_loss_backward, PixelLossBackward)       \
    op(tubelet_gather, TubeletGather)
