// pixel_loss: the mean distance of a prediction in patch layout from a clip, sample by sample.
//
//   d[b, t, y, x, ch] = prediction[b, (t/q, y/p, x/p), (t%q, y%p, x%p, ch)] - (target[b, t, y, x, ch] * scale + shift)
//   loss[b]           = weight * sum of f(d[b]) over the clip's elements,   f = |d|, d^2 or sqrt(d^2 + eps^2)
//
// What the tubelets hold beyond the clip has no part in it and a gradient of 0.
#pragma once

#include "tubelet_gather.h"

namespace vitok {

enum class Distance : int64_t { l1, l2, charbonnier };

// What forward and backward are both given: the two pictures and the formula.
struct PixelPair {
    const void* prediction;  // [B, ceil(T/q) * ceil(H/p) * ceil(W/p), q*p*p*3], elements of a token neighbouring
    DType dtype;
    int64_t prediction_strides[2];  // b, token
    const void* target;             // [B, T, H, W, 3] by strides
    DType target_dtype;             // float64 goes with float64 only, uint8 with every float
    int64_t sizes[4];               // B, T, H, W
    int64_t strides[5];             // b, t, y, x, c, in elements
    int64_t q, p;
    int64_t kind;  // a Distance
    double eps, scale, shift;

    template <class Visit>
    void fields(Visit&& visit) {
        visit("prediction", prediction), visit("dtype", dtype), visit("prediction_strides", prediction_strides);
        visit("target", target), visit("target_dtype", target_dtype), visit("sizes", sizes), visit("strides", strides);
        visit("q", q), visit("p", p), visit("kind", kind), visit("eps", eps), visit("scale", scale), visit("shift", shift);
    }

    int64_t rows_t() const { return ceil_div(sizes[1], q); }
    int64_t rows_y() const { return ceil_div(sizes[2], p); }
    int64_t columns() const { return ceil_div(sizes[3], p); }
    int64_t tokens() const { return rows_t() * rows_y() * columns(); }  // of one sample
    int64_t token() const { return q * p * p * 3; }                     // elements
    double weight() const { return 1.0 / (3.0 * static_cast<double>(sizes[1]) * sizes[2] * sizes[3]); }
    Distance distance() const { return static_cast<Distance>(kind); }
    bool empty() const { return sizes[0] == 0; }

    const char* problem() const {
        if (!is_float(dtype)) return "dtype is 'uint8'; it must be a float type";
        if (target_dtype != DType::uint8 && (target_dtype == DType::float64) != (dtype == DType::float64))
            return "a float64 target goes with a float64 prediction only, and the other way round";
        if (sizes[0] < 0 || sizes[1] < 1 || sizes[2] < 1 || sizes[3] < 1)
            return "sizes must be (B >= 0, T >= 1, H >= 1, W >= 1)";
        for (const int64_t stride : strides)
            if (stride < 0) return "strides must not be negative";
        if (prediction_strides[0] < 0 || prediction_strides[1] < 0) return "prediction_strides must not be negative";
        if (q < 1) return "q must be at least 1";
        if (p < 1 || p > kMaxPatch) return "p must be from 1 to 256";
        if (kind < 0 || kind > 2) return "kind must be 0, 1 or 2";
        // In doubles, which do not overflow: the elements that the tubelets cover, with room for their size in bytes.
        const double covered = 3.0 * (double(sizes[1]) + q) * (double(sizes[2]) + p) * (double(sizes[3]) + p);
        if (covered * (sizes[0] > 0 ? sizes[0] : 1) > 0x1p58) return "the tubelets cover more than 2^58 elements";
        double reach = double(sizes[0]) * prediction_strides[0] + covered * prediction_strides[1] + 2.0 * strides[4];
        for (int i = 0; i < 4; ++i) reach += double(sizes[i]) * strides[i];
        if (reach > 0x1p60) return "strides reach beyond 2^60 elements";
        if (empty()) return nullptr;
        if (!prediction || !target) return "prediction and target must not be null";
        return nullptr;
    }
};

struct PixelLossForward : PixelPair {
    void* partial;  // contiguous [B, tokens], scratch; float64 for float64, else float32, as is loss
    void* loss;     // contiguous [B]

    template <class Visit>
    void fields(Visit&& visit) {
        PixelPair::fields(visit);
        visit("partial", partial), visit("loss", loss);
    }
    const char* problem() const {
        if (const char* wrong = PixelPair::problem()) return wrong;
        return empty() || (partial && loss) ? nullptr : "partial and loss must not be null";
    }
};

struct PixelLossBackward : PixelPair {
    const void* grad;  // [B] by stride, float64 for float64, else float32
    int64_t grad_stride;
    void* grad_prediction;  // contiguous, of the prediction's shape and dtype

    template <class Visit>
    void fields(Visit&& visit) {
        PixelPair::fields(visit);
        visit("grad", grad), visit("grad_stride", grad_stride), visit("grad_prediction", grad_prediction);
    }
    const char* problem() const {
        if (const char* wrong = PixelPair::problem()) return wrong;
        if (grad_stride < 0 || double(sizes[0]) * grad_stride > 0x1p60)
            return "grad_stride must not be negative nor reach beyond 2^60 elements";
        return empty() || (grad && grad_prediction) ? nullptr : "grad and grad_prediction must not be null";
    }
};

// Calls fn(prediction element, target element) with zero values of the two types of a supported pair.
template <class Fn>
static inline void with_pair(DType prediction, DType target, Fn&& fn) {
    with_float(prediction, [&](auto element) {
        if constexpr (sizeof element == 8) {
            target == DType::uint8 ? fn(element, uint8_t{}) : fn(element, double{});
        } else {
            with_source<decltype(element)>(target, [&](auto other, auto) { fn(element, other); });
        }
    });
}

// Calls fn(integral constant) with the Distance as its value.
template <Distance kDistance>
struct DistanceConstant {
    static constexpr Distance value = kDistance;
};
template <class Fn>
static inline void with_distance(Distance distance, Fn&& fn) {
    switch (distance) {
        case Distance::l1: fn(DistanceConstant<Distance::l1>{}); break;
        case Distance::l2: fn(DistanceConstant<Distance::l2>{}); break;
        case Distance::charbonnier: fn(DistanceConstant<Distance::charbonnier>{}); break;
    }
}

// f of one number, and its slope; at 0 that of |d| is 0.
template <Distance kDistance, class F>
VITOK_INLINE F pixel_distance(F d, F eps_squared) {
    if (kDistance == Distance::l1) return d < F(0) ? -d : d;
    if (kDistance == Distance::l2) return d * d;
    return square_root(d * d + eps_squared);
}
template <Distance kDistance, class F>
VITOK_INLINE F pixel_slope(F d, F eps_squared) {
    if (kDistance == Distance::l1) return d > F(0) ? F(1) : d < F(0) ? F(-1) : F(0);
    if (kDistance == Distance::l2) return d + d;
    return d / square_root(d * d + eps_squared);
}

}  // namespace vitok
