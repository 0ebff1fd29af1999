// Every native kernel: its name and the struct of its arguments. A new one is a line here, a header beside this file with the
// struct, and a function of this name in cpu/ and, with _cuda behind it, in cuda/; the rest follows from the lists.
#pragma once

#include "attention.h"
#include "tubelet_gather.h"

// On the CPU and on CUDA.
#define VITOK_OPS(op) \
    op(tubelet_gather, TubeletGather)

// On the CPU alone.
#define VITOK_CPU_OPS(op) \
    op(attention_forward, AttentionForward) \
    op(attention_backward, AttentionBackward)
