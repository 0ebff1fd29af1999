// What the forward and the backward of attention share: the matrix micro-kernel, the packing of q, k and v with norm and
// rotation, the intervals of keys that queries see, and the division of work among threads.
#pragma once

#include "../common/attention.h"
#include "bf16_dot.h"
#include "dispatch.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace vitok {
namespace VITOK_ISA {
namespace {

// The micro-kernel keeps kRows x kWide vectors of sums in registers, beside kWide of a matrix and one broadcast element.
#if defined(__AVX512F__)
constexpr int kRows = 12, kWide = 2;
#elif defined(__aarch64__)
constexpr int kRows = 6, kWide = 4;
#else
constexpr int kRows = 6, kWide = 2;
#endif
constexpr int kPanel = kWide * kLanes;  // keys that lie side by side in a packed, transposed matrix

static_assert(kTokenPadding % kPanel == 0 && kHeadPadding % kLanes == 0, "padded matrices divide into panels and vectors");

// Rows of local buffers are an odd number of cache lines apart, so that a column of them does not fall into one cache set.
constexpr int64_t kRowStride = kMaxHead + 16;

constexpr float kLog2e = 0x1.715476p0f;

// Below this many products of a query with a key and an element the fork costs more than the threads save.
constexpr int64_t kParallelProducts = 1 << 17;

// Units of 4 bytes are what the micro-kernel broadcasts and what a lane holds: an fp32 number, or a pair of bf16.
struct Singles {
    using Unit = float;
    using Vector = Lanes;
    static constexpr int kElements = 1;
    VITOK_INLINE Vector load(const Unit* from) { return lanes_load(from); }
    VITOK_INLINE Vector broadcast(const Unit* from) { return lanes_set(*from); }
    VITOK_INLINE Lanes add(Vector a, Vector b, Lanes sum) { return lanes_fma(a, b, sum); }
    VITOK_INLINE void narrow_row(const float* from, int64_t n, Unit* to) {
        for (int64_t i = 0; i < n; i += kLanes) lanes_store(to + i, lanes_load(from + i));
    }
};

#if defined(VITOK_BF16_DOT)
struct Pairs {
    using Unit = uint32_t;
    using Vector = __m512i;
    static constexpr int kElements = 2;
    VITOK_INLINE Vector load(const Unit* from) { return _mm512_loadu_si512(from); }
    VITOK_INLINE Vector broadcast(const Unit* from) { return _mm512_set1_epi32(static_cast<int>(*from)); }
    VITOK_INLINE Lanes add(Vector a, Vector b, Lanes sum) { return bf16_dot(sum, a, b); }
    VITOK_INLINE void narrow_row(const float* from, int64_t n, Unit* to) {
        for (int64_t i = 0; i < n; i += kLanes)
            lanes_store(reinterpret_cast<bf16*>(to + i / 2), lanes_load(from + i));
    }
};
#endif

// sum[r][w] += sum_k a[r * row + k * step] * b[k * b_step + lanes of vector w]
template <class Dot, int W>
VITOK_INLINE void multiply(const typename Dot::Unit* a, int64_t row, int64_t step, const typename Dot::Unit* b,
                           int64_t b_step, int64_t depth, Lanes (&sum)[kRows][W]) {
    for (int64_t k = 0; k < depth; ++k, a += step, b += b_step) {
        typename Dot::Vector column[W];
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) column[w] = Dot::load(b + w * kLanes);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
            const typename Dot::Vector x = Dot::broadcast(a + r * row);
#pragma GCC unroll 4
            for (int w = 0; w < W; ++w) sum[r][w] = Dot::add(x, column[w], sum[r][w]);
        }
    }
}

template <int N>
struct Constant {
    static constexpr int value = N;
};

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

// 2^x for finite x <= 128, 0 far below; NaN for NaN. To 2e-7, which is what fp32 sums of such weights can use.
VITOK_INLINE Lanes exp2_weight(Lanes x) {
#if defined(__AVX512F__)
    const Lanes bounded = lanes_max(lanes_set(-200.0f), x);
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
    return _mm512_scalef_ps(y, n);
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

// The lanes of kLanes vectors of 4-byte units, turned: element j of vector i goes to element i of vector j.
#if defined(__clang__)
VITOK_INLINE void turn(Lanes (&x)[kLanes]) {
    float from[kLanes][kLanes], to[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes_store(from[i], x[i]);
    for (int j = 0; j < kLanes; ++j) {
        for (int i = 0; i < kLanes; ++i) to[i] = from[i][j];
        x[j] = lanes_load(to);
    }
}
#else
// Exchanges the off-diagonal H x H quarters of every 2H x 2H square.
template <int H>
VITOK_INLINE void exchange(Lanes (&x)[kLanes]) {
    IntLanes low{}, high{};
    for (int j = 0; j < kLanes; ++j) {
        low[j] = j & H ? kLanes + j - H : j;
        high[j] = j & H ? kLanes + j : j + H;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
        if (i & H) continue;
        const Lanes a = x[i], b = x[i + H];
        x[i] = __builtin_shuffle(a, b, low);
        x[i + H] = __builtin_shuffle(a, b, high);
    }
}
VITOK_INLINE void turn(Lanes (&x)[kLanes]) {
    if constexpr (kLanes > 8) exchange<8>(x);
    if constexpr (kLanes > 4) exchange<4>(x);
    exchange<2>(x);
    exchange<1>(x);
}
#endif

// kLanes rows of `depth` units, kRowStride apart and readable up to whole vectors, to columns that are kPanel apart.
template <class Unit>
VITOK_INLINE void transpose_rows(const Unit* rows, int64_t depth, Unit* to) {
    for (int64_t d = 0; d < depth; d += kLanes) {
        Lanes x[kLanes];
        for (int i = 0; i < kLanes; ++i) x[i] = lanes_load(reinterpret_cast<const float*>(rows + i * kRowStride + d));
        turn(x);
        const int64_t columns = depth - d < kLanes ? depth - d : kLanes;
        for (int j = 0; j < columns; ++j) lanes_store(reinterpret_cast<float*>(to + (d + j) * kPanel), x[j]);
    }
}

VITOK_INLINE int64_t padded(int64_t width) { return ceil_div(width, kHeadPadding) * kHeadPadding; }

// n elements as fp32, and zeros up to the padded width.
template <class T>
VITOK_INLINE void widen_row(const T* from, int64_t n, float* to) {
    const Lanes zero = lanes_set(0.0f);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) lanes_store(to + i, lanes_load(from + i));
    if (i < n) lanes_store(to + i, lanes_load_first(from + i, n - i)), i += kLanes;
    for (; i < padded(n); i += kLanes) lanes_store(to + i, zero);
}

// n fp32 numbers, readable up to whole vectors, as elements.
template <class T>
VITOK_INLINE void narrow_row(const float* from, int64_t n, T* to) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) lanes_store(to + i, lanes_load(from + i));
    if (i < n) lanes_store_first(to + i, lanes_load(from + i), n - i);
}

VITOK_INLINE void zero_row(int64_t n, float* to) {
    for (int64_t i = 0; i < padded(n); i += kLanes) lanes_store(to + i, lanes_set(0.0f));
}

// What happens to q or k before the product, the same for every head.
struct Transform {
    float weight[kRowStride];
    bool norm;
    const float* table;  // or null
    int64_t tokens, width;
    float eps;

    Transform(const AttentionInputs& g, const void* weights)
        : norm(weights != nullptr),
          table(static_cast<const float*>(g.table)),
          tokens(g.tokens()),
          width(g.width()),
          eps(static_cast<float>(g.eps)) {
        if (norm) {
            with_float(g.weight_dtype, [&](auto zero) {
                using W = decltype(zero);
                for (int64_t i = 0; i < padded(width); ++i)
                    weight[i] = i < width ? static_cast<float>(widen(static_cast<const W*>(weights)[i])) : 0.0f;
            });
        }
    }

    const float* cosines(int64_t token) const { return table + token * (width / 2); }
    const float* sines(int64_t token) const { return table + (tokens + token) * (width / 2); }

    float rstd(const float* x) const {
        Lanes squares = lanes_set(0.0f);
        for (int64_t i = 0; i < padded(width); i += kLanes)
            squares = lanes_fma(lanes_load(x + i), lanes_load(x + i), squares);
        return 1.0f / __builtin_sqrtf(lanes_sum(squares) / static_cast<float>(width) + eps);
    }

    // One row of q or k: normalised and rotated, fp32, padded with zeros.
    template <class T>
    void operator()(const T* from, int64_t token, float* to) const {
        widen_row(from, width, to);
        if (norm) {
            const Lanes scale = lanes_set(rstd(to));
            for (int64_t i = 0; i < padded(width); i += kLanes)
                lanes_store(to + i, lanes_load(to + i) * scale * lanes_load(weight + i));
        }
        if (table) rotate(to, token, 1.0f);
    }

    // sign 1 rotates, -1 rotates back.
    void rotate(float* x, int64_t token, float sign) const {
        const int64_t half = width / 2;
        const float* const c = cosines(token);
        const float* const s = sines(token);
        if (half < kLanes) {
            for (int64_t i = 0; i < half; ++i) {
                const float a = x[i], b = x[i + half], sine = sign * s[i];
                x[i] = a * c[i] - b * sine;
                x[i + half] = b * c[i] + a * sine;
            }
            return;
        }
        float from[kRowStride];
        for (int64_t i = 0; i < padded(width); i += kLanes) lanes_store(from + i, lanes_load(x + i));
        const Lanes signs = lanes_set(sign);
        for (int64_t at = 0; at < half; at += kLanes) {
            const int64_t i = at + kLanes <= half ? at : half - kLanes;  // the last vector overlaps the one before it
            const Lanes a = lanes_load(from + i), b = lanes_load(from + half + i);
            const Lanes cosine = lanes_load(c + i), sine = lanes_load(s + i) * signs;
            lanes_store(x + i, a * cosine - b * sine);
            lanes_store(x + half + i, b * cosine + a * sine);
        }
    }
};

// The same for a row of float64, with fp64 tables.
static inline void transform_float64(const AttentionInputs& g, const void* weights, const double* from, int64_t token,
                                     double* to) {
    const int64_t width = g.width(), half = width / 2;
    double rstd = 1.0;
    if (weights) {
        double squares = 0.0;
        for (int64_t i = 0; i < width; ++i) squares += from[i] * from[i];
        rstd = 1.0 / __builtin_sqrt(squares / static_cast<double>(width) + g.eps);
    }
    with_float(g.weight_dtype, [&](auto zero) {
        using W = decltype(zero);
        for (int64_t i = 0; i < width; ++i)
            to[i] = weights ? from[i] * rstd * static_cast<double>(widen(static_cast<const W*>(weights)[i])) : from[i];
    });
    if (!g.table) return;
    const double* const c = static_cast<const double*>(g.table) + token * half;
    const double* const s = c + g.tokens() * half;
    for (int64_t i = 0; i < half; ++i) {
        const double a = to[i], b = to[i + half];
        to[i] = a * c[i] - b * s[i];
        to[i + half] = b * c[i] + a * s[i];
    }
}

static inline double dot_float64(const double* a, const double* b, int64_t n) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

// kPanel rows from `first` on, each made by row(token, fp32 buffer) and zero from `tokens` on, as one transposed panel
// [depth][kPanel]; and row by row to `plain`, padded(width) apart, unless it is null.
template <class Dot, class Row>
VITOK_INLINE void pack_panel(int64_t first, int64_t tokens, int64_t width, typename Dot::Unit* panel, float* plain,
                             Row&& row) {
    using Unit = typename Dot::Unit;
    alignas(64) float wide[kRowStride];
    alignas(64) Unit rows[kLanes * kRowStride];
    const int64_t depth = width / Dot::kElements, stride = padded(width);
    for (int64_t group = 0; group < kPanel; group += kLanes) {
        for (int64_t i = 0; i < kLanes; ++i) {
            const int64_t token = first + group + i;
            if (token < tokens) {
                row(token, wide);
            } else {
                zero_row(width, wide);
            }
            Dot::narrow_row(wide, stride, rows + i * kRowStride);
            if (plain) Singles::narrow_row(wide, stride, plain + token * stride);
        }
        transpose_rows(rows, depth, panel + group);
    }
}

// The keys that a query sees, or in the backward the queries that see a key.
struct Interval {
    int64_t begin, end;
};

VITOK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
VITOK_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
VITOK_INLINE int64_t round_down(int64_t a, int64_t step) { return a / step * step; }

// One interval a query; both ends never decrease from one query to the next.
static inline void fill_intervals(const AttentionInputs& g, Interval* keys) {
    const int64_t tokens = g.tokens();
    const int64_t segments = g.cu_seqlens ? g.segments : 1;
    int64_t end = 0;
    for (int64_t segment = -1; segment <= segments; ++segment) {  // the outer two are tokens of no segment
        const bool outside = segment < 0 || segment == segments;
        const int64_t begin = end;
        int64_t bound = tokens;
        if (g.cu_seqlens && segment < segments) bound = g.cu_seqlens[segment + 1];
        if (!g.cu_seqlens && segment < 0) bound = 0;
        end = larger(begin, smaller(bound, tokens));
        int64_t block_end = begin;
        for (int64_t i = begin; i < end; ++i) {
            Interval& seen = keys[i] = outside ? Interval{segment < 0 ? end : begin, segment < 0 ? end : begin}
                                               : Interval{begin, end};
            if (outside) continue;
            if (g.window >= 0) {
                if (i - begin > g.window) seen.begin = i - g.window;
                if (end - i - 1 > g.window) seen.end = i + g.window + 1;
            }
            if (g.causal_block > 0) {
                if (i == block_end) block_end = g.causal_block < end - i ? i + g.causal_block : end;
                seen.end = smaller(seen.end, block_end);
            }
        }
    }
}

// This thread among those that work together.
struct Team {
    int64_t thread = 0, threads = 1;

    static Team current() {
        Team team;
#if defined(_OPENMP)
        team.thread = omp_get_thread_num();
        team.threads = omp_get_num_threads();
#endif
        return team;
    }
    void barrier() const {
#if defined(_OPENMP)
        if (threads > 1) {
#pragma omp barrier
        }
#endif
    }
    // This thread's part of items 0 .. n - 1.
    Interval share(int64_t n) const {
        const int64_t each = n / threads, rest = n % threads;
        const int64_t begin = each * thread + smaller(thread, rest);
        return {begin, begin + each + (thread < rest)};
    }
};

// Scratch from the first address that is a multiple of 64 on: intervals, then the slots' matrices.
struct Scratch {
    Interval* keys;
    char* matrices;

    explicit Scratch(const AttentionInputs& g) {
        const uintptr_t start = (reinterpret_cast<uintptr_t>(g.scratch) + 63) / 64 * 64;
        keys = reinterpret_cast<Interval*>(start);
        matrices = reinterpret_cast<char*>(start) + g.padded_tokens() * static_cast<int64_t>(sizeof(Interval));
    }
    template <class T>
    T* matrix(const AttentionInputs& g, int64_t index) const {
        return reinterpret_cast<T*>(matrices) + index * g.padded_tokens() * g.padded_width();
    }
};

template <class T>
VITOK_INLINE const T* head_row(const AttentionInputs& g, int64_t b, int64_t token, int64_t three, int64_t h) {
    return static_cast<const T*>(g.qkv) + b * g.strides[0] + token * g.strides[1] + three * g.strides[2] + h * g.strides[3];
}

}  // namespace
}  // namespace VITOK_ISA
}  // namespace vitok
