// gated_mlp_act: out = act(gate) * up, gate and up the halves of a row of 2 * hidden elements.
//
// Both activations are x c(x) with a cumulative distribution c: the logistic one for silu, the normal one for gelu.
//
//   out   = gate c(gate) up
//   dup   = grad gate c(gate)
//   dgate = grad up (c(gate) + gate c'(gate))
#pragma once

#include "dtype.h"

namespace vitok {

struct GatedMlpActForward {
    const void* gate_up;  // rows of 2 * hidden neighbouring elements, row_stride apart
    DType dtype;
    int64_t rows, hidden, row_stride;
    bool gelu;
    void* out;  // contiguous [rows, hidden]

    template <class Visit>
    void fields(Visit&& visit) {
        visit("gate_up", gate_up), visit("dtype", dtype), visit("rows", rows), visit("hidden", hidden);
        visit("row_stride", row_stride), visit("gelu", gelu), visit("out", out);
    }

    const char* problem() const {
        if (!is_float(dtype)) return "dtype is 'uint8'; it must be a float type";
        if (rows < 0 || hidden < 0 || row_stride < 0) return "rows, hidden and row_stride must not be negative";
        if (empty()) return nullptr;
        // Offsets in bytes stay in 64 bits.
        if (hidden > INT64_MAX / 32 / rows || row_stride > INT64_MAX / 32 / rows) return "rows x row_stride exceeds 2^58 elements";
        if (!gate_up || !out) return "gate_up and out must not be null";
        return nullptr;
    }

    bool empty() const { return rows == 0 || hidden == 0; }
};

struct GatedMlpActBackward {
    const void* grad;  // rows of hidden neighbouring elements, grad_stride apart
    const void* gate_up;
    DType dtype;  // of all three tensors
    int64_t rows, hidden, grad_stride, row_stride;
    bool gelu;
    void* grad_gate_up;  // contiguous [rows, 2 * hidden]

    template <class Visit>
    void fields(Visit&& visit) {
        visit("grad", grad), visit("gate_up", gate_up), visit("dtype", dtype), visit("rows", rows), visit("hidden", hidden);
        visit("grad_stride", grad_stride), visit("row_stride", row_stride), visit("gelu", gelu);
        visit("grad_gate_up", grad_gate_up);
    }

    const char* problem() const {
        if (!is_float(dtype)) return "dtype is 'uint8'; it must be a float type";
        if (rows < 0 || hidden < 0 || row_stride < 0 || grad_stride < 0)
            return "rows, hidden, row_stride and grad_stride must not be negative";
        if (empty()) return nullptr;
        const int64_t most = INT64_MAX / 32 / rows;
        if (hidden > most || row_stride > most || grad_stride > most) return "rows x row_stride exceeds 2^58 elements";
        if (!grad || !gate_up || !grad_gate_up) return "grad, gate_up and grad_gate_up must not be null";
        return nullptr;
    }

    bool empty() const { return rows == 0 || hidden == 0; }
};

// e^x and erf. On CUDA the fp32 ones are the short forms: their error is that of a few roundings of c, which lies in [0, 1].
VITOK_INLINE float gate_exp(float x) {
#if defined(__CUDA_ARCH__)
    return __expf(x);
#else
    return __builtin_expf(x);
#endif
}
VITOK_INLINE double gate_exp(double x) { return VITOK_MATH(exp)(x); }
VITOK_INLINE float gate_erf(float x) { return VITOK_MATH(erff)(x); }
VITOK_INLINE double gate_erf(double x) { return VITOK_MATH(erf)(x); }
VITOK_INLINE float gate_reciprocal(float x) {
#if defined(__CUDA_ARCH__)
    return __fdividef(1.0f, x);  // 0 beyond 2^126, which the true value is to fp32's smallest normal number
#else
    return 1.0f / x;
#endif
}
VITOK_INLINE double gate_reciprocal(double x) { return 1.0 / x; }

// c(x) and the slope of the activation, c(x) + x c'(x), of one number.
template <bool kGelu, class F>
VITOK_INLINE void gate_distribution(F x, F& c, F& slope) {
    if (kGelu) {
        c = F(0.5) + F(0.5) * gate_erf(x * F(0.70710678118654752440));
        slope = c + x * (F(0.39894228040143267794) * gate_exp(F(-0.5) * x * x));
    } else {
        c = gate_reciprocal(F(1) + gate_exp(-x));
        slope = c + x * c * (F(1) - c);
    }
}

// The formulas above for numbers and for vectors of them.
template <class V>
VITOK_INLINE V gated(V gate, V up, V c) {
    return gate * c * up;
}
template <class V>
VITOK_INLINE void gated_gradients(V grad, V gate, V up, V c, V slope, V& dgate, V& dup) {
    dup = grad * (gate * c);
    dgate = grad * up * slope;
}

}  // namespace vitok
