// The matrix products of attention over the tiles of matrix_tiles.h.
#pragma once

#include "../common/attention.h"
#include "amx.h"

namespace vitok {
namespace VITOK_ISA {
namespace {

// A tile of sums has kRows rows of kWide vectors. Tall ones: each row of the other matrix, from the second cache, serves more.
#if defined(__AVX512F__)
constexpr int kRows = 12, kWide = 2;
#elif defined(__aarch64__)
constexpr int kRows = 6, kWide = 4;
#else
constexpr int kRows = 6, kWide = 2;
#endif
constexpr int kPanel = kWide * kLanes;  // keys that lie side by side in a packed, transposed matrix

static_assert(kTokenPadding % kPanel == 0 && kHeadPadding % kLanes == 0, "padded matrices divide into panels and vectors");

// Rows of a tile of sums where they are of Dot: those of AMX are squares of panels.
template <class Dot>
constexpr int kRowsOf = Dot::kTiles ? kPanel : kRows;

// Units of a row of q or k that are multiplied: AMX takes 16 at a time, and finds zeros behind the others.
template <class Dot>
VITOK_INLINE int64_t depth_of(int64_t width) {
    const int64_t units = width / Dot::kElements;
    return Dot::kTiles ? ceil_div(units, 16) * 16 : units;
}

// Steps of a product that one chain of sums takes: errors grow with its length, and wide heads of floats would have longer ones.
constexpr int64_t kChain = 128;

// Whether what is added to a sum is added up by itself first, which shortens chains too. It takes 5% longer, and is needed where
// a step of a chain, without a fused multiply-add, rounds twice.
#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kApart = false;
#else
constexpr bool kApart = true;
#endif

// Rows of local buffers are an odd number of cache lines apart, so that a column of them does not fall into one cache set.
constexpr int64_t kRowStride = kMaxHead + 16;

// Cuts rows of `vectors` vectors into as few and as even groups of at most kWide as possible, and calls
// fn(constant width, first vector) for each.
template <class Fn>
VITOK_INLINE void for_groups(int64_t vectors, Fn&& fn) {
    const int64_t groups = ceil_div(vectors, kWide);
    for (int64_t group = 0, first = 0; group < groups; ++group) {
        const int64_t width = vectors / groups + (group < vectors % groups);
        if (width == kWide) {
            fn(Constant<kWide>{}, first);
        } else if (kWide > 3 && width == 3) {
            fn(Constant<kWide < 3 ? kWide : 3>{}, first);
        } else if (kWide > 2 && width == 2) {
            fn(Constant<2>{}, first);
        } else {
            fn(Constant<1>{}, first);
        }
        first += width;
    }
}

// A tile's rows of `a`, kRowStride apart, against `columns` columns of transposed panels: hands every vector of products to
// store(row, its first column, products). `sums`, whose rows are `stride` apart, are room for them.
template <class Dot, class Store>
VITOK_INLINE void product(const typename Dot::Unit* a, const typename Dot::Unit* panels, int64_t depth, int64_t columns,
                          [[maybe_unused]] float* sums, [[maybe_unused]] int64_t stride, Store&& store) {
    if constexpr (Dot::kTiles) {
#if defined(VITOK_AMX)
        for (int64_t panel = 0; panel < columns; panel += kPanel)
            multiply_tiles<Dot, 2, 2>(a, kRowStride, panels + panel * depth, kPanel, depth / kTileUnits, false, sums + panel,
                                      stride, [] {});
        for (int r = 0; r < kRowsOf<Dot>; ++r)
            for (int64_t j = 0; j < columns; j += kLanes) store(r, j, lanes_load(sums + r * stride + j));
#endif
    } else {
        for (int64_t panel = 0; panel < columns; panel += kPanel) {
            const auto chain = [&](int64_t at, Lanes(&chained)[kRows][kWide]) __attribute__((always_inline)) {
#pragma GCC unroll 12
                for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
                    for (int w = 0; w < kWide; ++w) chained[r][w] = lanes_set(0.0f);
                multiply<Dot>(a + at, kRowStride, 1, panels + panel * depth + at * kPanel, kPanel, smaller(depth - at, kChain),
                              chained);
            };
            Lanes sum[kRows][kWide];
            chain(0, sum);
            if constexpr (Dot::kElements == 1) {  // rows of pairs are no longer than kChain
                for (int64_t at = kChain; at < depth; at += kChain) {
                    Lanes more[kRows][kWide];
                    chain(at, more);
#pragma GCC unroll 12
                    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
                        for (int w = 0; w < kWide; ++w) sum[r][w] = sum[r][w] + more[r][w];
                }
            }
#pragma GCC unroll 12
            for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
                for (int w = 0; w < kWide; ++w) store(r, panel + w * kLanes, sum[r][w]);
        }
    }
}

// A tile's rows of `out` become scale(row, what they were) + a . b; a as in multiply, b of rows of b_step units, which is the
// padded width. AMX wants a whole number of 16 steps, each beside the one before it.
template <class Dot, class Scale>
VITOK_INLINE void accumulate(const typename Dot::Unit* a, int64_t row, int64_t step, const typename Dot::Unit* b,
                             int64_t b_step, int64_t depth, float* out, int64_t out_stride, Scale&& scale) {
    if constexpr (Dot::kTiles) {
#if defined(VITOK_AMX)
        for (int r = 0; r < kRowsOf<Dot>; ++r)
            for (int64_t e = 0; e < b_step; e += kLanes) {
                float* const at = out + r * out_stride + e;
                lanes_store(at, scale(r, lanes_load(at)));
            }
        const auto columns = [&](auto across, int64_t e) __attribute__((always_inline)) {
            multiply_tiles<Dot, 2, across.value>(a, row, b + e, b_step, depth / kTileUnits, true, out + e, out_stride, [] {});
        };
        int64_t e = 0;
        for (; e + 2 * kTileUnits <= b_step; e += 2 * kTileUnits) columns(Constant<2>{}, e);
        if (e < b_step) columns(Constant<1>{}, e);
#endif
    } else {
        for_groups(b_step / kLanes, [&](auto constant, int64_t vector) {
            constexpr int W = decltype(constant)::value;
            float* const to = out + vector * kLanes;
            Lanes sum[kRows][W];
#pragma GCC unroll 12
            for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
                for (int w = 0; w < W; ++w)
                    sum[r][w] = kApart ? lanes_set(0.0f) : scale(r, lanes_load(to + r * out_stride + w * kLanes));
            multiply<Dot>(a, row, step, b + vector * kLanes, b_step, depth, sum);
#pragma GCC unroll 12
            for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
                for (int w = 0; w < W; ++w) {
                    float* const at = to + r * out_stride + w * kLanes;
                    lanes_store(at, kApart ? scale(r, lanes_load(at)) + sum[r][w] : sum[r][w]);
                }
        });
    }
}

constexpr float kLog2e = 0x1.715476p0f;

// 2^x for finite x <= 128, 0 far below; NaN for NaN. To 2e-7, which is what fp32 sums of such weights can use.
VITOK_INLINE Lanes exp2_weight(Lanes x) {
#if defined(__AVX512F__)
    const Lanes bounded = lanes_max(lanes_set(-126.0f), x);
    const Lanes n = _mm512_roundscale_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const Lanes bounded = lanes_max(lanes_set(-126.0f), x);
    const Lanes shifted = bounded + lanes_set(0x1.8p23f);
    const Lanes n = shifted - lanes_set(0x1.8p23f);
#endif
    const Lanes f = bounded - n;
    Lanes y = lanes_set(0x1.5c08e6p-10f);
    y = lanes_fma(y, f, lanes_set(0x1.3d0c52p-7f));
    y = lanes_fma(y, f, lanes_set(0x1.c6b6e4p-5f));
    y = lanes_fma(y, f, lanes_set(0x1.ebf918p-3f));
    y = lanes_fma(y, f, lanes_set(0x1.62e428p-1f));
    y = lanes_fma(y, f, lanes_set(1.0f));
#if defined(__AVX512F__)
    // Only where the result is normal: to make it subnormal or zero, as of every key that is masked, takes ten times as long.
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, lanes_set(-125.0f), _CMP_NLT_UQ), y, n);
#else
    // The integer n stands in the low bits of `shifted`: it goes to the exponent of y, which is from 0.7 to 1.42.
    const Lanes scaled = bits_lanes(lanes_bits(y) + (lanes_bits(shifted) << 23));
    return lanes_where_less(x, lanes_set(-125.0f), lanes_set(0.0f), scaled);
#endif
}

VITOK_INLINE float largest_lane(Lanes x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(x);
#else
    return lanes_largest(x);
#endif
}

}  // namespace
}  // namespace VITOK_ISA
}  // namespace vitok
