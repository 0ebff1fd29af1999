// Rows of q, k and v on their way into a product and back: widened and narrowed, normalised and rotated, packed into
// transposed panels.
#pragma once

#include "attention_tiles.h"

namespace vitok {
namespace VITOK_ISA {
namespace {

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

// kLanes rows of `depth` units, kRowStride apart and readable up to whole vectors, to columns that are `between` apart.
template <class Unit>
VITOK_INLINE void turn_rows(const Unit* rows, int64_t depth, Unit* to, int64_t between) {
    for (int64_t d = 0; d < depth; d += kLanes) {
        Lanes x[kLanes];
        for (int i = 0; i < kLanes; ++i) x[i] = lanes_load(reinterpret_cast<const float*>(rows + i * kRowStride + d));
        turn(x);
        const int64_t columns = depth - d < kLanes ? depth - d : kLanes;
        for (int j = 0; j < columns; ++j) lanes_store(reinterpret_cast<float*>(to + (d + j) * between), x[j]);
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

// kPanel rows from `first` on, each made by row(token, fp32 buffer) and zero from `tokens` on, as one transposed panel
// [depth][kPanel], zero behind the width; and joined, as [token / kElements][padded width], unless `joined` is null.
template <class Dot, class Row>
VITOK_INLINE void pack_panel(int64_t first, int64_t tokens, int64_t width, int64_t depth, typename Dot::Unit* panel,
                             typename Dot::Unit* joined, Row&& row) {
    using Unit = typename Dot::Unit;
    alignas(64) float wide[kRowStride];
    alignas(64) Unit rows[kLanes * kRowStride];
    const int64_t stride = padded(width);
    for (int64_t group = 0; group < kPanel; group += kLanes) {
        for (int64_t i = 0; i < kLanes; ++i) {
            const int64_t token = first + group + i;
            if (token < tokens) {
                row(token, wide);
            } else {
                zero_row(width, wide);
            }
            Dot::narrow_row(wide, stride, rows + i * kRowStride);
            for (int64_t unit = stride / Dot::kElements; unit < depth; ++unit) rows[i * kRowStride + unit] = 0;
            if (joined) Dot::join_row(wide, stride, token, joined + token / Dot::kElements * stride);
        }
        turn_rows(rows, depth, panel + group, kPanel);
    }
}

}  // namespace
}  // namespace VITOK_ISA
}  // namespace vitok
