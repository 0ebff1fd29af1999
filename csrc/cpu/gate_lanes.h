// The gate of common/gated_mlp_act.h over vectors.
#pragma once

#include "../common/gated_mlp_act.h"
#include "lanes.h"

namespace vitok {
namespace VITOK_ISA {
namespace {

template <bool kGelu>
VITOK_INLINE void gate_distribution(Lanes x, Lanes& c, Lanes& slope) {
    if (kGelu) {
        Lanes density;
        c = lanes_normal(x, density);
        slope = lanes_fma(x, density, c);
    } else {
        c = lanes_logistic(x);
        slope = lanes_fma(x * c, 1.0f - c, c);
    }
}

template <bool kGelu>
VITOK_INLINE Lanes gated(Lanes gate, Lanes up) {
    Lanes c, slope;
    gate_distribution<kGelu>(gate, c, slope);
    return vitok::gated(gate, up, c);
}

}  // namespace
}  // namespace VITOK_ISA
}  // namespace vitok
