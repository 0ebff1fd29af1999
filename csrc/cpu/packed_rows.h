// Rows of x on their way into the product with a packed weight: widened, normalised, and made the units that are multiplied.
#pragma once

#include "../common/packed_linear.h"
#include "amx.h"

namespace vitok {
namespace VITOK_ISA {
namespace {

typedef int16_t ShortLanes __attribute__((vector_size(2 * kLanes)));

// To nearest, ties to even, in the low 16 bits, for numbers of at most 2^15; of NaN, anything.
VITOK_INLINE IntLanes lanes_nearest(Lanes x) { return lanes_bits(x + lanes_set(0x1.8p23f)); }

VITOK_INLINE int32_t lanes_largest(IntLanes x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32(reinterpret_cast<__m512i>(x));
#else
    int32_t largest = x[0];
    for (int i = 1; i < kLanes; ++i) largest = x[i] > largest ? x[i] : largest;
    return largest;
#endif
}

// Integers as units, beside those of matrix_tiles.h. Words are pairs of int16, which every instruction set multiplies.
struct Words {
    using Unit = uint32_t;
    using Vector = IntLanes;
    using Sum = IntLanes;
    static constexpr int kElements = 2;
    static constexpr bool kIntegers = true, kTiles = false;
    static constexpr int32_t kOffset = 0;  // what a row's numbers are larger by
    VITOK_INLINE Vector load(const Unit* from) {
        Vector x;
        memcpy(&x, from, sizeof x);
        return x;
    }
    VITOK_INLINE Vector broadcast(const Unit* from) { return Vector{} + static_cast<int32_t>(*from); }
    VITOK_INLINE Sum add(Vector a, Vector b, Sum sum) {
#if defined(__AVX512F__)
        return sum + reinterpret_cast<Sum>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
        return sum + reinterpret_cast<Sum>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
        return sum + reinterpret_cast<Sum>(_mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
        return sum + (a >> 16) * (b >> 16) + (a << 16 >> 16) * (b << 16 >> 16);
#endif
    }
    VITOK_INLINE void quantise(const float* from, int64_t n, float factor, Unit* to) {
        int16_t* const words = reinterpret_cast<int16_t*>(to);
        for (int64_t i = 0; i < n; i += kLanes) {
            const ShortLanes q = __builtin_convertvector(lanes_nearest(lanes_load(from + i) * factor), ShortLanes);
            memcpy(words + i, &q, sizeof q);
        }
    }
};

#if defined(__AVX512F__)
// Rounded to bytes, larger by an offset.
VITOK_INLINE void quantise_bytes(const float* from, int64_t n, float factor, int32_t offset, uint32_t* to) {
    for (int64_t i = 0; i < n; i += kLanes) {
        const IntLanes q = lanes_nearest(lanes_load(from + i) * factor) ^ offset;
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i / 4), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(q)));
    }
}

// Quads are four bytes, unsigned those of a row, by VNNI's vpdpbusd. As assembly, because only machines with `Quads::usable`
// have it, and an intrinsic would want the whole loop around it to be compiled for those.
struct Quads {
    using Unit = uint32_t;
    using Vector = __m512i;
    using Sum = IntLanes;
    static constexpr int kElements = 4;
    static constexpr bool kIntegers = true, kTiles = false;
    static constexpr int32_t kOffset = 128;
    static bool usable() { return __builtin_cpu_supports("avx512vnni"); }
    VITOK_INLINE Vector load(const Unit* from) { return _mm512_loadu_si512(from); }
    VITOK_INLINE Vector broadcast(const Unit* from) { return _mm512_set1_epi32(static_cast<int>(*from)); }
    VITOK_INLINE Sum add(Vector a, Vector b, Sum sum) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
        return sum;
    }
    VITOK_INLINE void quantise(const float* from, int64_t n, float factor, Unit* to) {
        quantise_bytes(from, n, factor, kOffset, to);
    }
};
#endif

#if defined(VITOK_AMX)
// Four bytes, both operands signed.
struct TileBytes {
    using Unit = uint32_t;
    using Sum = IntLanes;
    static constexpr int kElements = 4;
    static constexpr bool kIntegers = true, kTiles = true;
    template <int kSum, int kA, int kB>
    VITOK_INLINE void add_tiles() {
        tile_add_bytes<kSum, kA, kB>();
    }
    VITOK_INLINE void quantise(const float* from, int64_t n, float factor, Unit* to) {
        quantise_bytes(from, n, factor, 0, to);
    }
};
#endif

// What a row is multiplied by once its mean is off, and its largest magnitude before that: NaN where the row has one.
struct Scaling {
    float factor, largest;
};

constexpr int kChains = 4;  // independent partial sums of a row: one chain of additions would wait for each of them

// `n` elements as fp32 with zeros up to a multiple of 64, the mean taken off for a layer norm (kNorm 2).
template <int kNorm, class T>
__attribute__((noinline)) Scaling widen_row(const T* from, int64_t n, float eps, float* to) {
    const int64_t padded = ceil_div(n, 64) * 64;
    const Lanes zero = lanes_set(0.0f);
    Lanes sum[kChains] = {zero, zero, zero, zero}, squares[kChains] = {zero, zero, zero, zero};
    IntLanes largest[kChains] = {};  // as bits, in which NaN is larger than every number
    const auto count = [&](Lanes x, int chain) __attribute__((always_inline)) {
        const IntLanes size = lanes_bits(x) & 0x7fffffff;
        largest[chain] = size > largest[chain] ? size : largest[chain];
        if (kNorm) squares[chain] = lanes_fma(x, x, squares[chain]);
    };
    const auto mean = [n](const Lanes(&chain)[kChains]) {
        return lanes_sum((chain[0] + chain[1]) + (chain[2] + chain[3])) / static_cast<float>(n);
    };
    const auto take = [&](Lanes x, int64_t i, int chain) __attribute__((always_inline)) {
        lanes_store(to + i, x);
        if (kNorm == 2) sum[chain] = sum[chain] + x;
        else count(x, chain);
    };
    int64_t i = 0;
    for (; i + kChains * kLanes <= n; i += kChains * kLanes)
#pragma GCC unroll 4
        for (int chain = 0; chain < kChains; ++chain) take(lanes_load(from + i + chain * kLanes), i + chain * kLanes, chain);
    for (; i + kLanes <= n; i += kLanes) take(lanes_load(from + i), i, 0);
    if (i < n) take(lanes_load_first(from + i, n - i), i, 1), i += kLanes;
    for (; i < padded; i += kLanes) lanes_store(to + i, zero);

    if (kNorm == 2) {
        const float centre = mean(sum);
        for (i = n; i < padded; ++i) to[i] = centre;  // and zero once the mean is off
        for (i = 0; i < padded; i += kChains * kLanes)
#pragma GCC unroll 4
            for (int chain = 0; chain < kChains; ++chain) {
                float* const at = to + i + chain * kLanes;
                const Lanes x = lanes_load(at) - centre;
                lanes_store(at, x);
                count(x, chain);
            }
    }
    for (int chain = 1; chain < kChains; ++chain) largest[0] = largest[chain] > largest[0] ? largest[chain] : largest[0];
    const float factor = kNorm ? 1.0f / square_root(mean(squares) + eps) : 1.0f;
    return {factor, bits_float(static_cast<uint32_t>(lanes_largest(largest[0])))};
}

// A row as units, zero up to a multiple of 64 elements; returns its scale. `wide` is room for it as fp32.
template <class Dot, class T>
VITOK_INLINE float make_row(const PackedLinear& a, int64_t row, float* wide, typename Dot::Unit* to) {
    const T* const from = static_cast<const T*>(a.x) + row * a.x_stride;
    const int64_t padded = ceil_div(a.inner, 64) * 64;
    if constexpr (Dot::kElements == 2 && !Dot::kIntegers && sizeof(T) == sizeof(bf16)) {
        if (a.norm == 0) {  // the pairs as they are
            memcpy(to, from, static_cast<size_t>(a.inner) * sizeof(T));
            memset(reinterpret_cast<T*>(to) + a.inner, 0, static_cast<size_t>(padded - a.inner) * sizeof(T));
            return 1.0f;
        }
    }
    if constexpr (Dot::kElements == 1) wide = to;
    const auto widen = a.norm == 0 ? widen_row<0, T> : a.norm == 1 ? widen_row<1, T> : widen_row<2, T>;
    const Scaling scaling = widen(from, a.inner, static_cast<float>(a.eps), wide);
    if constexpr (Dot::kIntegers) {
        const float top = scaling.largest;
        Dot::quantise(wide, padded, top > 0x1p-119f ? 127.0f / top : 0.0f, to);  // of smaller ones it would be infinite
        return top * scaling.factor / 127.0f;
    } else {
        if (a.norm)
            for (int64_t i = 0; i < padded; i += kLanes) lanes_store(wide + i, lanes_load(wide + i) * scaling.factor);
        if constexpr (Dot::kElements > 1) Dot::narrow_row(wide, padded, to);
        return 1.0f;
    }
}

}  // namespace
}  // namespace VITOK_ISA
}  // namespace vitok
