// Every native kernel: its name and the struct of its arguments. A new one is a line here, a header beside this file with the
// struct, and a function of this name in cpu/ and, with _cuda behind it, in cuda/; the rest follows from the list.
#pragma once

#include "gaussian_sample.h"
#include "noise.h"
#include "tubelet_gather.h"

#define VITOK_OPS(op) \
    op(gaussian_sample_forward, GaussianSampleForward) \
    op(gaussian_sample_backward, GaussianSampleBackward) \
    op(normal_noise, NormalNoise) \
    op(tubelet_gather, TubeletGather)
