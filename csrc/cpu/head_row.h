// One row of one head on the CPU: RMS norm and rotation forward and backward, as common/qk_norm_rope.h has them. Written
// once over a choice of arithmetic: Vectors for fp32, Scalars<double> for fp64, Scalars<float> for heads below a vector.
//
// No row may overlap its result: where a length is no multiple of the lanes, the last vector ends at the row's end and
// computes some channels a second time.
#pragma once

#include "../common/qk_norm_rope.h"
#include "lanes.h"

namespace vitok {
namespace VITOK_ISA {
namespace {

struct Vectors {
    using Element = float;
    using Value = Lanes;
    static constexpr int64_t kCount = kLanes;

    VITOK_INLINE Lanes set(float value) { return lanes_set(value); }
    template <class T>
    VITOK_INLINE Lanes load(const T* from) {
        return lanes_load(from);
    }
    template <class T>
    VITOK_INLINE void store(T* to, Lanes x) {
        lanes_store(to, x);
    }
    VITOK_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { return lanes_fma(a, b, c); }
    VITOK_INLINE float sum(Lanes x) { return lanes_sum(x); }
    // The last n lanes of x, zero in the others.
    VITOK_INLINE Lanes keep_last(Lanes x, int64_t n) {
        IntLanes lane;
        for (int i = 0; i < kLanes; ++i) lane[i] = i;
        return bits_lanes(lanes_bits(x) & (lane >= static_cast<int32_t>(kLanes - n)));
    }
};

template <class F>
struct Scalars {
    using Element = F;
    using Value = F;
    static constexpr int64_t kCount = 1;

    VITOK_INLINE F set(F value) { return value; }
    template <class T>
    VITOK_INLINE F load(const T* from) {
        return widen(*from);
    }
    template <class T>
    VITOK_INLINE void store(T* to, F x) {
        narrow(x, *to);
    }
    VITOK_INLINE F fma(F a, F b, F c) { return a * b + c; }
    VITOK_INLINE F sum(F x) { return x; }
    VITOK_INLINE F keep_last(F x, int64_t) { return x; }
};

// What the rows of one head, q or k, at one token have in common.
template <class F>
struct HeadRow {
    int64_t width;     // head_dim; half of it, or all of it without a rotation, must hold a vector
    const F* weight;   // [width] of the norm
    const float* cos;  // [width / 2]
    const float* sin;
    F eps;
};

// Calls fn(i, fresh) for vectors at i that cover 0 <= i < n; the last `fresh` lanes of each are seen for the first time.
template <class V, class Fn>
VITOK_INLINE void for_vectors(int64_t n, const Fn& fn) {
    int64_t i = 0;
    for (; i + V::kCount <= n; i += V::kCount) fn(i, V::kCount);
    if (i < n) fn(n - V::kCount, n - i);
}

template <class V, class T>
VITOK_INLINE typename V::Element head_rstd(const T* x, int64_t width, typename V::Element eps) {
    using F = typename V::Element;
    typename V::Value squares = V::set(0);
    for_vectors<V>(width, [&](int64_t i, int64_t fresh) {
        typename V::Value value = V::load(x + i);
        if (fresh < V::kCount) value = V::keep_last(value, fresh);
        squares = V::fma(value, value, squares);
    });
    return rms_rstd(V::sum(squares), static_cast<F>(width), eps);
}

// out[width] = the row x[width], normalised and rotated.
template <class V, bool NORM, bool ROTATE, class T, class Out>
VITOK_INLINE void head_forward(const T* x, Out* out, const HeadRow<typename V::Element>& row) {
    using Value = typename V::Value;
    const int64_t half = row.width / 2;
    const Value rstd = V::set(NORM ? head_rstd<V>(x, row.width, row.eps) : 1);
    const auto normalised = [&](int64_t i) {
        const Value value = V::load(x + i);
        return NORM ? value * rstd * V::load(row.weight + i) : value;
    };
    if (ROTATE) {
        for_vectors<V>(half, [&](int64_t i, int64_t) {
            Value first = normalised(i), second = normalised(half + i);
            const Value cos = V::load(row.cos + i), sin = V::load(row.sin + i);
            rotate(first, second, cos, sin);
            V::store(out + i, first);
            V::store(out + half + i, second);
        });
    } else {
        for_vectors<V>(row.width, [&](int64_t i, int64_t) { V::store(out + i, normalised(i)); });
    }
}

// dx[width] from the gradient of out and, for the norm, the row x that forward had; the row's share of the weight's gradient is
// added to dweight[width].
template <class V, bool NORM, bool ROTATE, class G, class T, class Out>
VITOK_INLINE void head_backward(const G* grad, const T* x, Out* dx, typename V::Element* dweight,
                                const HeadRow<typename V::Element>& row) {
    using F = typename V::Element;
    using Value = typename V::Value;
    const int64_t half = row.width / 2;

    // fn(i, fresh, u): channels i and up, and the gradient of what the rotation was given.
    const auto for_gradients = [&](const auto& fn) {
        if (ROTATE) {
            for_vectors<V>(half, [&](int64_t i, int64_t fresh) {
                Value first = V::load(grad + i), second = V::load(grad + half + i);
                const Value cos = V::load(row.cos + i), sin = V::load(row.sin + i);
                rotate_back(first, second, cos, sin);
                fn(i, fresh, first);
                fn(half + i, fresh, second);
            });
        } else {
            for_vectors<V>(row.width, [&](int64_t i, int64_t fresh) { fn(i, fresh, V::load(grad + i)); });
        }
    };

    if (!NORM) {
        for_gradients([&](int64_t i, int64_t, Value u) { V::store(dx + i, u); });
        return;
    }
    Value squares = V::set(0), products = V::set(0);
    for_gradients([&](int64_t i, int64_t fresh, Value u) {
        Value value = V::load(x + i);
        if (fresh < V::kCount) value = V::keep_last(value, fresh);
        squares = V::fma(value, value, squares);
        products = V::fma(u * V::load(row.weight + i), value, products);
    });
    const F width = static_cast<F>(row.width), r = rms_rstd(V::sum(squares), width, row.eps);
    const Value rstd = V::set(r), mean = V::set(V::sum(products) * r / width);
    for_gradients([&](int64_t i, int64_t fresh, Value u) {
        const Value unit = V::load(x + i) * rstd;
        Value share = u;
        if (fresh < V::kCount) share = V::keep_last(share, fresh);
        V::store(dweight + i, V::fma(share, unit, V::load(dweight + i)));
        V::store(dx + i, rms_backward(u * V::load(row.weight + i), unit, rstd, mean));
    });
}

}  // namespace
}  // namespace VITOK_ISA
}  // namespace vitok
