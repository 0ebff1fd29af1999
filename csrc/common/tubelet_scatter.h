// tubelet_scatter: patch rows -> pixels of any layout, the transpose of tubelet_gather.
//
//   target[b, lt*q + i, ly*p + j, lx*p + k, ch] = to_pixel(source[b, (lt, ly, lx), (i, j, k, ch)])
//
// What lies beyond the clip is dropped or, with fold_edges, summed into the last frame, row or column that edge replication
// took it from: the gradient of an edge-padded gather. Every pixel is written once, by one thread, in a fixed order of sums.
#pragma once

#include "tubelet_gather.h"

namespace vitok {

struct TubeletScatter {
    const void* src;  // [B, ceil(T/q) * ceil(H/p) * ceil(W/p), q*p*p*3] by strides
    DType src_dtype;
    int64_t src_strides[3];  // b, l, element
    int64_t q, p;
    bool fold_edges;
    void* dst;        // [B, T, H, W, 3] by strides
    DType dst_dtype;  // uint8 is rounded by to_byte; float64 goes with float64 only
    int64_t sizes[4];    // B, T, H, W
    int64_t strides[5];  // b, t, y, x, c, in elements

    // The arguments by name, in the order in which a caller gives them.
    template <class Visit>
    void fields(Visit&& visit) {
        visit("src", src), visit("src_dtype", src_dtype), visit("src_strides", src_strides), visit("q", q), visit("p", p);
        visit("fold_edges", fold_edges), visit("dst", dst), visit("dst_dtype", dst_dtype), visit("sizes", sizes);
        visit("strides", strides);
    }

    // What is wrong with the arguments, as far as they tell without the memory itself, or nullptr.
    const char* problem() const {
        if (!is_float(src_dtype)) return "src_dtype is 'uint8'; it must be a float type";
        if ((src_dtype == DType::float64) != (dst_dtype == DType::float64))
            return "float64 is supported from float64 to float64 only";
        if (sizes[0] < 0 || sizes[1] < 1 || sizes[2] < 1 || sizes[3] < 1)
            return "sizes must be (B >= 0, T >= 1, H >= 1, W >= 1)";
        for (const int64_t stride : src_strides)
            if (stride < 0) return "src_strides must not be negative";
        for (const int64_t stride : strides)
            if (stride < 0) return "strides must not be negative";
        if (q < 1) return "q must be at least 1";
        if (p < 1 || p > kMaxPatch) return "p must be from 1 to 256";
        int64_t rows[2];
        if (!row_strides(sizes, q, p, rows) || !offsets_fit<5>({sizes[0], sizes[1], sizes[2], sizes[3], 3}, strides) ||
            !offsets_fit<3>({sizes[0], rows[0] / rows[1], rows[1]}, src_strides))
            return "sizes and strides reach beyond an address space of 64 bits";
        if (sizes[0] > 0 && (!src || !dst)) return "src and dst must not be null";
        return nullptr;
    }

    bool empty() const { return sizes[0] == 0; }
};

VITOK_INLINE void to_pixel(float value, uint8_t& out) { out = to_byte(value); }
VITOK_INLINE void to_pixel(double value, double& out) { out = value; }
template <class T>
VITOK_INLINE void to_pixel(float value, T& out) {
    narrow(value, out);
}

}  // namespace vitok
