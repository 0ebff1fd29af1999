// Tiles of a matrix product whose sums stay in registers: what attention's products and the packed linear share.
#pragma once

#include "bf16_dot.h"

namespace vitok {
namespace VITOK_ISA {
namespace {

template <int N>
struct Constant {
    static constexpr int value = N;
};

// Units of 4 bytes are what the micro-kernel broadcasts and what a lane holds: an fp32 number, or a pair of bf16.
// narrow_row makes units of neighbouring numbers of a row; join_row makes them of the same places of kElements rows, which
// come one after another: `index` is the row's number. Sum is a vector of sums of their products.
struct Singles {
    using Unit = float;
    using Vector = Lanes;
    using Sum = Lanes;
    static constexpr int kElements = 1;
    static constexpr bool kIntegers = false, kTiles = false;
    VITOK_INLINE Vector load(const Unit* from) { return lanes_load(from); }
    VITOK_INLINE Vector broadcast(const Unit* from) { return lanes_set(*from); }
    VITOK_INLINE Vector vector(Lanes units) { return units; }
    VITOK_INLINE Lanes add(Vector a, Vector b, Lanes sum) { return lanes_fma(a, b, sum); }
    VITOK_INLINE void narrow_row(const float* from, int64_t n, Unit* to) {
        for (int64_t i = 0; i < n; i += kLanes) lanes_store(to + i, lanes_load(from + i));
    }
    VITOK_INLINE void join_row(const float* from, int64_t n, int64_t, Unit* to) { narrow_row(from, n, to); }
};

#if defined(VITOK_BF16_DOT)
struct Pairs {
    using Unit = uint32_t;
    using Vector = __m512i;
    using Sum = Lanes;
    static constexpr int kElements = 2;
    static constexpr bool kIntegers = false, kTiles = false;
    VITOK_INLINE Vector load(const Unit* from) { return _mm512_loadu_si512(from); }
    VITOK_INLINE Vector broadcast(const Unit* from) { return _mm512_set1_epi32(static_cast<int>(*from)); }
    VITOK_INLINE Vector vector(Lanes units) { return _mm512_castps_si512(units); }
    VITOK_INLINE Lanes add(Vector a, Vector b, Lanes sum) { return bf16_dot(sum, a, b); }
    VITOK_INLINE void narrow_row(const float* from, int64_t n, Unit* to) {
        int64_t i = 0;
        for (; i + 2 * kLanes <= n; i += 2 * kLanes)
            _mm512_storeu_si512(to + i / 2, bf16_round(lanes_load(from + i), lanes_load(from + i + kLanes)));
        if (i < n) lanes_store(reinterpret_cast<bf16*>(to + i / 2), lanes_load(from + i));
    }
    // The same of two rows of n elements, a multiple of 8, that need no rounding, with zeros up to whole vectors; null is zeros.
    VITOK_INLINE void join_rows(const bf16* even, const bf16* odd, int64_t n, Unit* to) {
        for (int64_t i = 0; i < n; i += kLanes) {
            const __mmask16 there = n - i < kLanes ? 0xff : 0xffff;
            const auto units = [&](const bf16* row) {
                return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(row ? there : 0, row ? row + i : row));
            };
            _mm512_storeu_si512(to + i, _mm512_or_si512(units(even), _mm512_slli_epi32(units(odd), 16)));
        }
    }
    VITOK_INLINE void join_row(const float* from, int64_t n, int64_t index, Unit* to) {
        for (int64_t i = 0; i < n; i += kLanes) {
            UnsignedLanes units = lanes_round_bf16(lanes_load(from + i)), others;
            if (index % 2 == 0) {
                units >>= 16;
            } else {
                memcpy(&others, to + i, sizeof others);
                units = (units & 0xffff0000u) | others;
            }
            memcpy(to + i, &units, sizeof units);
        }
    }
};
using Bfloat16 = Pairs;  // how bf16 tensors are multiplied
#else
using Bfloat16 = Singles;
#endif

// sum[r][w] += sum_k a[r * row + k * step] * b[k * b_step + lanes of vector w]. The sums stay in registers, beside a row of b
// and one broadcast unit of a. Two steps at a time: where other work shares a core, every instruction less counts.
template <class Dot, int R, int W>
VITOK_INLINE void multiply(const typename Dot::Unit* a, int64_t row, int64_t step, const typename Dot::Unit* b,
                           int64_t b_step, int64_t depth, typename Dot::Sum (&sum)[R][W]) {
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; ++k, a += step, b += b_step) {
        typename Dot::Vector column[W];
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) column[w] = Dot::load(b + w * kLanes);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const typename Dot::Vector x = Dot::broadcast(a + r * row);
#pragma GCC unroll 4
            for (int w = 0; w < W; ++w) sum[r][w] = Dot::add(x, column[w], sum[r][w]);
        }
    }
}

}  // namespace
}  // namespace VITOK_ISA
}  // namespace vitok
