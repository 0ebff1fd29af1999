// Every native kernel: its name and the struct of its arguments. A new one is a line here, a header beside this file with the
// struct, and a function of this name in cpu/ and, with _cuda behind it, in cuda/; the rest follows from the list.
#pragma once

#include "tubelet_gather.h"
#include "tubelet_scatter.h"

#define VITOK_OPS(op) \
    op(tubelet_gather, TubeletGather) \
    op(tubelet_scatter, TubeletScatter)
