// What there is to do in attention and who does it: the intervals of keys that queries see, the threads, and the scratch.
#pragma once

#include "../common/attention.h"
#include "dispatch.h"
#include "team.h"

namespace vitok {
namespace VITOK_ISA {
namespace {

// Below this many products of a query with a key and an element the fork costs more than the threads save.
constexpr int64_t kParallelProducts = 1 << 17;

constexpr int64_t kAhead = 8;  // rows that are fetched before they are read

VITOK_INLINE int64_t round_down(int64_t a, int64_t step) { return a / step * step; }

// An interval is the keys that a query sees, or in the backward the queries that see a key.
// One interval a query; both ends never decrease from one query to the next.
static inline void fill_intervals(const AttentionInputs& g, Interval* keys) {
    const int64_t tokens = g.tokens();
    const int64_t segments = g.cu_seqlens ? g.segments : 1;
    int64_t end = 0;
    for (int64_t segment = -1; segment <= segments; ++segment) {  // the outer two are tokens of no segment
        const bool outside = segment < 0 || segment == segments;
        const int64_t begin = end;
        int64_t bound = tokens;
        if (g.cu_seqlens && segment < segments) bound = g.cu_seqlens[segment + 1];
        if (!g.cu_seqlens && segment < 0) bound = 0;
        end = larger(begin, smaller(bound, tokens));
        int64_t block_end = begin;
        for (int64_t i = begin; i < end; ++i) {
            Interval& seen = keys[i] = outside ? Interval{segment < 0 ? end : begin, segment < 0 ? end : begin}
                                               : Interval{begin, end};
            if (outside) continue;
            if (g.window >= 0) {
                if (i - begin > g.window) seen.begin = i - g.window;
                if (end - i - 1 > g.window) seen.end = i + g.window + 1;
            }
            if (g.causal_block > 0) {
                if (i == block_end) block_end = g.causal_block < end - i ? i + g.causal_block : end;
                seen.end = smaller(seen.end, block_end);
            }
        }
    }
}

// Scratch from the first address that is a multiple of 64 on: intervals, then the slots' matrices.
struct Scratch {
    Interval* keys;
    char* matrices;

    explicit Scratch(const AttentionInputs& g) {
        const uintptr_t start = (reinterpret_cast<uintptr_t>(g.scratch) + 63) / 64 * 64;
        keys = reinterpret_cast<Interval*>(start);
        matrices = reinterpret_cast<char*>(start) + g.padded_tokens() * static_cast<int64_t>(sizeof(Interval));
    }
    template <class T>
    T* matrix(const AttentionInputs& g, int64_t index) const {
        return reinterpret_cast<T*>(matrices) + index * g.padded_tokens() * g.padded_width();
    }
};

template <class T>
VITOK_INLINE const T* head_row(const AttentionInputs& g, int64_t b, int64_t token, int64_t three, int64_t h) {
    return static_cast<const T*>(g.qkv) + b * g.strides[0] + token * g.strides[1] + three * g.strides[2] + h * g.strides[3];
}

// The same, and the row of a later token is on its way: rows lie too far apart for the processor to see that it will be next.
template <class T>
VITOK_INLINE const T* next_head_row(const AttentionInputs& g, int64_t b, int64_t token, int64_t three, int64_t h) {
    const T* const row = head_row<T>(g, b, token, three, h);
    const auto later = reinterpret_cast<uintptr_t>(row) + static_cast<uintptr_t>(kAhead * g.strides[1]) * sizeof(T);
    for (uintptr_t line = 0; line < static_cast<uintptr_t>(g.width()) * sizeof(T); line += 64)
        __builtin_prefetch(reinterpret_cast<const void*>(later + line));
    return row;
}

}  // namespace

// In attention_float64.cpp: row by row, for gradient checks, not for speed.
void attention_forward_float64(const AttentionForward& g);
void attention_backward_float64(const AttentionBackward& g);

}  // namespace VITOK_ISA
}  // namespace vitok
