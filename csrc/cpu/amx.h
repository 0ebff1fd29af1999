// AMX: eight registers, each a tile of 16 rows of 64 bytes, and products of them. A thread configures its tiles before it uses
// them and releases them after. In assembly: the compiler's intrinsics do not say that a tile is read from memory.
// VITOK_EMULATE_AMX replaces the instructions by plain loops, so that kernels which use them can be tested elsewhere.
#pragma once

#include "matrix_tiles.h"

#if defined(VITOK_EMULATE_AMX) || (defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__))
#define VITOK_AMX 1

namespace vitok {
namespace VITOK_ISA {
namespace {

constexpr int kTileRows = 16;  // of a tile; it has as many columns of 4 bytes
constexpr int kTileUnits = 16;

#if defined(VITOK_EMULATE_AMX)

static thread_local uint32_t emulated_tiles[8][kTileRows][kTileUnits];

struct TileRegisters {
    TileRegisters() { memset(emulated_tiles, 0xff, sizeof emulated_tiles); }
};
template <int kTile>
VITOK_INLINE void tile_zero() {
    memset(emulated_tiles[kTile], 0, sizeof *emulated_tiles);
}
template <int kTile>
VITOK_INLINE void tile_load(const void* from, int64_t stride) {
    for (int r = 0; r < kTileRows; ++r)
        memcpy(emulated_tiles[kTile][r], static_cast<const char*>(from) + r * stride, sizeof emulated_tiles[kTile][r]);
}
template <int kTile>
VITOK_INLINE void tile_store(void* to, int64_t stride) {
    for (int r = 0; r < kTileRows; ++r)
        memcpy(static_cast<char*>(to) + r * stride, emulated_tiles[kTile][r], sizeof emulated_tiles[kTile][r]);
}
template <int kSum, int kA, int kB>
VITOK_INLINE void tile_add_pairs() {
    for (int r = 0; r < kTileRows; ++r)
        for (int c = 0; c < kTileUnits; ++c) {
            float even = 0.0f, odd = 0.0f;
            for (int k = 0; k < kTileUnits; ++k) {
                const uint32_t a = emulated_tiles[kA][r][k], b = emulated_tiles[kB][k][c];
                even = __builtin_fmaf(bits_float(a << 16), bits_float(b << 16), even);
                odd = __builtin_fmaf(bits_float(a & 0xffff0000u), bits_float(b & 0xffff0000u), odd);
            }
            emulated_tiles[kSum][r][c] = float_bits(bits_float(emulated_tiles[kSum][r][c]) + (even + odd));
        }
}
template <int kSum, int kA, int kB>
VITOK_INLINE void tile_add_bytes() {
    for (int r = 0; r < kTileRows; ++r)
        for (int c = 0; c < kTileUnits; ++c)
            for (int k = 0; k < kTileUnits; ++k)
                for (int byte = 0; byte < 32; byte += 8) {
                    const auto a = static_cast<int8_t>(emulated_tiles[kA][r][k] >> byte);
                    const auto b = static_cast<int8_t>(emulated_tiles[kB][k][c] >> byte);
                    emulated_tiles[kSum][r][c] += static_cast<uint32_t>(a * b);
                }
}

#else

struct TileRegisters {
    TileRegisters() {
        struct {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } const shapes;
        asm volatile("ldtilecfg %0" ::"m"(shapes));
    }
    ~TileRegisters() { asm volatile("tilerelease"); }
};
template <int kTile>
VITOK_INLINE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
VITOK_INLINE void tile_load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(from), "r"(stride) : "memory");
}
template <int kTile>
VITOK_INLINE void tile_store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(to), "r"(stride) : "memory");
}
template <int kSum, int kA, int kB>
VITOK_INLINE void tile_add_pairs() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}
template <int kSum, int kA, int kB>
VITOK_INLINE void tile_add_bytes() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}

#endif

// Pairs of bf16 whose products tiles sum.
struct TilePairs : Pairs {
    static constexpr bool kTiles = true;
    template <int kSum, int kA, int kB>
    VITOK_INLINE void add_tiles() {
        tile_add_pairs<kSum, kA, kB>();
    }
};

// sums[16 kDown][16 kAcross] become, or if `add` are increased by, rows of `a` times columns of `b`: `steps` times 16 units of
// every row with 16 rows of b. Strides are in units of 4 bytes. Calls meanwhile() in every step.
template <class Dot, int kDown, int kAcross, class Meanwhile>
VITOK_INLINE void multiply_tiles(const typename Dot::Unit* a, int64_t a_stride, const typename Dot::Unit* b, int64_t b_stride,
                                 int64_t steps, bool add, void* sums, int64_t sums_stride, Meanwhile&& meanwhile) {
    const auto each_sum = [&](auto&& one) __attribute__((always_inline)) {
        char* const at = static_cast<char*>(sums);
        one(Constant<0>{}, at);
        if constexpr (kAcross > 1) one(Constant<1>{}, at + 4 * kTileUnits);
        if constexpr (kDown > 1) one(Constant<2>{}, at + 4 * kTileRows * sums_stride);
        if constexpr (kDown > 1 && kAcross > 1) one(Constant<3>{}, at + 4 * (kTileRows * sums_stride + kTileUnits));
    };
    each_sum([&](auto tile, char* at) __attribute__((always_inline)) {
        if (add) tile_load<tile.value>(at, 4 * sums_stride);
        else tile_zero<tile.value>();
    });
    for (int64_t k = 0; k < steps; ++k, a += kTileUnits, b += kTileUnits * b_stride) {
        tile_load<4>(a, 4 * a_stride);
        tile_load<6>(b, 4 * b_stride);
        Dot::template add_tiles<0, 4, 6>();
        meanwhile();
        if constexpr (kDown > 1) {
            tile_load<5>(a + kTileRows * a_stride, 4 * a_stride);
            Dot::template add_tiles<2, 5, 6>();
        }
        if constexpr (kAcross > 1) {
            tile_load<7>(b + kTileUnits, 4 * b_stride);
            Dot::template add_tiles<1, 4, 7>();
            if constexpr (kDown > 1) Dot::template add_tiles<3, 5, 7>();
        }
    }
    each_sum([&](auto tile, char* at) __attribute__((always_inline)) { tile_store<tile.value>(at, 4 * sums_stride); });
}

using TiledBfloat16 = TilePairs;

// What a thread that uses them has to hold.
template <bool kTiles>
struct Registers {};
template <>
struct Registers<true> : TileRegisters {};

}  // namespace
}  // namespace VITOK_ISA
}  // namespace vitok

#else

namespace vitok {
namespace VITOK_ISA {
namespace {

using TiledBfloat16 = Bfloat16;

template <bool kTiles>
struct Registers {};

}  // namespace
}  // namespace VITOK_ISA
}  // namespace vitok

#endif
