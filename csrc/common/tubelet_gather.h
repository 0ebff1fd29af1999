// tubelet_gather: pixels of any layout and dtype -> normalised patch rows.
//
//   target[b, (lt, ly, lx), (i, j, k, ch)] = source[b, lt*q + i, ly*p + j, lx*p + k, ch] * scale + shift
//
// Indices past the end read the last frame, row or column, or give exactly 0 when pad_zero.
#pragma once

#include "formulas.h"

namespace vitok {

enum class DType { uint8, float16, bfloat16, float32, float64 };

struct TubeletGather {
    const void* source;  // [B, T, H, W, 3] by strides
    void* target;        // contiguous [B, ceil(T/q) * ceil(H/p) * ceil(W/p), q*p*p*3]
    DType source_dtype;
    DType target_dtype;  // float64 goes with float64 only, all other pairs of a source and a float exist
    int64_t batch, frames, height, width;
    int64_t stride_b, stride_t, stride_y, stride_x, stride_c;  // in elements
    int64_t q, p;
    bool pad_zero;
    double scale, shift;
};

// Largest patch edge: bounds the row buffer that a CPU thread keeps on its stack.
constexpr int64_t kMaxPatch = 256;

// Calls fn(source element, target element) with zero values of the two element types of a supported dtype pair.
template <class Target, class Fn>
static inline void with_source(DType source, Fn&& fn) {
    switch (source) {
        case DType::uint8: fn(uint8_t{}, Target{}); break;
        case DType::float16: fn(f16{}, Target{}); break;
        case DType::bfloat16: fn(bf16{}, Target{}); break;
        case DType::float32: fn(float{}, Target{}); break;
        case DType::float64: break;
    }
}

template <class Fn>
static inline void with_dtypes(DType source, DType target, Fn&& fn) {
    switch (target) {
        case DType::float16: with_source<f16>(source, fn); break;
        case DType::bfloat16: with_source<bf16>(source, fn); break;
        case DType::float32: with_source<float>(source, fn); break;
        case DType::float64: fn(double{}, double{}); break;
        case DType::uint8: break;
    }
}

}  // namespace vitok
