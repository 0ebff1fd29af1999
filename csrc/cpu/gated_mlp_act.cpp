// The kernels of common/gated_mlp_act.h on the CPU. Compiled once per instruction set, in the namespace VITOK_ISA; no
// standard library templates in here, because their inline copies would leak across instruction sets.
#include "../common/gated_mlp_act.h"
#include "dispatch.h"
#include "gate_lanes.h"

namespace vitok {
namespace VITOK_ISA {
namespace {

// Below this many elements the fork costs more than the threads save.
constexpr int64_t kParallelElements = 1 << 14;

template <bool kGelu>
VITOK_INLINE void gated_gradients(Lanes grad, Lanes gate, Lanes up, Lanes& dgate, Lanes& dup) {
    Lanes c, slope;
    gate_distribution<kGelu>(gate, c, slope);
    vitok::gated_gradients(grad, gate, up, c, slope, dgate, dup);
}

// One row, two vectors at a time; the last two overlap those before them instead of leaving a remainder.
template <bool kGelu, class T>
void forward_row(const T* gate, const T* up, T* out, int64_t n) {
    constexpr int64_t kStep = 2 * kLanes;
    if (n < kStep) {
        for (int64_t e = 0, count; e < n; e += count) {
            count = n - e < kLanes ? n - e : kLanes;
            const Lanes y = gated<kGelu>(lanes_load_first(gate + e, count), lanes_load_first(up + e, count));
            lanes_store_first(out + e, y, count);
        }
        return;
    }
    for (int64_t e = 0; e < n; e += kStep) {
        if (e > n - kStep) e = n - kStep;
        Lanes gates[2], ups[2];
        lanes_load_pair(gate + e, gates[0], gates[1]);
        lanes_load_pair(up + e, ups[0], ups[1]);
        lanes_store_pair(out + e, gated<kGelu>(gates[0], ups[0]), gated<kGelu>(gates[1], ups[1]));
    }
}

template <bool kGelu>
void forward_row(const double* gate, const double* up, double* out, int64_t n) {
    for (int64_t e = 0; e < n; ++e) {
        double c, slope;
        vitok::gate_distribution<kGelu>(gate[e], c, slope);
        out[e] = vitok::gated(gate[e], up[e], c);
    }
}

template <bool kGelu, class T>
void backward_row(const T* grad, const T* gate, const T* up, T* dgate, T* dup, int64_t n) {
    constexpr int64_t kStep = 2 * kLanes;
    Lanes grads[2], gates[2], ups[2], first[2], second[2];
    if (n < kStep) {
        for (int64_t e = 0, count; e < n; e += count) {
            count = n - e < kLanes ? n - e : kLanes;
            gated_gradients<kGelu>(lanes_load_first(grad + e, count), lanes_load_first(gate + e, count),
                                   lanes_load_first(up + e, count), first[0], second[0]);
            lanes_store_first(dgate + e, first[0], count);
            lanes_store_first(dup + e, second[0], count);
        }
        return;
    }
    for (int64_t e = 0; e < n; e += kStep) {
        if (e > n - kStep) e = n - kStep;
        lanes_load_pair(grad + e, grads[0], grads[1]);
        lanes_load_pair(gate + e, gates[0], gates[1]);
        lanes_load_pair(up + e, ups[0], ups[1]);
        for (int i = 0; i < 2; ++i) gated_gradients<kGelu>(grads[i], gates[i], ups[i], first[i], second[i]);
        lanes_store_pair(dgate + e, first[0], first[1]);
        lanes_store_pair(dup + e, second[0], second[1]);
    }
}

template <bool kGelu>
void backward_row(const double* grad, const double* gate, const double* up, double* dgate, double* dup, int64_t n) {
    for (int64_t e = 0; e < n; ++e) {
        double c, slope;
        vitok::gate_distribution<kGelu>(gate[e], c, slope);
        vitok::gated_gradients(grad[e], gate[e], up[e], c, slope, dgate[e], dup[e]);
    }
}

template <bool kGelu, class T>
void forward(const GatedMlpActForward& a) {
    const T* const from = static_cast<const T*>(a.gate_up);
    T* const to = static_cast<T*>(a.out);
    [[maybe_unused]] const bool parallel = a.rows > 1 && a.rows * a.hidden >= kParallelElements;
#if defined(_OPENMP)
#pragma omp parallel for schedule(static) if (parallel)
#endif
    for (int64_t row = 0; row < a.rows; ++row) {
        const T* const gate = from + row * a.row_stride;
        forward_row<kGelu>(gate, gate + a.hidden, to + row * a.hidden, a.hidden);
    }
}

template <bool kGelu, class T>
void backward(const GatedMlpActBackward& a) {
    const T* const grad = static_cast<const T*>(a.grad);
    const T* const from = static_cast<const T*>(a.gate_up);
    T* const to = static_cast<T*>(a.grad_gate_up);
    [[maybe_unused]] const bool parallel = a.rows > 1 && a.rows * a.hidden >= kParallelElements;
#if defined(_OPENMP)
#pragma omp parallel for schedule(static) if (parallel)
#endif
    for (int64_t row = 0; row < a.rows; ++row) {
        const T* const gate = from + row * a.row_stride;
        T* const dgate = to + row * 2 * a.hidden;
        backward_row<kGelu>(grad + row * a.grad_stride, gate, gate + a.hidden, dgate, dgate + a.hidden, a.hidden);
    }
}

}  // namespace

void gated_mlp_act_forward(const GatedMlpActForward& a) {
    with_float(a.dtype, [&](auto element) {
        a.gelu ? forward<true, decltype(element)>(a) : forward<false, decltype(element)>(a);
    });
}

void gated_mlp_act_backward(const GatedMlpActBackward& a) {
    with_float(a.dtype, [&](auto element) {
        a.gelu ? backward<true, decltype(element)>(a) : backward<false, decltype(element)>(a);
    });
}

}  // namespace VITOK_ISA
}  // namespace vitok
