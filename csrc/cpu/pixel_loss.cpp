// The kernels of common/pixel_loss.h on the CPU. Compiled once per instruction set, in the namespace VITOK_ISA; no
// standard library templates in here, because their inline copies would leak across instruction sets.
#include "../common/pixel_loss.h"
#include "dispatch.h"
#include "interleave.h"
#include "lanes.h"

namespace vitok {
namespace VITOK_ISA {
namespace {

// Below this many elements the fork costs more than the threads save.
constexpr int64_t kParallelElements = 1 << 15;

// Pixels whose colours do not neighbour are brought together first, a line of several tokens at once, which is vectorised; the
// 16-bit floats become fp32 on the way, so that few pairs of types have kernels. In fp32 this is a first-level cache.
constexpr int64_t kStage = 12288;

// One frame of one token: `lines` real lines of `n` real elements each, in both pictures.
template <class P, class S>
struct Patch {
    const P* prediction;  // lines `run` apart
    const S* target;      // lines `pitch` apart
    int64_t run, pitch, lines, n;
};

// How a number of either type is compared: d, f(d) and the gradient, for numbers and for vectors.
template <Distance kDistance, class F>
struct Formula {
    F scale, shift, eps_squared, weight;

    template <class V>
    V difference(V prediction, V target) const {
        return prediction - (target * scale + shift);
    }
    double distance(double d) const { return pixel_distance<kDistance>(d, double(eps_squared)); }
    Lanes distance(Lanes d) const {
        if (kDistance == Distance::l1) return lanes_max(-d, d);
        if (kDistance == Distance::l2) return d * d;
        return lanes_sqrt(lanes_fma(d, d, lanes_set(eps_squared)));
    }
    double gradient(double d) const { return weight * pixel_slope<kDistance>(d, double(eps_squared)); }
    Lanes gradient(Lanes d) const {
        const Lanes zero = lanes_set(0.0f), one = lanes_set(weight);
        if (kDistance == Distance::l1) return lanes_where_less(zero, d, one, lanes_where_less(d, zero, -one, zero));
        if (kDistance == Distance::l2) return (d + d) * one;
        return d / lanes_sqrt(lanes_fma(d, d, lanes_set(eps_squared))) * one;
    }
};

// x in the last n lanes, 0 in the others.
VITOK_INLINE Lanes last_lanes(Lanes x, int64_t n) {
    int32_t keep[2 * kLanes];
    for (int i = 0; i < kLanes; ++i) keep[i] = 0, keep[kLanes + i] = -1;
    IntLanes mask;
    memcpy(&mask, keep + n, sizeof mask);
    return bits_lanes(lanes_bits(x) & mask);
}

// The sum of f over a patch.
template <class P, class S, class Formula>
__attribute__((noinline)) float sum_patch(const Patch<P, S>& a, const Formula& f) {
    Lanes sum = lanes_set(0.0f);
    const P* prediction = a.prediction;
    const S* target = a.target;
    const int64_t whole = a.n - a.n % kLanes, rest = a.n % kLanes;
    for (int64_t line = 0; line < a.lines; ++line, prediction += a.run, target += a.pitch) {
        for (int64_t e = 0; e < whole; e += kLanes)
            sum += f.distance(f.difference(lanes_load(prediction + e), lanes_load(target + e)));
        if (rest && whole) {  // a vector that overlaps the one before; what that one counted is cleared
            const int64_t e = a.n - kLanes;
            sum += last_lanes(f.distance(f.difference(lanes_load(prediction + e), lanes_load(target + e))), rest);
        } else if (rest) {
            const Lanes d = f.difference(lanes_load_first(prediction, rest), lanes_load_first(target, rest));
            float first[kLanes] = {};
            lanes_store_first(first, f.distance(d), rest);
            sum += lanes_load(first);
        }
    }
    return lanes_sum(sum);
}

template <class S, class Formula>
double sum_patch(const Patch<double, S>& a, const Formula& f) {
    double sum = 0;
    for (int64_t line = 0; line < a.lines; ++line)
        for (int64_t e = 0; e < a.n; ++e) {
            const double x = a.prediction[line * a.run + e], y = widen(a.target[line * a.pitch + e]);
            sum += f.distance(f.difference(x, y));
        }
    return sum;
}

// The gradient of a patch of p lines of `run` elements, 0 beyond the real ones.
template <class P, class S, class Formula>
__attribute__((noinline)) void gradient_patch(const Patch<P, S>& a, const Formula& f, P* to, int64_t p) {
    const P* prediction = a.prediction;
    const S* target = a.target;
    for (int64_t line = 0; line < a.lines; ++line, prediction += a.run, target += a.pitch, to += a.run) {
        if (a.n < kLanes) {
            const Lanes d = f.difference(lanes_load_first(prediction, a.n), lanes_load_first(target, a.n));
            lanes_store_first(to, f.gradient(d), a.n);
        } else {
            for (int64_t e = 0; e < a.n; e += kLanes) {
                if (e > a.n - kLanes) e = a.n - kLanes;
                lanes_store(to + e, f.gradient(f.difference(lanes_load(prediction + e), lanes_load(target + e))));
            }
        }
        if (a.n < a.run) memset(to + a.n, 0, static_cast<size_t>(a.run - a.n) * sizeof(P));
    }
    if (a.lines < p) memset(to, 0, static_cast<size_t>((p - a.lines) * a.run) * sizeof(P));
}

template <class S, class Formula>
void gradient_patch(const Patch<double, S>& a, const Formula& f, double* to, int64_t p) {
    for (int64_t line = 0; line < p; ++line)
        for (int64_t e = 0; e < a.run; ++e) {
            const bool real = line < a.lines && e < a.n;
            const double x = real ? a.prediction[line * a.run + e] : 0, y = real ? widen(a.target[line * a.pitch + e]) : 0;
            to[line * a.run + e] = real ? f.gradient(f.difference(x, y)) : 0;
        }
}

// count pixels of one line, from the element at `offset` of a target of any dtype that is compared as S.
template <class S>
__attribute__((noinline)) void stage_line(const PixelPair& a, int64_t offset, S* to, int64_t count) {
    const auto from = [&](auto element) { return static_cast<const decltype(element)*>(a.target) + offset; };
    if (sizeof(S) == 4 && a.target_dtype == DType::float16)
        interleave(from(f16{}), a.strides[3], a.strides[4], to, count);
    else if (sizeof(S) == 4 && a.target_dtype == DType::bfloat16)
        interleave(from(bf16{}), a.strides[3], a.strides[4], to, count);
    else
        interleave(from(S{}), a.strides[3], a.strides[4], to, count);
}

// Calls visit(token, frame, patch) for every frame of every token of token row `row`, in a fixed order. Frames beyond the
// clip come with no lines.
template <class P, class S, class Visit>
VITOK_INLINE void each_patch(const PixelPair& a, int64_t row, Visit&& visit) {
    const int64_t q = a.q, p = a.p, run = 3 * p, columns = a.columns();
    const int64_t ly = row % a.rows_y(), lt = row / a.rows_y() % a.rows_t(), b = row / a.rows_y() / a.rows_t();
    const int64_t within = row % (a.rows_y() * a.rows_t());  // the row among those of its sample
    const bool as_it_is = a.target_dtype != DType::float16 && a.target_dtype != DType::bfloat16;
    const bool direct = as_it_is && a.strides[4] == 1 && (a.strides[3] == 3 || a.sizes[3] == 1);
    const int64_t stretch = direct ? columns : run * p <= kStage ? kStage / (run * p) : 1;  // tokens
    const int64_t lines = smaller(p, a.sizes[2] - ly * p);
    const P* const prediction =
        static_cast<const P*>(a.prediction) + b * a.prediction_strides[0] + within * columns * a.prediction_strides[1];
    const int64_t origin = b * a.strides[0] + ly * p * a.strides[2];
    S stage[kStage];

    for (int64_t first = 0; first < columns; first += stretch) {
        const int64_t last = smaller(first + stretch, columns), x0 = first * p;
        for (int64_t i = 0; i < q; ++i) {
            const int64_t t = lt * q + i;
            const int64_t offset = origin + t * a.strides[1] + x0 * a.strides[3];
            const S* from = stage;
            int64_t pitch = (last - first) * run, staged = lines;
            if (t >= a.sizes[1]) {
                staged = 0;
            } else if (direct) {
                from = static_cast<const S*>(a.target) + offset, pitch = a.strides[2];
            } else if (run * p <= kStage) {
                for (int64_t line = 0; line < lines; ++line)
                    stage_line(a, offset + line * a.strides[2], stage + line * pitch, smaller(last * p, a.sizes[3]) - x0);
            }
            for (int64_t lx = first; lx < last; ++lx) {
                const int64_t n = 3 * smaller(p, a.sizes[3] - lx * p);
                const P* const of = prediction + lx * a.prediction_strides[1] + i * p * run;
                if (direct || staged == 0 || run * p <= kStage) {
                    visit(lx, i, Patch<P, S>{of, staged ? from + (lx - first) * run : from, run, pitch, staged, n}, p);
                } else {  // a patch too large for the stage: line by line
                    for (int64_t line = 0; line < lines; ++line) {
                        stage_line(a, offset + line * a.strides[2], stage, n / 3);
                        const int64_t most = line + 1 < lines ? 1 : p - line;  // the last one stands for those beyond the clip
                        visit(lx, i * p + line, Patch<P, S>{of + line * run, stage, run, run, 1, n}, most);
                    }
                }
            }
        }
    }
}

template <class P, class S, class F, Distance kDistance>
Formula<kDistance, F> formula(const PixelPair& a, F weight) {
    return {static_cast<F>(a.scale), static_cast<F>(a.shift), static_cast<F>(a.eps * a.eps), weight};
}

template <class P, class S, Distance kDistance>
void forward(const PixelLossForward& a) {
    using F = compute_t<P>;
    const Formula<kDistance, F> f = formula<P, S, F, kDistance>(a, F(1));
    const int64_t columns = a.columns(), tokens = a.tokens(), rows = a.sizes[0] * a.rows_t() * a.rows_y();
    F* const partial = static_cast<F*>(a.partial);
    [[maybe_unused]] const bool parallel = rows > 1 && a.sizes[0] * tokens * a.token() >= kParallelElements;
#if defined(_OPENMP)
#pragma omp parallel for schedule(static) if (parallel)
#endif
    for (int64_t row = 0; row < rows; ++row) {
        F* const sums = partial + row * columns;
        each_patch<P, S>(a, row, [&](int64_t lx, int64_t part, const Patch<P, S>& patch, int64_t) {
            const F sum = sum_patch(patch, f);
            sums[lx] = part == 0 ? sum : sums[lx] + sum;
        });
    }
    for (int64_t b = 0; b < a.sizes[0]; ++b) {
        double sum = 0;
        for (int64_t l = 0; l < tokens; ++l) sum += partial[b * tokens + l];
        static_cast<F*>(a.loss)[b] = static_cast<F>(sum * a.weight());
    }
}

template <class P, class S, Distance kDistance>
void backward(const PixelLossBackward& a) {
    using F = compute_t<P>;
    const int64_t columns = a.columns(), token = a.token(), per_sample = a.rows_t() * a.rows_y(), rows = a.sizes[0] * per_sample;
    const F* const grad = static_cast<const F*>(a.grad);
    P* const out = static_cast<P*>(a.grad_prediction);
    [[maybe_unused]] const bool parallel = rows > 1 && rows * columns * token >= kParallelElements;
#if defined(_OPENMP)
#pragma omp parallel for schedule(static) if (parallel)
#endif
    for (int64_t row = 0; row < rows; ++row) {
        const F weight = grad[row / per_sample * a.grad_stride] * static_cast<F>(a.weight());
        const Formula<kDistance, F> f = formula<P, S, F, kDistance>(a, weight);
        const P* const start = static_cast<const P*>(a.prediction) + row / per_sample * a.prediction_strides[0] +
                               row % per_sample * columns * a.prediction_strides[1];
        each_patch<P, S>(a, row, [&](int64_t lx, int64_t, const Patch<P, S>& patch, int64_t lines) {
            const int64_t within = patch.prediction - (start + lx * a.prediction_strides[1]);
            gradient_patch(patch, f, out + (row * columns + lx) * token + within, lines);
        });
    }
}

// Calls fn(prediction element, element that the target is compared as, distance).
template <class Fn>
void with_compared(const PixelPair& a, Fn&& fn) {
    with_float(a.dtype, [&](auto prediction) {
        with_distance(a.distance(), [&](auto distance) {
            if (a.target_dtype == DType::uint8) fn(prediction, uint8_t{}, distance);
            else fn(prediction, compute_t<decltype(prediction)>{}, distance);
        });
    });
}

}  // namespace

void pixel_loss_forward(const PixelLossForward& a) {
    with_compared(a, [&](auto prediction, auto target, auto distance) {
        forward<decltype(prediction), decltype(target), decltype(distance)::value>(a);
    });
}

void pixel_loss_backward(const PixelLossBackward& a) {
    with_compared(a, [&](auto prediction, auto target, auto distance) {
        backward<decltype(prediction), decltype(target), decltype(distance)::value>(a);
    });
}

}  // namespace VITOK_ISA
}  // namespace vitok
