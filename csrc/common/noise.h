// Standard normal noise that is a function of (seed, sample id, element), with the same bits from every implementation.
//
// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Key: the seed. Counter: (block,
// sample id), 64 bits each; a block's four words make elements 4 * block .. 4 * block + 3, by two Box-Muller pairs. The
// transform is defined by its operations: integers, fp32 additions and multiplications rounded one by one, and one correctly
// rounded square root. No fma and no library function, so CPU, CUDA, Triton and Python agree. vitok/ops/noise.py and
// kernels/noise.py say the same in Python and Triton. Against exact Box-Muller a value is off by at most 4e-7 of itself.
#pragma once

#include "dtype.h"

namespace vitok {

// The arithmetic of one lane; the CPU has the same members for vectors (cpu/noise_lanes.h).
struct ScalarMath {
    using Word = uint32_t;
    using Float = float;

    VITOK_INLINE Float add(Float a, Float b) {
#if defined(__CUDA_ARCH__)
        return __fadd_rn(a, b);
#else
        return a + b;
#endif
    }
    VITOK_INLINE Float multiply(Float a, Float b) {
#if defined(__CUDA_ARCH__)
        return __fmul_rn(a, b);
#else
        return a * b;
#endif
    }
    VITOK_INLINE Float square_root(Float x) {
#if defined(__CUDA_ARCH__)
        return __fsqrt_rn(x);
#else
        return __builtin_sqrtf(x);
#endif
    }
    VITOK_INLINE Float set(float value) { return value; }
    VITOK_INLINE Float from_signed(Word x) { return static_cast<float>(static_cast<int32_t>(x)); }
    VITOK_INLINE Word bits(Float x) { return float_bits(x); }
    VITOK_INLINE Float from_bits(Word x) { return bits_float(x); }
    VITOK_INLINE void multiply_wide(Word a, uint32_t b, Word& high, Word& low) {
        const uint64_t product = static_cast<uint64_t>(a) * b;
        high = static_cast<uint32_t>(product >> 32), low = static_cast<uint32_t>(product);
    }
};

template <class Math>
VITOK_INLINE void philox(typename Math::Word (&c)[4], uint32_t key0, uint32_t key1) {
    using Word = typename Math::Word;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int round = 0; round < 10; ++round) {
        Word high0, low0, high1, low1;
        Math::multiply_wide(c[0], 0xd2511f53u, high0, low0);
        Math::multiply_wide(c[2], 0xcd9e8d57u, high1, low1);
        c[0] = high1 ^ c[1] ^ key0, c[1] = low1, c[2] = high0 ^ c[3] ^ key1, c[3] = low0;
        key0 += 0x9e3779b9u, key1 += 0xbb67ae85u;
    }
}

// y * x + c, rounded after each operation.
template <class Math>
VITOK_INLINE typename Math::Float horner(typename Math::Float y, typename Math::Float x, float c) {
    return Math::add(Math::multiply(y, x), Math::set(c));
}

// sqrt(-2 ln u) for u = (word + 1/2) / 2^32.
template <class Math>
VITOK_INLINE typename Math::Float normal_radius(typename Math::Word word) {
    using Word = typename Math::Word;
    using Float = typename Math::Float;
    // -ln u = k ln 2 - ln(1 - d) with d in (0, 1/2]: above 1/2, d = 1 - u straight from the word's complement, which keeps all
    // digits of a small d; below, u = 2^-k (1 - d). The two terms have one sign, so nothing cancels.
    const Word upper = 0u - (word >> 31);  // all ones where u > 1/2
    const Float f = Math::add(Math::from_signed(word ^ upper), Math::set(0.5f));
    const Word bits = Math::bits(f);
    const Word near_one = Math::bits(Math::multiply(f, Math::set(0x1p-32f)));
    const Float mantissa = Math::from_bits((bits & 0x7fffffu) | 0xbf000000u);  // -(1 - d)
    const Word reduced = Math::bits(Math::add(Math::set(1.0f), mantissa));
    const Float d = Math::from_bits((near_one & upper) | (reduced & ~upper));
    const Float k = Math::from_signed((158u - (bits >> 23)) & ~upper);
    // -2 ln(1 - d) / d, minimax for the relative error: 2.4e-8.
    Float y = Math::set(0x1.6a0b00p1f);
    y = horner<Math>(y, d, -0x1.a39118p1f);
    y = horner<Math>(y, d, 0x1.3549d4p1f);
    y = horner<Math>(y, d, -0x1.72156ep-2f);
    y = horner<Math>(y, d, 0x1.0df4d8p-1f);
    y = horner<Math>(y, d, 0x1.f3144cp-2f);
    y = horner<Math>(y, d, 0x1.55a382p-1f);
    y = horner<Math>(y, d, 0x1.fffec0p-1f);
    y = horner<Math>(y, d, 2.0f);
    return Math::square_root(Math::add(Math::multiply(k, Math::set(0x1.62e430p0f)), Math::multiply(d, y)));
}

// radius * (cos, sin)(2 pi v) for v = (word + 1/2) / 2^32.
template <class Math>
VITOK_INLINE void normal_pair(typename Math::Float radius, typename Math::Word word, typename Math::Float& first,
                              typename Math::Float& second) {
    using Word = typename Math::Word;
    using Float = typename Math::Float;
    // To the nearest quarter turn, in integers: x in [-pi/4, pi/4] remains.
    const Word shifted = word + 0x20000000u;
    const Word quarter = shifted >> 30;
    const Word rest = (shifted & 0x3fffffffu) * 2u - 0x3fffffffu;  // odd, in units of pi / 2^32
    const Float x = Math::multiply(Math::from_signed(rest), Math::set(0x1.921fb6p-31f));
    const Float z = Math::multiply(x, x);
    // sin x / x and cos x, minimax: 4e-9 and 1e-10.
    Float sine = Math::set(-0x1.995408p-13f);
    sine = horner<Math>(sine, z, 0x1.110778p-7f);
    sine = horner<Math>(sine, z, -0x1.555546p-3f);
    sine = Math::multiply(x, horner<Math>(sine, z, 1.0f));
    Float cosine = Math::set(0x1.99e910p-16f);
    cosine = horner<Math>(cosine, z, -0x1.6c0c2ap-10f);
    cosine = horner<Math>(cosine, z, 0x1.55554ap-5f);
    cosine = horner<Math>(cosine, z, -0.5f);
    cosine = horner<Math>(cosine, z, 1.0f);
    const Word swap = (Math::bits(sine) ^ Math::bits(cosine)) & (0u - (quarter & 1u));
    const Word cosine_bits = Math::bits(cosine) ^ swap ^ (((quarter + 1u) & 2u) << 30);
    const Word sine_bits = Math::bits(sine) ^ swap ^ ((quarter & 2u) << 30);
    first = Math::multiply(radius, Math::from_bits(cosine_bits));
    second = Math::multiply(radius, Math::from_bits(sine_bits));
}

// The four elements of a block whose counter words are c; c is used up.
template <class Math>
VITOK_INLINE void normal_block(typename Math::Word (&c)[4], uint64_t seed, typename Math::Float (&out)[4]) {
    philox<Math>(c, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    normal_pair<Math>(normal_radius<Math>(c[0]), c[1], out[0], out[1]);
    normal_pair<Math>(normal_radius<Math>(c[2]), c[3], out[2], out[3]);
}

// What names the noise of a batch. The seed is `seed`, or where `seed_at` is not null the number there, which on CUDA is in
// device memory and may change between replays of a graph. Samples are numbered 0, 1, ... where `sample_ids` is null.
struct NoiseKeys {
    uint64_t seed;
    const uint64_t* seed_at;
    const uint64_t* sample_ids;
    int64_t stride_id;

    VITOK_INLINE uint64_t the_seed(const NoiseKeys& keys) { return keys.seed_at ? *keys.seed_at : keys.seed; }
    VITOK_INLINE uint64_t sample(const NoiseKeys& keys, int64_t b) {
        return keys.sample_ids ? keys.sample_ids[b * keys.stride_id] : static_cast<uint64_t>(b);
    }

    template <class Visit>
    void fields(Visit&& visit) {
        visit("seed", seed), visit("seed_at", seed_at), visit("sample_ids", sample_ids), visit("stride_id", stride_id);
    }

    // What is wrong with the keys of so many samples, as far as they tell without the memory itself, or nullptr.
    const char* problem(int64_t samples) const {
        if (stride_id < 0) return "stride_id must not be negative";
        if (samples > 0 && stride_id > INT64_MAX / 8 / samples) return "stride_id leads beyond 64-bit addresses";
        return nullptr;
    }
};

// out[b, e] = noise of element e of sample b, float32, contiguous.
struct NormalNoise {
    NoiseKeys keys;
    int64_t samples, elements;
    void* out;

    template <class Visit>
    void fields(Visit&& visit) {
        keys.fields(visit);
        visit("samples", samples), visit("elements", elements), visit("out", out);
    }

    const char* problem() const {
        if (samples < 0 || elements < 0) return "samples and elements must not be negative";
        if (elements && samples > INT64_MAX / 4 / elements) return "samples * elements is too large";
        if (const char* wrong = keys.problem(samples)) return wrong;
        if (!empty() && !out) return "out must not be null";
        return nullptr;
    }

    bool empty() const { return samples == 0 || elements == 0; }
};

}  // namespace vitok
