// Scalar formulas that the CPU and the CUDA kernels share. Everything here has internal linkage on purpose: the same
// header is compiled once per instruction set, and a shared inline symbol would let the linker keep the AVX-512 copy
// for a CPU that has no AVX-512.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define VITOK_INLINE static __host__ __device__ __forceinline__
#else
#define VITOK_INLINE static inline __attribute__((always_inline))
#endif

// A function of the C mathematics library, without a header, whose inline functions would be shared; CUDA declares them.
#if defined(__CUDA_ARCH__)
#define VITOK_MATH(name) name
#else
#define VITOK_MATH(name) __builtin_##name
#endif

namespace vitok {

// Storage of the 16-bit floats; arithmetic is always done in fp32.
struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

VITOK_INLINE uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

VITOK_INLINE float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

VITOK_INLINE float widen(uint8_t value) { return static_cast<float>(value); }
VITOK_INLINE float widen(float value) { return value; }
VITOK_INLINE double widen(double value) { return value; }
VITOK_INLINE float widen(bf16 value) { return bits_float(static_cast<uint32_t>(value.bits) << 16); }

VITOK_INLINE float widen(f16 value) {
#if defined(__CUDA_ARCH__)
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
#else
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    const uint32_t magnitude = value.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude >= 0x400u) return bits_float(sign | ((magnitude << 13) + 0x38000000u));
    const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
    return bits_float(sign | float_bits(subnormal));
#endif
}

// Round to nearest, ties to even; every NaN becomes a quiet NaN.
VITOK_INLINE void narrow(float value, float& out) { out = value; }
VITOK_INLINE void narrow(double value, double& out) { out = value; }

VITOK_INLINE void narrow(float value, bf16& out) {
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
    const uint32_t bits = float_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    out.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
#endif
}

VITOK_INLINE void narrow(float value, f16& out) {
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
    const uint32_t bits = float_bits(value);
    const uint32_t sign = bits >> 16 & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7e00u;
    } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
        half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {
        // Below 2^-14 the result is subnormal with unit 2^-24, which is the unit in the last place of 0.5: the addition rounds.
        half = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
    } else {
        half = (magnitude + 0xc8000fffu + (magnitude >> 13 & 1u)) >> 13;  // exponent bias 127 -> 15, then ties to even
    }
    out.bits = static_cast<uint16_t>(sign | half);
#endif
}

// Product and sum are rounded separately, so that the bits equal those of the eager expression x * scale + shift.
VITOK_INLINE float normalise(float value, float scale, float shift) {
#if defined(__CUDA_ARCH__)
    return __fadd_rn(__fmul_rn(value, scale), shift);
#else
    return value * scale + shift;
#endif
}

VITOK_INLINE double normalise(double value, double scale, double shift) {
#if defined(__CUDA_ARCH__)
    return __dadd_rn(__dmul_rn(value, scale), shift);
#else
    return value * scale + shift;
#endif
}

// A colour in [-1, 1] as a byte: clamped, mapped to 0..255 and rounded to nearest, ties to even; NaN gives 0. The bits of the
// eager expression (clamp(x, -1, 1) + 1) * 127.5: sum and product are rounded separately.
VITOK_INLINE uint8_t to_byte(float x) {
    const float low = x > -1.0f ? x : -1.0f;
    const float clamped = low < 1.0f ? low : 1.0f;
#if defined(__CUDA_ARCH__)
    return static_cast<uint8_t>(__float2uint_rn(__fmul_rn(__fadd_rn(clamped, 1.0f), 127.5f)));
#else
    return static_cast<uint8_t>(float_bits((clamped + 1.0f) * 127.5f + 0x1.8p23f));  // the sum rounds to an integer
#endif
}

// Edge replication: an index past the end reads the last element.
template <class Int>
VITOK_INLINE Int clamp_edge(Int index, Int size) {
    return index < size ? index : size - 1;
}

VITOK_INLINE float square_root(float x) { return VITOK_MATH(sqrtf)(x); }
VITOK_INLINE double square_root(double x) { return VITOK_MATH(sqrt)(x); }

VITOK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
VITOK_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
VITOK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace vitok
