// A vector of fp32 lanes for the instruction set this file is compiled for: loads from and stores to each element type, and
// the arithmetic beyond + - * /, which the compiler's vector types have themselves. A kernel is written once over Lanes; on
// SSE2 and arm64 they are four, and the conversions are left to the compiler.
#pragma once

#include "../common/formulas.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace vitok {
namespace VITOK_ISA {
namespace {

#if defined(__AVX512F__)

constexpr int kLanes = 16;
using Lanes = __m512;

VITOK_INLINE Lanes lanes_set(float value) { return _mm512_set1_ps(value); }
VITOK_INLINE Lanes lanes_fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
VITOK_INLINE Lanes lanes_max(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }
VITOK_INLINE Lanes lanes_min(Lanes a, Lanes b) { return _mm512_min_ps(a, b); }
VITOK_INLINE Lanes lanes_sqrt(Lanes x) { return _mm512_sqrt_ps(x); }
VITOK_INLINE Lanes lanes_where_less(Lanes a, Lanes b, Lanes then, Lanes otherwise) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), otherwise, then);
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
VITOK_INLINE Lanes lanes_fma(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
VITOK_INLINE Lanes lanes_max(Lanes a, Lanes b) { return _mm256_max_ps(a, b); }
VITOK_INLINE Lanes lanes_min(Lanes a, Lanes b) { return _mm256_min_ps(a, b); }
VITOK_INLINE Lanes lanes_sqrt(Lanes x) { return _mm256_sqrt_ps(x); }
VITOK_INLINE Lanes lanes_where_less(Lanes a, Lanes b, Lanes then, Lanes otherwise) {
    return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
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

constexpr int kLanes = 4;
typedef float Lanes __attribute__((vector_size(16)));

VITOK_INLINE Lanes lanes_set(float value) { return Lanes{value, value, value, value}; }
template <class T>
VITOK_INLINE Lanes lanes_load(const T* from) {
    return Lanes{widen(from[0]), widen(from[1]), widen(from[2]), widen(from[3])};
}
template <class T>
VITOK_INLINE void lanes_store(T* to, Lanes x) {
    for (int i = 0; i < kLanes; ++i) narrow(x[i], to[i]);
}
VITOK_INLINE Lanes lanes_fma(Lanes a, Lanes b, Lanes c) { return a * b + c; }
VITOK_INLINE Lanes lanes_max(Lanes a, Lanes b) { return a > b ? a : b; }
VITOK_INLINE Lanes lanes_min(Lanes a, Lanes b) { return a < b ? a : b; }
VITOK_INLINE Lanes lanes_sqrt(Lanes x) {
    for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
}
VITOK_INLINE Lanes lanes_where_less(Lanes a, Lanes b, Lanes then, Lanes otherwise) { return a < b ? then : otherwise; }

#endif

// lanes_max and lanes_min give b where either is NaN, so a bound goes first: lanes_max(bound, x) keeps the NaN of x.

typedef int32_t IntLanes __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UnsignedLanes __attribute__((vector_size(4 * kLanes)));

VITOK_INLINE IntLanes lanes_bits(Lanes x) {
    IntLanes bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
VITOK_INLINE Lanes bits_lanes(IntLanes bits) {
    Lanes x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// The first n < kLanes elements, `fill` in the other lanes; and back. For the end of a row: no element past it is touched.
template <class T>
VITOK_INLINE Lanes lanes_load_first(const T* from, int64_t n, float fill = 0.0f) {
    float buffer[kLanes];
    for (int i = 0; i < kLanes; ++i) buffer[i] = fill;
    for (int64_t i = 0; i < n; ++i) buffer[i] = widen(from[i]);
    return lanes_load(buffer);
}
template <class T>
VITOK_INLINE void lanes_store_first(T* to, Lanes x, int64_t n) {
    T buffer[kLanes];
    lanes_store(buffer, x);
    memcpy(to, buffer, static_cast<size_t>(n) * sizeof(T));
}

// Over all lanes, always in the same order: halves are added until one lane is left. In registers, because the compiler
// makes a chain of stores and loads of the plain loop.
#if defined(__AVX2__)
VITOK_INLINE float lanes_sum(__m256 x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
VITOK_INLINE float lanes_largest(__m256 x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
#if defined(__AVX512F__)
VITOK_INLINE float lanes_sum(__m512 x) {
    return lanes_sum(_mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)));
}
VITOK_INLINE float lanes_largest(__m512 x) {
    return lanes_largest(_mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)));
}
#endif
#else
VITOK_INLINE float lanes_sum(Lanes x) { return (x[0] + x[2]) + (x[1] + x[3]); }
VITOK_INLINE float lanes_largest(Lanes x) {
    const float even = x[0] > x[2] ? x[0] : x[2], odd = x[1] > x[3] ? x[1] : x[3];
    return even > odd ? even : odd;
}
#endif

// 2^f for |f| <= 1/2: minimax for the relative error, 2e-9.
VITOK_INLINE Lanes lanes_exp2_fraction(Lanes f) {
    Lanes y = lanes_set(0x1.41fbbcp-13f);
    y = lanes_fma(y, f, lanes_set(0x1.5f3e52p-10f));
    y = lanes_fma(y, f, lanes_set(0x1.3b2d4cp-7f));
    y = lanes_fma(y, f, lanes_set(0x1.c6aee8p-5f));
    y = lanes_fma(y, f, lanes_set(0x1.ebfbdcp-3f));
    y = lanes_fma(y, f, lanes_set(0x1.62e43p-1f));
    return lanes_fma(y, f, lanes_set(1.0f));
}

// 2^(n + f) for an integer -127 <= n <= 128 and |f| <= 1/2: n are the low bits of `shifted`, which is n + 1.5 * 2^23.
VITOK_INLINE Lanes lanes_exp2_parts(Lanes shifted, Lanes f) {
    // 2^n in two factors, because 2^128 is no float.
    const IntLanes n = lanes_bits(shifted) - 0x4b400000;
    const IntLanes half = n >> 1;
    return lanes_exp2_fraction(f) * bits_lanes((half + 127) << 23) * bits_lanes((n - half + 127) << 23);
}

// 2^x to 2 units in the last place; 0 below 2^-126, infinity from 2^128, NaN for NaN.
VITOK_INLINE Lanes lanes_exp2(Lanes x) {
    const Lanes bounded = lanes_min(lanes_set(128.0f), lanes_max(lanes_set(-127.0f), x));
    const Lanes magic = lanes_set(0x1.8p23f);  // adding it rounds to an integer, kept in the low bits
    const Lanes shifted = bounded + magic;
    const Lanes y = lanes_exp2_parts(shifted, bounded - (shifted - magic));
    return lanes_where_less(x, lanes_set(-126.0f), lanes_set(0.0f), y);
}

// e^x, as exact as lanes_exp2. x - n ln 2 is taken in two steps, of which the first is exact (Cody and Waite).
VITOK_INLINE Lanes lanes_exp(Lanes x) {
    const Lanes bounded = lanes_min(lanes_set(0x1.63p6f), lanes_max(lanes_set(-88.0f), x));  // 88.75 gives infinity
    const Lanes log2e = lanes_set(0x1.715476p0f), magic = lanes_set(0x1.8p23f);
    const Lanes shifted = bounded * log2e + magic;
    const Lanes n = shifted - magic;
    const Lanes rest = lanes_fma(n, lanes_set(-0x1.7f7d1cp-20f), lanes_fma(n, lanes_set(-0x1.62e4p-1f), bounded));
    return lanes_where_less(x, lanes_set(-87.3f), lanes_set(0.0f), lanes_exp2_parts(shifted, rest * log2e));
}

// e^x for x from -88.03 or less, which gives 0, to 88.73 or more, which gives infinity: lanes_exp for bounded arguments, at
// half its cost. The error is that of lanes_exp plus 1.3e-8 |x|.
VITOK_INLINE Lanes lanes_exp_bounded(Lanes x) {
    const Lanes log2e = lanes_set(0x1.715476p0f), magic = lanes_set(0x1.8p23f);
    const Lanes shifted = lanes_fma(x, log2e, magic);
    const Lanes f = lanes_fma(x, log2e, magic - shifted);
    // 2^-127 is 0 and 2^128 infinity in these bits.
    return lanes_exp2_fraction(f) * bits_lanes((lanes_bits(shifted) - (0x4b400000 - 127)) << 23);
}

// 1 / (1 + e^-x); 0 from -88.4 down.
VITOK_INLINE Lanes lanes_logistic(Lanes x) {
    return 1.0f / (1.0f + lanes_exp_bounded(lanes_max(lanes_set(-88.1f), lanes_min(lanes_set(88.8f), -x))));
}

// The normal distribution: the chance of a value below x, and its density at x. Below zero the chance is e^(-x^2/2) t P(t)
// with t = 1 / (1 + 0.35 |x|), P a minimax polynomial for the relative error (3e-8), so that the tail keeps its digits;
// above it is 1 minus the mirror image. Error 2e-7 at most; 0.5 (1 + erf(x / sqrt 2)) without the cancellation.
VITOK_INLINE Lanes lanes_normal(Lanes x, Lanes& density) {
    const Lanes size = lanes_max(-x, x);
    const Lanes bell = lanes_exp_bounded(lanes_max(lanes_set(-88.1f), size * size * -0.5f));
    density = bell * 0x1.988454p-2f;
    const Lanes t = 1.0f / lanes_fma(size, lanes_set(0.35f), lanes_set(1.0f));
    Lanes y = lanes_set(-0x1.ddb9a4p-6f);
    y = lanes_fma(y, t, lanes_set(0x1.26fa0cp-3f));
    y = lanes_fma(y, t, lanes_set(-0x1.05fb06p-2f));
    y = lanes_fma(y, t, lanes_set(0x1.464a38p-3f));
    y = lanes_fma(y, t, lanes_set(-0x1.7c5408p-6f));
    y = lanes_fma(y, t, lanes_set(0x1.b05844p-4f));
    y = lanes_fma(y, t, lanes_set(0x1.eac99ep-4f));
    y = lanes_fma(y, t, lanes_set(0x1.1e70c6p-3f));
    y = lanes_fma(y, t, lanes_set(0x1.1df1c6p-3f));
    const Lanes below = bell * (t * y);
    return lanes_where_less(x, lanes_set(0.0f), below, 1.0f - below);
}

// 2 * kLanes neighbouring elements as two vectors, in whatever order is cheapest: for kernels that treat all elements alike.
// A store takes the order of a load of the same type. bf16 comes as its even and odd elements, which moves nothing between lanes.
template <class T>
VITOK_INLINE void lanes_load_pair(const T* from, Lanes& a, Lanes& b) {
    a = lanes_load(from);
    b = lanes_load(from + kLanes);
}
template <class T>
VITOK_INLINE void lanes_store_pair(T* to, Lanes a, Lanes b) {
    lanes_store(to, a);
    lanes_store(to + kLanes, b);
}
VITOK_INLINE void lanes_load_pair(const bf16* from, Lanes& even, Lanes& odd) {
    UnsignedLanes both, high, low;
    memcpy(&both, from, sizeof both);
    high = both & 0xffff0000u, low = both << 16;
    memcpy(&odd, &high, sizeof odd);
    memcpy(&even, &low, sizeof even);
}
// The bits of a bf16 in the upper half of each lane, with anything below.
VITOK_INLINE UnsignedLanes lanes_round_bf16(Lanes x) {
    UnsignedLanes bits;
    memcpy(&bits, &x, sizeof bits);
    const UnsignedLanes nan = reinterpret_cast<UnsignedLanes>(x != x);
    return ((bits + 0x7fffu + (bits >> 16 & 1u)) & ~nan) | (nan & 0x7fc00000u);
}
VITOK_INLINE void lanes_store_pair(bf16* to, Lanes even, Lanes odd) {
    const UnsignedLanes both = (lanes_round_bf16(odd) & 0xffff0000u) | lanes_round_bf16(even) >> 16;
    memcpy(to, &both, sizeof both);
}

// The 64 bits of a * b in every lane.
VITOK_INLINE void lanes_multiply_wide(UnsignedLanes a, uint32_t b, UnsignedLanes& high, UnsignedLanes& low) {
#if defined(__AVX512F__)
    const __m512i factor = _mm512_set1_epi32(static_cast<int>(b)), x = reinterpret_cast<__m512i>(a);
    const __m512i even = _mm512_mul_epu32(x, factor), odd = _mm512_mul_epu32(_mm512_shuffle_epi32(x, _MM_PERM_DDBB), factor);
    high = reinterpret_cast<UnsignedLanes>(_mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB));
    low = reinterpret_cast<UnsignedLanes>(_mm512_mask_shuffle_epi32(even, 0xaaaa, odd, _MM_PERM_CCAA));
#elif defined(__AVX2__)
    const __m256i factor = _mm256_set1_epi32(static_cast<int>(b)), x = reinterpret_cast<__m256i>(a);
    const __m256i even = _mm256_mul_epu32(x, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), factor);
    high = reinterpret_cast<UnsignedLanes>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa));
    low = reinterpret_cast<UnsignedLanes>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa));
#elif defined(__SSE2__)
    const __m128i factor = _mm_set1_epi32(static_cast<int>(b)), x = reinterpret_cast<__m128i>(a);
    const __m128i even = _mm_mul_epu32(x, factor), odd = _mm_mul_epu32(_mm_srli_epi64(x, 32), factor);
    const __m128i lower = _mm_set1_epi64x(0xffffffff);
    high = reinterpret_cast<UnsignedLanes>(_mm_or_si128(_mm_srli_epi64(even, 32), _mm_andnot_si128(lower, odd)));
    low = reinterpret_cast<UnsignedLanes>(_mm_or_si128(_mm_and_si128(lower, even), _mm_slli_epi64(odd, 32)));
#else
    for (int i = 0; i < kLanes; ++i) {
        const uint64_t product = static_cast<uint64_t>(a[i]) * b;
        high[i] = static_cast<uint32_t>(product >> 32), low[i] = static_cast<uint32_t>(product);
    }
#endif
}

// The 4 x 4 matrices that the four vectors hold in each 128 bits, transposed.
VITOK_INLINE void lanes_transpose4(Lanes (&x)[4]) {
#if defined(__AVX512F__)
    const Lanes a = _mm512_unpacklo_ps(x[0], x[1]), b = _mm512_unpackhi_ps(x[0], x[1]);
    const Lanes c = _mm512_unpacklo_ps(x[2], x[3]), d = _mm512_unpackhi_ps(x[2], x[3]);
    x[0] = _mm512_shuffle_ps(a, c, 0x44), x[1] = _mm512_shuffle_ps(a, c, 0xee);
    x[2] = _mm512_shuffle_ps(b, d, 0x44), x[3] = _mm512_shuffle_ps(b, d, 0xee);
#elif defined(__AVX2__)
    const Lanes a = _mm256_unpacklo_ps(x[0], x[1]), b = _mm256_unpackhi_ps(x[0], x[1]);
    const Lanes c = _mm256_unpacklo_ps(x[2], x[3]), d = _mm256_unpackhi_ps(x[2], x[3]);
    x[0] = _mm256_shuffle_ps(a, c, 0x44), x[1] = _mm256_shuffle_ps(a, c, 0xee);
    x[2] = _mm256_shuffle_ps(b, d, 0x44), x[3] = _mm256_shuffle_ps(b, d, 0xee);
#else
    for (int i = 0; i < kLanes; ++i)
        for (int j = i + 1; j < kLanes; ++j) {
            const float swap = x[i][j];
            x[i][j] = x[j][i], x[j][i] = swap;
        }
#endif
}

// As bytes, to nearest, ties to even; every lane must be in 0..255.
VITOK_INLINE void lanes_store(uint8_t* to, Lanes x) {
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
#elif defined(__AVX2__)
    const __m256i whole = _mm256_cvtps_epi32(x);
    const __m256i words = _mm256_packus_epi32(whole, whole);  // each 128-bit half twice
    const __m256i bytes = _mm256_packus_epi16(words, words);
    const __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi32(low, high));
#else
    const IntLanes bits = lanes_bits(x + lanes_set(0x1.8p23f));  // adding it rounds to an integer, kept in the low bits
    for (int i = 0; i < kLanes; ++i) to[i] = static_cast<uint8_t>(bits[i]);
#endif
}

}  // namespace
}  // namespace VITOK_ISA
}  // namespace vitok
