// The norms of common/norm.h on the CPU. Compiled once per instruction set, in the namespace VITOK_ISA; no standard library
// templates in here. A row comes from memory once: the second and third pass over it find it in the first-level cache.
#include "../common/norm.h"
#include "dispatch.h"
#include "lanes.h"

namespace vitok {
namespace VITOK_ISA {
namespace {

// Below this many elements the fork costs more than the threads save.
constexpr int64_t kParallelElements = 1 << 15;

// Rows that the backward pass takes together: weight gradients are added to memory once for all of them, and their sums are
// independent chains of additions.
constexpr int kGroup = 4;

// Independent partial sums of one row; one chain of additions would wait for each of them.
constexpr int kChains = 4;

// float64 goes through the same code one element at a time: it exists for gradient checks.
VITOK_INLINE double lanes_fma(double a, double b, double c) { return a * b + c; }
VITOK_INLINE double lanes_load(const double* from) { return *from; }
VITOK_INLINE void lanes_store(double* to, double x) { *to = x; }
VITOK_INLINE double lanes_sum(double x) { return x; }

template <class F>
struct Vector {
    using type = Lanes;
    static constexpr int64_t size = kLanes;
    static Lanes all(float value) { return lanes_set(value); }
};
template <>
struct Vector<double> {
    using type = double;
    static constexpr int64_t size = 1;
    static double all(double value) { return value; }
};

// How a vector of a row is reached: whole, or cut short by the row's end.
struct Whole {
    template <class T, class F = float>
    auto load(const T* from, F = 0) const {
        return lanes_load(from);
    }
    template <class T, class V>
    void store(T* to, V x) const {
        lanes_store(to, x);
    }
};
struct First {  // called, not inlined: once a row, and long where the instruction set has no conversions
    int64_t n;
    template <class T>
    __attribute__((noinline)) Lanes load(const T* from, float fill = 0.0f) const {
        return lanes_load_first(from, n, fill);
    }
    template <class T>
    __attribute__((noinline)) void store(T* to, Lanes x) const {
        lanes_store_first(to, x, n);
    }
};

// Calls fn(access, element, chain) for every vector of a row.
template <class F, class Fn>
VITOK_INLINE void over_row(int64_t width, Fn&& fn) {
    constexpr int64_t size = Vector<F>::size;
    int64_t e = 0;
    for (; e + kChains * size <= width; e += kChains * size) {
        fn(Whole{}, e, 0);
        fn(Whole{}, e + size, 1);
        fn(Whole{}, e + 2 * size, 2);
        fn(Whole{}, e + 3 * size, 3);
    }
    for (; e + size <= width; e += size) fn(Whole{}, e, 0);
    if constexpr (size > 1)
        if (e < width) fn(First{width - e}, e, 1);
}

template <class F, class V>
VITOK_INLINE F row_mean(const V (&chain)[kChains], int64_t width) {
    return lanes_sum((chain[0] + chain[1]) + (chain[2] + chain[3])) / static_cast<F>(width);
}

// Where there is no mean, none is subtracted.
template <bool kCentred, class V>
VITOK_INLINE V hat(V s, V mean, V rstd) {
    if constexpr (kCentred) return norm_hat(s, mean, rstd);
    else return s * rstd;
}

#define VITOK_EACH(...) [&](auto at, int64_t e, int chain) __attribute__((always_inline)) { (void)chain; __VA_ARGS__ }

template <class T, class W, bool kCentred, bool kAdd>
void forward(const NormForward& n) {
    using F = compute_t<T>;
    using Wide = Vector<F>;
    using V = typename Wide::type;
    const int64_t width = n.width;
    const W *const scale = static_cast<const W*>(n.scale), *const weight = static_cast<const W*>(n.weight),
            *const bias = static_cast<const W*>(n.bias);
    F* const means = kCentred ? static_cast<F*>(n.stats) : nullptr;
    F* const rstds = n.stats ? static_cast<F*>(n.stats) + (kCentred ? n.rows : 0) : nullptr;
    [[maybe_unused]] const bool parallel = n.rows > 1 && n.rows * width >= kParallelElements;

#if defined(_OPENMP)
#pragma omp parallel for schedule(static) if (parallel)
#endif
    for (int64_t r = 0; r < n.rows; ++r) {
        const T* row = static_cast<const T*>(n.x) + r * n.x_stride;
        const V zero = Wide::all(0);
        V moment[kChains] = {zero, zero, zero, zero};
        const auto count = [&](V v, int chain) __attribute__((always_inline)) {
            moment[chain] = kCentred ? moment[chain] + v : lanes_fma(v, v, moment[chain]);
        };
        if constexpr (kAdd) {
            const T *const x = row, *const residual = static_cast<const T*>(n.residual) + r * n.residual_stride;
            T* const s = static_cast<T*>(n.s) + r * width;
            over_row<F>(width, VITOK_EACH({
                V v = at.load(x + e);
                if (scale) v = v * at.load(scale + e);
                at.store(s + e, at.load(residual + e) + v);
                count(at.load(s + e), chain);  // the sum as it is stored
            }));
            row = s;
        } else {
            over_row<F>(width, VITOK_EACH({ count(at.load(row + e), chain); }));
        }

        F mean = 0, variance = row_mean<F>(moment, width);
        if constexpr (kCentred) {
            mean = variance;
            const V means_of_row = Wide::all(mean);
            V spread[kChains] = {zero, zero, zero, zero};
            over_row<F>(width, VITOK_EACH({
                const V distance = at.load(row + e, mean) - means_of_row;
                spread[chain] = lanes_fma(distance, distance, spread[chain]);
            }));
            variance = row_mean<F>(spread, width);
        }
        const F rstd = F(1) / square_root(variance + static_cast<F>(n.eps));
        if (kCentred && means) means[r] = mean;
        if (rstds) rstds[r] = rstd;

        T* const y = static_cast<T*>(n.y) + r * width;
        const V shift = Wide::all(mean), factor = Wide::all(rstd);
        over_row<F>(width, VITOK_EACH({
            V v = hat<kCentred>(at.load(row + e), shift, factor);
            if (weight) v = v * at.load(weight + e);
            if (bias) v = v + at.load(bias + e);
            at.store(y + e, v);
        }));
    }
}

// The gradients of R rows from `first` on; those of the parameters are added to [width] each, where they are wanted.
template <class T, class W, bool kCentred, int R, class F = compute_t<T>>
VITOK_INLINE void backward_rows(const NormBackward& n, int64_t first, F* grad_weight, F* grad_bias, F* grad_scale) {
    using Wide = Vector<F>;
    using V = typename Wide::type;
    const int64_t width = n.width;
    const W *const scale = static_cast<const W*>(n.scale), *const weight = static_cast<const W*>(n.weight);
    const F* const means = static_cast<const F*>(n.stats) + first;
    const F* const rstds = means + (kCentred ? n.rows : 0);
    const T *s[R], *grad_y[R];
    V mean[R], rstd[R], sum[R], product[R];
    for (int i = 0; i < R; ++i) {
        s[i] = static_cast<const T*>(n.s) + (first + i) * n.s_stride;
        grad_y[i] = static_cast<const T*>(n.grad_y) + (first + i) * n.grad_y_stride;
        mean[i] = Wide::all(kCentred ? means[i] : F(0)), rstd[i] = Wide::all(rstds[i]);
        sum[i] = product[i] = Wide::all(0);
    }

    const auto first_pass = [&](auto at, int64_t e) __attribute__((always_inline)) {
        V to_weight = Wide::all(0), to_bias = Wide::all(0), w = Wide::all(1);
        if (weight) w = at.load(weight + e);
        for (int i = 0; i < R; ++i) {
            const V dy = at.load(grad_y[i] + e), h = hat<kCentred>(at.load(s[i] + e), mean[i], rstd[i]), g = dy * w;
            if constexpr (kCentred) sum[i] = sum[i] + g;
            product[i] = lanes_fma(g, h, product[i]);
            to_weight = lanes_fma(dy, h, to_weight);
            to_bias = to_bias + dy;
        }
        if (grad_weight) at.store(grad_weight + e, at.load(grad_weight + e) + to_weight);
        if (grad_bias) at.store(grad_bias + e, at.load(grad_bias + e) + to_bias);
    };
    const auto second_pass = [&](auto at, int64_t e) __attribute__((always_inline)) {
        V to_scale = Wide::all(0), w = Wide::all(1), factor = w;
        if (weight) w = at.load(weight + e);
        if (scale) factor = at.load(scale + e);
        for (int i = 0; i < R; ++i) {
            const int64_t r = first + i;
            const V h = hat<kCentred>(at.load(s[i] + e), mean[i], rstd[i]);
            V gradient = norm_grad(at.load(grad_y[i] + e) * w, h, rstd[i], sum[i], product[i]);
            if (n.grad_s) gradient = gradient + at.load(static_cast<const T*>(n.grad_s) + r * n.grad_s_stride + e);
            at.store(static_cast<T*>(n.grad_sum) + r * width + e, gradient);
            if (scale) {
                at.store(static_cast<T*>(n.grad_x) + r * width + e, gradient * factor);
                to_scale = lanes_fma(gradient, at.load(static_cast<const T*>(n.x) + r * n.x_stride + e), to_scale);
            }
        }
        if (grad_scale) at.store(grad_scale + e, at.load(grad_scale + e) + to_scale);
    };

    constexpr int64_t size = Wide::size;
    const int64_t whole = width / size * size;
    for (int64_t e = 0; e < whole; e += size) first_pass(Whole{}, e);
    if constexpr (size > 1)
        if (whole < width) first_pass(First{width - whole}, whole);
    for (int i = 0; i < R; ++i) {
        sum[i] = Wide::all(lanes_sum(sum[i]) / static_cast<F>(width));
        product[i] = Wide::all(lanes_sum(product[i]) / static_cast<F>(width));
    }
    for (int64_t e = 0; e < whole; e += size) second_pass(Whole{}, e);
    if constexpr (size > 1)
        if (whole < width) second_pass(First{width - whole}, whole);
}

template <class T, class W, bool kCentred>
void backward(const NormBackward& n) {
    using F = compute_t<T>;
    const int64_t columns = n.parameters() * n.width;
    F* const partials = static_cast<F*>(n.partials);
    [[maybe_unused]] const bool parallel = n.blocks > 1 && n.rows * n.width >= kParallelElements;

#if defined(_OPENMP)
#pragma omp parallel for schedule(static) if (parallel)
#endif
    for (int64_t block = 0; block < n.blocks; ++block) {
        F* next = partials + block * columns;
        for (int64_t e = 0; e < columns; ++e) next[e] = 0;
        F *grad_weight = nullptr, *grad_bias = nullptr, *grad_scale = nullptr;
        if (n.weight_grad) grad_weight = next, next += n.width;
        if (n.bias_grad) grad_bias = next, next += n.width;
        if (n.scale_grad) grad_scale = next;
        int64_t r = norm_first_row(block, n.rows, n.blocks);
        const int64_t end = norm_first_row(block + 1, n.rows, n.blocks);
        for (; r + kGroup <= end; r += kGroup)
            backward_rows<T, W, kCentred, kGroup>(n, r, grad_weight, grad_bias, grad_scale);
        for (; r < end; ++r) backward_rows<T, W, kCentred, 1>(n, r, grad_weight, grad_bias, grad_scale);
    }

    constexpr int64_t kTile = 64;  // columns summed together, in registers
#if defined(_OPENMP)
#pragma omp parallel for schedule(static) if (parallel)
#endif
    for (int64_t tile = 0; tile < ceil_div(columns, kTile); ++tile) {
        const int64_t first = tile * kTile, count = first + kTile <= columns ? kTile : columns - first;
        F total[kTile] = {};
        for (int64_t block = 0; block < n.blocks; ++block) {
            const F* const from = partials + block * columns + first;
            if (count == kTile) {
                for (int64_t e = 0; e < kTile; ++e) total[e] += from[e];
            } else {
                for (int64_t e = 0; e < count; ++e) total[e] += from[e];
            }
        }
        for (int64_t e = 0; e < count; ++e) static_cast<F*>(n.grads)[first + e] = total[e];
    }
}

}  // namespace

void norm_forward(const NormForward& n) {
    with_norm_dtypes(n.dtype, n.parameter_dtype, [&](auto element, auto parameter) {
        using T = decltype(element);
        using W = decltype(parameter);
        if (n.centred) return n.residual ? forward<T, W, true, true>(n) : forward<T, W, true, false>(n);
        return n.residual ? forward<T, W, false, true>(n) : forward<T, W, false, false>(n);
    });
}

void norm_backward(const NormBackward& n) {
    with_norm_dtypes(n.dtype, n.parameter_dtype, [&](auto element, auto parameter) {
        using T = decltype(element);
        using W = decltype(parameter);
        return n.centred ? backward<T, W, true>(n) : backward<T, W, false>(n);
    });
}

}  // namespace VITOK_ISA
}  // namespace vitok
