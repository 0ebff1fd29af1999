// Dot products of pairs of bfloat16 with fp32 sums. VITOK_EMULATE_BF16 replaces the two instructions by plain AVX-512, so
// that kernels which use them can be tested on a machine that lacks them.
#pragma once

#include "lanes.h"

#if defined(__AVX512BF16__) || (defined(VITOK_EMULATE_BF16) && defined(__AVX512F__))
#define VITOK_BF16_DOT 1

namespace vitok {
namespace VITOK_ISA {
namespace {

#if defined(VITOK_EMULATE_BF16)

// sum + a[2i + 1] b[2i + 1] + a[2i] b[2i] for every lane i.
VITOK_INLINE Lanes bf16_dot(Lanes sum, __m512i a, __m512i b) {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    const auto odd = [high](__m512i x) { return _mm512_castsi512_ps(_mm512_and_si512(x, high)); };
    const auto even = [](__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); };
    return lanes_fma(even(a), even(b), lanes_fma(odd(a), odd(b), sum));
}

// 32 rounded elements, those of `low` first.
VITOK_INLINE __m512i bf16_round(Lanes low, Lanes high) {
    bf16 out[2 * kLanes];
    lanes_store(out, low);
    lanes_store(out + kLanes, high);
    return _mm512_loadu_si512(out);
}

#else

VITOK_INLINE Lanes bf16_dot(Lanes sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
VITOK_INLINE __m512i bf16_round(Lanes low, Lanes high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

#endif

}  // namespace
}  // namespace VITOK_ISA
}  // namespace vitok

#endif
