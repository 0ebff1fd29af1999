// A vector of fp32 lanes for the instruction set this file is compiled for, with loads from and stores to each element
// type. kLanes is 0 where there is no such vector (SSE2, arm64): callers then use their scalar loop.
#pragma once

#include "../common/formulas.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace vitok {
namespace VITOK_ISA {
namespace {

#if defined(__AVX512F__)

constexpr int kLanes = 16;
using Lanes = __m512;

VITOK_INLINE Lanes lanes_set(float value) { return _mm512_set1_ps(value); }
VITOK_INLINE Lanes lanes_normalise(Lanes x, Lanes scale, Lanes shift) {
    return _mm512_add_ps(_mm512_mul_ps(x, scale), shift);
}
VITOK_INLINE Lanes lanes_load(const uint8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
VITOK_INLINE Lanes lanes_load(const float* from) { return _mm512_loadu_ps(from); }
VITOK_INLINE Lanes lanes_load(const bf16* from) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
VITOK_INLINE Lanes lanes_load(const f16* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
VITOK_INLINE void lanes_store(float* to, Lanes x) { _mm512_storeu_ps(to, x); }
// By integers, not by vcvtneps2bf16: that instruction flushes subnormal numbers to zero.
VITOK_INLINE void lanes_store(bf16* to, Lanes x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i rounded = _mm512_mask_set1_epi32(_mm512_srli_epi32(sum, 16), nan, 0x7fc0);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(rounded));
}
VITOK_INLINE void lanes_store(f16* to, Lanes x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#elif defined(__AVX2__)

constexpr int kLanes = 8;
using Lanes = __m256;

VITOK_INLINE Lanes lanes_set(float value) { return _mm256_set1_ps(value); }
VITOK_INLINE Lanes lanes_normalise(Lanes x, Lanes scale, Lanes shift) {
    return _mm256_add_ps(_mm256_mul_ps(x, scale), shift);
}
VITOK_INLINE Lanes lanes_load(const uint8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
VITOK_INLINE Lanes lanes_load(const float* from) { return _mm256_loadu_ps(from); }
VITOK_INLINE Lanes lanes_load(const bf16* from) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
VITOK_INLINE Lanes lanes_load(const f16* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
VITOK_INLINE void lanes_store(float* to, Lanes x) { _mm256_storeu_ps(to, x); }
VITOK_INLINE void lanes_store(bf16* to, Lanes x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i rounded = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), nan);
    // packus works within each 128-bit half; the permutation brings the two useful quarters together.
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}
VITOK_INLINE void lanes_store(f16* to, Lanes x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#else

constexpr int kLanes = 0;

#endif

}  // namespace
}  // namespace VITOK_ISA
}  // namespace vitok
