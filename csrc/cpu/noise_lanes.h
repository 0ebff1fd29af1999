// The noise of common/noise.h on vectors: a block of four elements in each lane.
#pragma once

#include "../common/noise.h"
#include "lanes.h"

namespace vitok {
namespace VITOK_ISA {
namespace {

struct LanesMath {
    using Word = UnsignedLanes;
    using Float = Lanes;

    VITOK_INLINE Float add(Float a, Float b) { return a + b; }
    VITOK_INLINE Float multiply(Float a, Float b) { return a * b; }
    VITOK_INLINE Float square_root(Float x) { return lanes_sqrt(x); }
    VITOK_INLINE Float set(float value) { return lanes_set(value); }
    VITOK_INLINE Float from_signed(Word x) { return __builtin_convertvector(reinterpret_cast<IntLanes>(x), Lanes); }
    VITOK_INLINE Word bits(Float x) { return reinterpret_cast<Word>(x); }
    VITOK_INLINE Float from_bits(Word x) { return reinterpret_cast<Float>(x); }
    VITOK_INLINE void multiply_wide(Word a, uint32_t b, Word& high, Word& low) { lanes_multiply_wide(a, b, high, low); }
};

// Elements that fill_noise makes at a time, and what the first element of a call is a multiple of.
constexpr int64_t kNoiseGroup = 4 * kLanes;

// Elements first .. first + kNoiseGroup - 1 of a sample.
VITOK_INLINE void noise_group(float* to, uint64_t seed, uint64_t sample, int64_t first) {
    const uint64_t block = static_cast<uint64_t>(first) / 4;  // a multiple of kLanes, so lanes never carry into the high word
    UnsignedLanes c[4];
    for (int lane = 0; lane < kLanes; ++lane) {
        // The order in which the transposes below leave neighbouring blocks side by side.
        c[0][lane] = static_cast<uint32_t>(block) + static_cast<uint32_t>(lane % 4 * (kLanes / 4) + lane / 4);
        c[1][lane] = static_cast<uint32_t>(block >> 32);
        c[2][lane] = static_cast<uint32_t>(sample);
        c[3][lane] = static_cast<uint32_t>(sample >> 32);
    }
    Lanes out[4];
    normal_block<LanesMath>(c, seed, out);
    lanes_transpose4(out);
    for (int i = 0; i < 4; ++i) lanes_store(to + i * kLanes, out[i]);
}

// n elements from `first` on. `to` has room for n rounded up to a multiple of kNoiseGroup.
VITOK_INLINE void fill_noise(float* to, uint64_t seed, uint64_t sample, int64_t first, int64_t n) {
    for (int64_t e = 0; e < n; e += kNoiseGroup) noise_group(to + e, seed, sample, first + e);
}

}  // namespace
}  // namespace VITOK_ISA
}  // namespace vitok
