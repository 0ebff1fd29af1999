// qk_norm_rope: per-head RMS norm of q and k (optional), then rotary positions (optional), on the packed projection; v is
// copied. For a row x of one head with D channels, and pair i < D/2 of its token's angles:
//
//   r = 1 / sqrt(mean(x^2) + eps),  n = x r,  y = n weight
//   out[i] = y[i] cos[i] - y[i + D/2] sin[i],  out[i + D/2] = y[i + D/2] cos[i] + y[i] sin[i]
//
// and backward, from the gradient g of out:
//
//   u[i] = g[i] cos[i] + g[i + D/2] sin[i],  u[i + D/2] = g[i + D/2] cos[i] - g[i] sin[i]
//   dweight = sum over rows of u n,  dx = r (u weight - n mean(u weight n))
#pragma once

#include "dtype.h"

namespace vitok {

// Largest head: bounds what a CPU thread keeps on its stack and a CUDA thread in its registers.
constexpr int64_t kMaxHeadDim = 1024;

// The formulas for one pair or one channel. F is a float, a double or a vector of them.
template <class F>
VITOK_INLINE void rotate(F& first, F& second, F cos, F sin) {
    const F turned = first * cos - second * sin;
    second = second * cos + first * sin;
    first = turned;
}

// The transpose of rotate, which is the rotation by minus the angle.
template <class F>
VITOK_INLINE void rotate_back(F& first, F& second, F cos, F sin) {
    const F turned = first * cos + second * sin;
    second = second * cos - first * sin;
    first = turned;
}

// dx of a channel: weighted = u weight, unit = x r, mean = mean(weighted unit) over the head.
template <class F>
VITOK_INLINE F rms_backward(F weighted, F unit, F rstd, F mean) {
    return rstd * (weighted - unit * mean);
}

// r of a head of `width` channels from its sum of squares.
VITOK_INLINE float rms_rstd(float squares, float width, float eps) {
    const float mean = squares / width + eps;
#if defined(__CUDA_ARCH__)
    return rsqrtf(mean);
#else
    return 1.0f / __builtin_sqrtf(mean);
#endif
}

VITOK_INLINE double rms_rstd(double squares, double width, double eps) {
    const double mean = squares / width + eps;
#if defined(__CUDA_ARCH__)
    return rsqrt(mean);
#else
    return 1.0 / __builtin_sqrt(mean);
#endif
}

namespace rope_detail {

// What is wrong with the description of a packed tensor, or nullptr: every offset in it is to fit 64 bits.
inline const char* layout_problem(const int64_t (&sizes)[4], const int64_t (&strides)[4]) {
    constexpr int64_t limit = INT64_MAX / 8;  // in elements of at most 8 bytes
    for (const int64_t size : sizes)
        if (size < 0) return "sizes (B, L, H, D) must not be negative";
    if (sizes[3] < 1 || sizes[3] > kMaxHeadDim) return "head_dim must be from 1 to 1024";
    int64_t elements = 3 * sizes[3];
    for (int i = 0; i < 3; ++i) {
        if (sizes[i] > 0 && elements > limit / sizes[i]) return "the tensor has more elements than 64 bits can address";
        elements *= sizes[i];
    }
    const int64_t extents[4] = {sizes[0], sizes[1], 3, sizes[2]};
    int64_t last = sizes[3];
    for (int i = 0; i < 4; ++i) {
        if (strides[i] < 0) return "strides must not be negative";
        if (extents[i] < 2) continue;
        if (strides[i] > (limit - last) / (extents[i] - 1)) return "the strides lead past what 64 bits can address";
        last += strides[i] * (extents[i] - 1);
    }
    return nullptr;
}

// Of what forward and backward share besides the tensors.
inline const char* options_problem(DType dtype, const int64_t (&sizes)[4], const void* q_weight, const void* k_weight,
                                   DType weight_dtype, const void* table, const int64_t (&table_strides)[2]) {
    if (!is_float(dtype)) return "dtype is 'uint8'; it must be a float type";
    if (!q_weight != !k_weight) return "q_weight and k_weight must both be given or both be null";
    if (q_weight && !is_float(weight_dtype)) return "weight_dtype is 'uint8'; it must be a float type";
    if (table && sizes[3] % 2) return "head_dim must be even for a rotation";
    if (table_strides[0] < 0 || table_strides[1] < 0) return "table_strides must not be negative";
    constexpr int64_t limit = INT64_MAX / 8;
    if (table && sizes[1] > 1 && table_strides[1] > (limit - table_strides[0]) / (sizes[1] - 1))
        return "table_strides lead past what 64 bits can address";
    return nullptr;
}

}  // namespace rope_detail

struct QkNormRopeForward {
    const void* qkv;  // [B, L, 3, H, D] by strides, the last of which is 1
    DType dtype;
    int64_t sizes[4];    // B, L, H, D
    int64_t strides[4];  // b, l, three, h, in elements
    const void* q_weight;  // [D], or absent with k_weight: no norm
    const void* k_weight;
    DType weight_dtype;
    const void* table;         // float32 [2, L, D/2] of cosines and sines, or absent: no rotation
    int64_t table_strides[2];  // of the first two dimensions
    double eps;
    void* out;  // contiguous [B, L, 3, H, D]

    template <class Visit>
    void fields(Visit&& visit) {
        visit("qkv", qkv), visit("dtype", dtype), visit("sizes", sizes), visit("strides", strides);
        visit("q_weight", q_weight), visit("k_weight", k_weight), visit("weight_dtype", weight_dtype);
        visit("table", table), visit("table_strides", table_strides), visit("eps", eps), visit("out", out);
    }

    // What is wrong with the arguments, as far as they tell without the memory itself, or nullptr.
    const char* problem() const {
        if (const char* text = rope_detail::layout_problem(sizes, strides)) return text;
        if (const char* text = rope_detail::options_problem(dtype, sizes, q_weight, k_weight, weight_dtype, table, table_strides))
            return text;
        if (!empty() && (!qkv || !out)) return "qkv and out must not be null";
        return nullptr;
    }

    bool empty() const { return sizes[0] == 0 || sizes[1] == 0 || sizes[2] == 0; }
};

struct QkNormRopeBackward {
    const void* grad;  // [B, L, 3, H, D] by strides, the last of which is 1
    const void* qkv;   // likewise, or absent when there are no weights
    DType dtype;       // of grad, qkv and dqkv
    int64_t sizes[4];
    int64_t grad_strides[4], strides[4];
    const void* q_weight;
    const void* k_weight;
    DType weight_dtype;
    const void* table;
    int64_t table_strides[2];
    double eps;
    void* dqkv;       // contiguous [B, L, 3, H, D]
    void* dq_weight;  // [D] in weight_dtype, present when the weights are
    void* dk_weight;
    void* partials;  // scratch for them, [blocks, 2, D] float32 (float64 for float64)
    int64_t blocks;  // into how many parts the tokens are cut; the order of summation depends on nothing else

    template <class Visit>
    void fields(Visit&& visit) {
        visit("grad", grad), visit("qkv", qkv), visit("dtype", dtype), visit("sizes", sizes);
        visit("grad_strides", grad_strides), visit("strides", strides);
        visit("q_weight", q_weight), visit("k_weight", k_weight), visit("weight_dtype", weight_dtype);
        visit("table", table), visit("table_strides", table_strides), visit("eps", eps), visit("dqkv", dqkv);
        visit("dq_weight", dq_weight), visit("dk_weight", dk_weight), visit("partials", partials), visit("blocks", blocks);
    }

    const char* problem() const {
        if (const char* text = rope_detail::layout_problem(sizes, grad_strides)) return text;
        if (const char* text = rope_detail::layout_problem(sizes, strides)) return text;
        if (const char* text = rope_detail::options_problem(dtype, sizes, q_weight, k_weight, weight_dtype, table, table_strides))
            return text;
        if (sizes[0] > 0 && sizes[1] > 0 && sizes[2] > 0 && (!grad || !dqkv || (q_weight && !qkv)))
            return "grad, dqkv and, with weights, qkv must not be null";
        if (blocks < 1 || blocks > INT32_MAX) return "blocks must be from 1 to 2^31 - 1";
        if (q_weight && (!dq_weight || !dk_weight || !partials))
            return "with weights, dq_weight, dk_weight and partials must not be null";
        return nullptr;
    }

    // Without rows the weights still get a gradient: zero.
    bool empty() const { return !q_weight && (sizes[0] == 0 || sizes[1] == 0 || sizes[2] == 0); }
};

}  // namespace vitok
