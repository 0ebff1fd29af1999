// tubelet_gather: pixels of any layout and dtype -> normalised patch rows.
//
//   target[b, (lt, ly, lx), (i, j, k, ch)] = source[b, lt*q + i, ly*p + j, lx*p + k, ch] * scale + shift
//
// Indices past the end read the last frame, row or column, or give exactly 0 when pad_zero.
#pragma once

#include "dtype.h"

namespace vitok {

// Largest patch edge: bounds the row buffer that a CPU thread keeps on its stack.
constexpr int64_t kMaxPatch = 256;

// Whether every offset into a tensor of these sizes and strides, in bytes of the widest type, is an int64.
template <int N>
static inline bool offsets_fit(const int64_t (&sizes)[N], const int64_t (&strides)[N]) {
    int64_t last = 0;
    for (int i = 0; i < N; ++i) {
        int64_t reach;
        if (__builtin_mul_overflow(sizes[i], strides[i], &reach) || __builtin_add_overflow(last, reach, &last)) return false;
    }
    return last <= INT64_MAX / 8;
}

// The strides (b, l) of contiguous rows [B, L, q*p*p*3] for clips of sizes (B, T, H, W); false when there are too many elements.
static inline bool row_strides(const int64_t (&sizes)[4], int64_t q, int64_t p, int64_t (&strides)[2]) {
    int64_t grid = 1, all;
    if (__builtin_mul_overflow(q, 3 * p * p, &strides[1])) return false;
    for (int i = 1; i < 4; ++i) {
        const int64_t step = i == 1 ? q : p;
        if (__builtin_mul_overflow(grid, sizes[i] / step + (sizes[i] % step != 0), &grid)) return false;
    }
    if (__builtin_mul_overflow(strides[1], grid, &strides[0])) return false;
    return !__builtin_mul_overflow(strides[0], sizes[0], &all) && all <= INT64_MAX / 8;
}

struct TubeletGather {
    const void* src;  // [B, T, H, W, 3] by strides
    DType src_dtype;
    int64_t sizes[4];    // B, T, H, W
    int64_t strides[5];  // b, t, y, x, c, in elements
    int64_t q, p;
    bool pad_zero;
    void* dst;        // contiguous [B, ceil(T/q) * ceil(H/p) * ceil(W/p), q*p*p*3]
    DType dst_dtype;  // float64 goes with float64 only, all other pairs of a source and a float exist
    double scale, shift;

    // The arguments by name, in the order in which a caller gives them.
    template <class Visit>
    void fields(Visit&& visit) {
        visit("src", src), visit("src_dtype", src_dtype), visit("sizes", sizes), visit("strides", strides);
        visit("q", q), visit("p", p), visit("pad_zero", pad_zero), visit("dst", dst), visit("dst_dtype", dst_dtype);
        visit("scale", scale), visit("shift", shift);
    }

    // What is wrong with the arguments, as far as they tell without the memory itself, or nullptr.
    const char* problem() const {
        if (!is_float(dst_dtype)) return "dst_dtype is 'uint8'; it must be a float type";
        if ((src_dtype == DType::float64) != (dst_dtype == DType::float64))
            return "float64 is supported from float64 to float64 only";
        if (sizes[0] < 0 || sizes[1] < 1 || sizes[2] < 1 || sizes[3] < 1)
            return "sizes must be (B >= 0, T >= 1, H >= 1, W >= 1)";
        for (const int64_t stride : strides)
            if (stride < 0) return "strides must not be negative";
        if (q < 1) return "q must be at least 1";
        if (p < 1 || p > kMaxPatch) return "p must be from 1 to 256";
        int64_t rows[2];
        if (!offsets_fit<5>({sizes[0], sizes[1], sizes[2], sizes[3], 3}, strides) || !row_strides(sizes, q, p, rows))
            return "sizes and strides reach beyond an address space of 64 bits";
        if (sizes[0] > 0 && (!src || !dst)) return "src and dst must not be null";
        return nullptr;
    }

    bool empty() const { return sizes[0] == 0; }
};

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
