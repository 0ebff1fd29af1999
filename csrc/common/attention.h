// attention: softmax(q k' / sqrt(D)) v over the packed projection, forward and backward, on the CPU. Before the product q
// and k are optionally normalised (RMS, per head, with weights) and rotated by a table of cosines and sines.
//
//   s[i, j] = q[i] . k[j] / sqrt(D)        for the keys j that query i sees
//   p[i, j] = exp(s[i, j] - lse[i])        lse[i] = log sum_j exp(s[i, j])
//   out[i]  = sum_j p[i, j] v[j]
//
// A query sees an interval of keys: |i - j| <= window (window -1: all), and j < (i / causal_block + 1) * causal_block
// (causal_block 0: all), both within its segment when cu_seqlens is given; i and j then count from the segment's start.
#pragma once

#include "dtype.h"

namespace vitok {

// Largest head: bounds the buffers that a CPU thread keeps on its stack.
constexpr int64_t kMaxHead = 256;

// Scratch rows are padded to these, which every instruction set's vectors and blocks divide.
constexpr int64_t kHeadPadding = 16, kTokenPadding = 192;

struct AttentionInputs {
    const void* qkv;  // [B, L, 3, H, D] by strides; the elements of a head lie side by side
    DType dtype;
    int64_t sizes[4];    // B, L, H, D
    int64_t strides[4];  // b, l, three, h, in elements
    const void* q_weight;  // [D] or null: no norm
    const void* k_weight;
    DType weight_dtype;
    const void* table;  // [2, L, D / 2] cosines, then sines, or null: no rotation; fp32, with float64 fp64
    double eps;          // of the norm
    int64_t window, causal_block;
    const int64_t* cu_seqlens;  // [segments + 1] or null; B is 1 then. Clamped to [0, L] and made monotone.
    int64_t segments;
    void* lse;  // [B, H, L], fp32 or with float64 fp64; written by the forward unless null, read by the backward
    void* scratch;
    int64_t scratch_bytes;
    int64_t slots;  // heads that are worked on at a time: the scratch has room for as many

    template <class Visit>
    void inputs(Visit&& visit) {
        visit("qkv", qkv), visit("dtype", dtype), visit("sizes", sizes), visit("strides", strides);
        visit("q_weight", q_weight), visit("k_weight", k_weight), visit("weight_dtype", weight_dtype);
        visit("table", table), visit("eps", eps), visit("window", window), visit("causal_block", causal_block);
        visit("cu_seqlens", cu_seqlens), visit("segments", segments), visit("lse", lse);
        visit("scratch", scratch), visit("scratch_bytes", scratch_bytes), visit("slots", slots);
    }

    int64_t batch() const { return sizes[0]; }
    int64_t tokens() const { return sizes[1]; }
    int64_t heads() const { return sizes[2]; }
    int64_t width() const { return sizes[3]; }
    int64_t padded_tokens() const { return ceil_div(tokens(), kTokenPadding) * kTokenPadding; }
    int64_t padded_width() const { return ceil_div(width(), kHeadPadding) * kHeadPadding; }

    // Bytes of scratch: an interval of keys a query, `matrices` padded [L, D] matrices a slot (of float64 for float64),
    // `extra` fp32 numbers, alignment. -1 on overflow.
    int64_t scratch_needed(int64_t matrices, int64_t extra) const {
        const int64_t element = dtype == DType::float64 ? 8 : 4;
        int64_t bytes = 0, intervals = 0;
        bool overflow = __builtin_mul_overflow(padded_tokens(), padded_width(), &bytes);
        overflow |= __builtin_mul_overflow(bytes, matrices * element, &bytes);
        overflow |= __builtin_mul_overflow(bytes, slots, &bytes);
        overflow |= __builtin_mul_overflow(padded_tokens(), int64_t{16}, &intervals);
        overflow |= __builtin_add_overflow(bytes, intervals, &bytes);
        overflow |= __builtin_mul_overflow(extra, int64_t{4}, &extra);
        overflow |= __builtin_add_overflow(bytes, extra, &bytes);
        overflow |= __builtin_add_overflow(bytes, int64_t{128}, &bytes);
        return overflow ? -1 : bytes;
    }

    const char* problem() const {
        if (!is_float(dtype) || !is_float(weight_dtype)) return "dtype and weight_dtype must be float types";
        if (sizes[0] < 0 || sizes[1] < 0 || sizes[2] < 1 || sizes[3] < 1)
            return "sizes must be (B >= 0, L >= 0, H >= 1, D >= 1)";
        for (const int64_t size : sizes)
            if (size > int64_t{1} << 48) return "sizes must be at most 2^48 each";
        if (dtype != DType::float64 && (sizes[3] % 8 != 0 || sizes[3] > kMaxHead))
            return "D must be a multiple of 8 up to 256 unless dtype is float64";
        for (const int64_t stride : strides)
            if (stride < 0) return "strides must not be negative";
        int64_t largest = sizes[3], count = 3;
        const int64_t extent[] = {sizes[0], sizes[1], 3, sizes[2]};
        for (int d = 0; d < 4; ++d) {
            int64_t reach = 0;
            if (__builtin_mul_overflow(extent[d], strides[d], &reach) || __builtin_add_overflow(largest, reach, &largest) ||
                __builtin_mul_overflow(count, sizes[d], &count) || count > INT64_MAX / 8 || largest > INT64_MAX / 8)
                return "sizes and strides reach beyond 64-bit offsets";
        }
        if ((q_weight == nullptr) != (k_weight == nullptr))
            return "q_weight and k_weight must both be given or both be null";
        if (table && sizes[3] % 2 != 0) return "D must be even when there is a table";
        if (window < -1) return "window must be at least -1";
        if (causal_block < 0) return "causal_block must not be negative";
        if (cu_seqlens && sizes[0] > 1) return "B must be 1 when there are cu_seqlens";
        if (cu_seqlens && segments < 0) return "segments must not be negative";
        if (slots < 1) return "slots must be at least 1";
        if (!empty() && (!qkv || !scratch)) return "qkv and scratch must not be null";
        return nullptr;
    }

    bool empty() const { return sizes[0] == 0 || sizes[1] == 0; }
};

struct AttentionForward : AttentionInputs {
    void* out;  // contiguous [B, L, H, D]

    template <class Visit>
    void fields(Visit&& visit) {
        inputs(visit);
        visit("out", out);
    }

    // k and v; in float64 q too.
    int64_t matrices() const { return dtype == DType::float64 ? 3 : 2; }

    const char* problem() const {
        if (const char* wrong = AttentionInputs::problem()) return wrong;
        if (!empty() && !out) return "out must not be null";
        const int64_t needed = scratch_needed(matrices(), 0);
        if (needed < 0) return "sizes and slots reach beyond 64-bit offsets";
        if (!empty() && scratch_bytes < needed) return "scratch_bytes is less than these sizes and slots need";
        return nullptr;
    }
};

struct AttentionBackward : AttentionInputs {
    const void* out;   // contiguous [B, L, H, D]
    const void* grad;  // [B, L, H, D] by strides; the elements of a head lie side by side
    int64_t grad_strides[3];  // b, l, h, in elements
    void* dqkv;               // contiguous [B, L, 3, H, D]
    void* dq_weight;          // [D] in weight_dtype; null where the weights are
    void* dk_weight;

    template <class Visit>
    void fields(Visit&& visit) {
        inputs(visit);
        visit("out", out), visit("grad", grad), visit("grad_strides", grad_strides);
        visit("dqkv", dqkv), visit("dq_weight", dq_weight), visit("dk_weight", dk_weight);
    }

    // q, k, v and the gradient as the products read them, and dq, dk, dv.
    static constexpr int64_t kMatrices = 8;

    // Of the weights' gradients there is one partial sum for every stretch of a head's tokens.
    int64_t stretches() const { return ceil_div(tokens(), kTokenPadding); }

    // fp32 numbers beside the matrices: two of each token and slot, and the partial sums.
    int64_t extra() const {
        const int64_t partials = q_weight ? batch() * heads() * stretches() * 2 * padded_width() : 0;
        return slots * 2 * padded_tokens() + partials;
    }

    const char* problem() const {
        if (const char* wrong = AttentionInputs::problem()) return wrong;
        int64_t reach = 0, largest = sizes[3];
        for (int d = 0; d < 3; ++d) {
            if (grad_strides[d] < 0) return "grad_strides must not be negative";
            if (__builtin_mul_overflow(sizes[d], grad_strides[d], &reach) ||
                __builtin_add_overflow(largest, reach, &largest) || largest > INT64_MAX / 8)
                return "sizes and grad_strides reach beyond 64-bit offsets";
        }
        if ((q_weight == nullptr) != (dq_weight == nullptr) || (q_weight == nullptr) != (dk_weight == nullptr))
            return "dq_weight and dk_weight must be given where the weights are, and be null where those are";
        if (!empty() && (!out || !grad || !dqkv || !lse)) return "out, grad, dqkv and lse must not be null";
        if (__builtin_mul_overflow(slots, 2 * padded_tokens(), &reach)) return "sizes and slots reach beyond 64-bit offsets";
        const int64_t needed = scratch_needed(kMatrices, extra());
        if (needed < 0) return "sizes and slots reach beyond 64-bit offsets";
        if (!empty() && scratch_bytes < needed) return "scratch_bytes is less than these sizes and slots need";
        return nullptr;
    }
};

}  // namespace vitok
