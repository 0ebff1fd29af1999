// gaussian_sample: moments [B, L, 2c] -> a sample of N(mean, exp(logvar)) and its KL divergence from N(0, I), in one pass.
//
//   v = clamp(logvar, -30, 20)
//   z[b, l, k] = mean + exp(v / 2) * noise(seed, sample id of b, element l * c + k)
//   kl[b]      = 1 / (2 L c) * sum of mean^2 + (exp(v) - 1 - v)
//
// Backward, with s = dkl[b] / (L c); dlogvar is 0 where the clamp is at work:
//   dmean   = dz + s * mean
//   dlogvar = (dz * exp(v / 2) * noise + s * (exp(v) - 1)) / 2
#pragma once

#include "noise.h"

namespace vitok {

constexpr double kLogvarLow = -30.0, kLogvarHigh = 20.0;

// Elements of a sample that make one partial sum of its KL: the same on every device, and a multiple of every CPU's
// kNoiseGroup. Callers allocate ceil(L * c / kSampleChunk) numbers for each sample.
constexpr int64_t kSampleChunk = 1024;

// A NaN stays one.
template <class F>
VITOK_INLINE F clamp_logvar(F x) {
    return x < F(kLogvarLow) ? F(kLogvarLow) : x > F(kLogvarHigh) ? F(kLogvarHigh) : x;
}

template <class F>
VITOK_INLINE bool clamp_passes(F x) {
    return x >= F(kLogvarLow) && x <= F(kLogvarHigh);
}

// (e^v - 1 - v) / v^2 for |v| <= 1/2, minimax for the relative error: 3e-8. Nothing cancels near v = 0, where trained
// posteriors that match the prior are.
#define VITOK_EXCESS_COEFFICIENTS(step) \
    step(0x1.6e5a54p-10f) step(0x1.111210p-7f) step(0x1.5553f0p-5f) step(0x1.555554p-3f) step(0.5f)

// e^v - 1 - v, given variance = e^v.
VITOK_INLINE float variance_excess(float v, float variance) {
    float y = 0x1.a0b914p-13f;
#define VITOK_STEP(c) y = y * v + c;
    VITOK_EXCESS_COEFFICIENTS(VITOK_STEP)
#undef VITOK_STEP
    return v > -0.5f && v < 0.5f ? y * v * v : variance - 1.0f - v;
}
VITOK_INLINE double variance_excess(double v, double) { return VITOK_MATH(expm1)(v) - v; }

// Whether the strides (b, l, channel) of a tensor [B, L, c or 2c] are not negative and lead to 64-bit addresses only.
static inline bool sample_strides_fit(const int64_t (&sizes)[3], const int64_t (&strides)[3]) {
    for (int d = 0; d < 3; ++d)
        if (strides[d] < 0 || (sizes[d] > 0 && strides[d] > INT64_MAX / 64 / sizes[d])) return false;
    return true;
}

// What both directions are given.
struct GaussianMoments {
    const void* data;  // [B, L, 2c]: mean in the first c channels, logvar in the others
    DType dtype;
    int64_t sizes[3];    // B, L, c
    int64_t strides[3];  // b, l, channel, in elements
    NoiseKeys keys;

    template <class Visit>
    void fields(Visit&& visit) {
        visit("moments", data), visit("dtype", dtype), visit("sizes", sizes), visit("strides", strides);
        keys.fields(visit);
    }

    const char* problem() const {
        if (!is_float(dtype)) return "dtype is 'uint8'; it must be a float type";
        if (sizes[0] < 0 || sizes[1] < 1 || sizes[2] < 1) return "sizes must be (B >= 0, L >= 1, c >= 1)";
        if (sizes[1] > INT64_MAX / 64 / sizes[2] || sizes[0] > INT64_MAX / 64 / (sizes[1] * sizes[2]))
            return "B * L * c is too large";
        if (!sample_strides_fit(sizes, strides)) return "strides must not be negative nor lead beyond 64-bit addresses";
        if (const char* wrong = keys.problem(sizes[0])) return wrong;
        if (sizes[0] && !data) return "moments must not be null";
        return nullptr;
    }

    int64_t elements() const { return sizes[1] * sizes[2]; }  // of one sample
    int64_t chunks() const { return ceil_div(elements(), kSampleChunk); }
};

struct GaussianSampleForward {
    GaussianMoments moments;
    void* z;         // [B, L, c], contiguous, of the moments' dtype; null: no sample is drawn
    void* kl;        // [B], float32 (float64 with float64)
    void* partials;  // scratch like kl, [B, chunks]

    template <class Visit>
    void fields(Visit&& visit) {
        moments.fields(visit);
        visit("z", z), visit("kl", kl), visit("partials", partials);
    }
    const char* problem() const {
        if (const char* wrong = moments.problem()) return wrong;
        if (!empty() && (!kl || !partials)) return "kl and partials must not be null";
        return nullptr;
    }
    bool empty() const { return moments.sizes[0] == 0; }
};

struct GaussianSampleBackward {
    GaussianMoments moments;
    const void* dz;  // [B, L, c] of the moments' dtype; null: no gradient comes from z
    int64_t dz_strides[3];
    const void* dkl;  // [B], float32 (float64 with float64); null: no gradient comes from kl
    int64_t dkl_stride;
    void* dmoments;  // [B, L, 2c], contiguous, of the moments' dtype

    template <class Visit>
    void fields(Visit&& visit) {
        moments.fields(visit);
        visit("dz", dz), visit("dz_strides", dz_strides), visit("dkl", dkl), visit("dkl_stride", dkl_stride);
        visit("dmoments", dmoments);
    }
    const char* problem() const {
        if (const char* wrong = moments.problem()) return wrong;
        if (!sample_strides_fit(moments.sizes, dz_strides))
            return "dz_strides must not be negative nor lead beyond 64-bit addresses";
        if (!sample_strides_fit({moments.sizes[0], 1, 1}, {dkl_stride, 0, 0}))
            return "dkl_stride must not be negative nor lead beyond 64-bit addresses";
        if (!empty() && !dmoments) return "dmoments must not be null";
        return nullptr;
    }
    bool empty() const { return moments.sizes[0] == 0; }
};

}  // namespace vitok
