// The gather of common/tubelet_gather.h on the CPU. Compiled once per instruction set, in the namespace VITOK_ISA; no
// standard library templates in here, because their inline copies would leak across instruction sets.
#include "../common/tubelet_gather.h"
#include "dispatch.h"
#include "interleave.h"
#include "lanes.h"

namespace vitok {
namespace VITOK_ISA {
namespace {

// A work item is one token row's stretch of about this many pixels. Its patch rows (3 bytes a pixel in, 1.5 KB a 16 x 16
// token out in bf16) stay in the first-level cache while its p source rows are scattered into them.
constexpr int64_t kStretch = 256;

// Below this many elements the fork costs more than the threads save.
constexpr int64_t kParallelElements = 1 << 15;

template <class S, class D, class F>
VITOK_INLINE void convert_scalar(const S* from, D* to, int64_t n, F scale, F shift) {
    for (int64_t e = 0; e < n; ++e) narrow(normalise(widen(from[e]), scale, shift), to[e]);
}

VITOK_INLINE void convert(const double* from, double* to, int64_t n, double scale, double shift) {
    convert_scalar(from, to, n, scale, shift);
}

// n elements; the last vector overlaps the one before it instead of leaving a scalar remainder.
template <class S, class D>
VITOK_INLINE void convert(const S* from, D* to, int64_t n, float scale, float shift) {
    if (n < kLanes) return convert_scalar(from, to, n, scale, shift);
    const Lanes scales = lanes_set(scale), shifts = lanes_set(shift);
    int64_t e = 0;
    for (; e + kLanes <= n; e += kLanes) lanes_store(to + e, lanes_load(from + e) * scales + shifts);
    if (e < n) {
        e = n - kLanes;
        lanes_store(to + e, lanes_load(from + e) * scales + shifts);
    }
}

template <class S, class D, class F>
void gather(const TubeletGather& g) {
    const F scale = static_cast<F>(g.scale), shift = static_cast<F>(g.shift);
    const int64_t p = g.p, q = g.q, run = 3 * p, token = q * p * run;
    const int64_t rows_t = ceil_div(g.sizes[1], q), rows_y = ceil_div(g.sizes[2], p), columns = ceil_div(g.sizes[3], p);
    const int64_t stretch = p < kStretch ? kStretch / p : 1;  // tokens
    const int64_t stretches = ceil_div(columns, stretch);
    const int64_t items = g.sizes[0] * rows_t * rows_y * stretches;
    const bool interleaved = g.strides[4] == 1 && (g.strides[3] == 3 || g.sizes[3] == 1);
    const S* const source = static_cast<const S*>(g.src);
    D* const target = static_cast<D*>(g.dst);
    D zero;
    narrow(F(0), zero);
    [[maybe_unused]] const bool parallel = items > 1 && items * stretch * token >= kParallelElements;

#if defined(_OPENMP)
#pragma omp parallel for schedule(static) if (parallel)
#endif
    for (int64_t item = 0; item < items; ++item) {
        const int64_t first = item % stretches * stretch;  // first token of the stretch
        const int64_t last = first + stretch < columns ? first + stretch : columns;
        const int64_t token_row = item / stretches;
        const int64_t ly = token_row % rows_y, lt = token_row / rows_y % rows_t, b = token_row / rows_y / rows_t;
        const int64_t x0 = first * p;
        const int64_t pixels = (last * p < g.sizes[3] ? last * p : g.sizes[3]) - x0;
        const int64_t whole = pixels / p, rest = pixels % p;  // complete tokens, and pixels of the one cut by the edge
        D* const out = target + (token_row * columns + first) * token;
        S buffer[3 * kMaxPatch];
        static_assert(kStretch <= kMaxPatch, "the buffer holds one row of a stretch");

        for (int64_t ij = 0; ij < q * p; ++ij) {
            const int64_t t = lt * q + ij / p, y = ly * p + ij % p;
            D* to = out + ij * run;
            if (g.pad_zero && (t >= g.sizes[1] || y >= g.sizes[2])) {
                for (int64_t lx = first; lx < last; ++lx, to += token)
                    for (int64_t e = 0; e < run; ++e) to[e] = zero;
                continue;
            }
            const S* row = source + b * g.strides[0] + clamp_edge(t, g.sizes[1]) * g.strides[1] +
                           clamp_edge(y, g.sizes[2]) * g.strides[2] + x0 * g.strides[3];
            if (!interleaved) {
                interleave(row, g.strides[3], g.strides[4], buffer, pixels);
                row = buffer;
            }
            for (int64_t lx = 0; lx < whole; ++lx, to += token, row += run) convert(row, to, run, scale, shift);
            if (rest) {
                convert(row, to, 3 * rest, scale, shift);
                for (int64_t e = 3 * rest; e < run; ++e) to[e] = g.pad_zero ? zero : to[e - 3];
            }
        }
    }
}

}  // namespace

void tubelet_gather(const TubeletGather& g) {
    with_dtypes(g.src_dtype, g.dst_dtype, [&](auto source, auto target) {
        gather<decltype(source), decltype(target), compute_t<decltype(target)>>(g);
    });
}

}  // namespace VITOK_ISA
}  // namespace vitok
