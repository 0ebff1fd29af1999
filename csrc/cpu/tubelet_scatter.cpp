// The scatter of common/tubelet_scatter.h on the CPU. Compiled once per instruction set, in the namespace VITOK_ISA; no
// standard library templates in here, because their inline copies would leak across instruction sets.
#include "../common/tubelet_scatter.h"
#include "dispatch.h"
#include "lanes.h"

namespace vitok {
namespace VITOK_ISA {
namespace {

// As in the gather: a work item is one token row's stretch of about this many pixels, whose patch rows stay in the first-level
// cache while p rows of the clip are read out of them.
constexpr int64_t kStretch = 256;

// Below this many elements the fork costs more than the threads save.
constexpr int64_t kParallelElements = 1 << 15;

template <class T>
VITOK_INLINE void convert(const T* from, T* to, int64_t n) {
    memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
}

template <class T>
VITOK_INLINE void store(T* to, Lanes x) {
    lanes_store(to, x);
}
VITOK_INLINE void store(uint8_t* to, Lanes x) {
    const Lanes one = lanes_set(1.0f);
    lanes_store(to, (lanes_min(lanes_max(x, lanes_set(-1.0f)), one) + one) * lanes_set(127.5f));  // the bound gets NaN's place
}

// n elements; the last vector overlaps the one before it instead of leaving a scalar remainder.
template <class S, class D>
VITOK_INLINE void convert(const S* from, D* to, int64_t n) {
    if (n < kLanes) {
        for (int64_t e = 0; e < n; ++e) to_pixel(widen(from[e]), to[e]);
        return;
    }
    int64_t e = 0;
    for (; e + kLanes <= n; e += kLanes) store(to + e, lanes_load(from + e));
    if (e < n) store(to + n - kLanes, lanes_load(from + n - kLanes));
}

#if defined(__AVX2__)

// The byte shuffles that collect a colour from 48 interleaved bytes: for each colour and each third of the 48, the byte of
// that third which goes to each place, or 0x80 for none.
template <int Size>
struct Picks {
    alignas(16) uint8_t byte[3][3][16];
    constexpr Picks() : byte() {
        for (int ch = 0; ch < 3; ++ch)
            for (int third = 0; third < 3; ++third)
                for (int n = 0; n < 16; ++n) {
                    const int from = (n / Size * 3 + ch) * Size + n % Size;
                    byte[ch][third][n] = static_cast<uint8_t>(from / 16 == third ? from % 16 : 0x80);
                }
    }
};

// As many whole groups of 16 bytes a plane as there are; returns the pixels done. The compiler's own vectors of the loop in
// deinterleave were slower than the eager copy for 16-bit types.
template <class D>
VITOK_INLINE int64_t split_planes(const D* from, D* to, int64_t stride_c, int64_t count) {
    constexpr int64_t group = 16 / sizeof(D);
    static constexpr Picks<sizeof(D)> picks;
    const auto pick = [&](__m128i x, int ch, int third) {
        return _mm_shuffle_epi8(x, _mm_load_si128(reinterpret_cast<const __m128i*>(picks.byte[ch][third])));
    };
    int64_t x = 0;
    for (; x + group <= count; x += group) {
        const __m128i* const in = reinterpret_cast<const __m128i*>(from + 3 * x);
        const __m128i a = _mm_loadu_si128(in), b = _mm_loadu_si128(in + 1), c = _mm_loadu_si128(in + 2);
        for (int ch = 0; ch < 3; ++ch) {
            const __m128i plane = _mm_or_si128(_mm_or_si128(pick(a, ch, 0), pick(b, ch, 1)), pick(c, ch, 2));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + ch * stride_c + x), plane);
        }
    }
    return x;
}

#else

template <class D>
VITOK_INLINE int64_t split_planes(const D*, D*, int64_t, int64_t) {
    return 0;
}

#endif

// count pixels r g b r g b ... to where a row of the clip has them.
template <class D>
VITOK_INLINE void deinterleave(const D* __restrict from, D* to, int64_t stride_x, int64_t stride_c, int64_t count) {
    if (stride_x == 1) {  // three planes: this form is vectorised
        D* __restrict red = to;
        D* __restrict green = to + stride_c;
        D* __restrict blue = to + 2 * stride_c;
        for (int64_t x = split_planes(from, to, stride_c, count); x < count; ++x) {
            red[x] = from[3 * x];
            green[x] = from[3 * x + 1];
            blue[x] = from[3 * x + 2];
        }
    } else {
        for (int64_t x = 0; x < count; ++x)
            for (int64_t ch = 0; ch < 3; ++ch) to[x * stride_x + ch * stride_c] = from[3 * x + ch];
    }
}

template <class S, class D, class F>
void scatter(const TubeletScatter& s) {
    const int64_t frames = s.sizes[1], height = s.sizes[2], width = s.sizes[3];
    const int64_t p = s.p, q = s.q, run = 3 * p, stride_e = s.src_strides[2];
    const int64_t rows_t = ceil_div(frames, q), rows_y = ceil_div(height, p), columns = ceil_div(width, p);
    const int64_t stretch = p < kStretch ? kStretch / p : 1;  // tokens
    const int64_t stretches = ceil_div(columns, stretch);
    const int64_t items = s.sizes[0] * rows_t * rows_y * stretches;
    const bool interleaved = s.strides[4] == 1 && (s.strides[3] == 3 || width == 1);
    const S* const source = static_cast<const S*>(s.src);
    D* const target = static_cast<D*>(s.dst);
    [[maybe_unused]] const bool parallel = items > 1 && items * stretch * q * p * run >= kParallelElements;

#if defined(_OPENMP)
#pragma omp parallel for schedule(static) if (parallel)
#endif
    for (int64_t item = 0; item < items; ++item) {
        const int64_t first = item % stretches * stretch;  // first token of the stretch
        const int64_t last = first + stretch < columns ? first + stretch : columns;
        const int64_t token_row = item / stretches;
        const int64_t ly = token_row % rows_y, lt = token_row / rows_y % rows_t, b = token_row / rows_y / rows_t;
        const int64_t x0 = first * p;
        const int64_t pixels = (last * p < width ? last * p : width) - x0;
        const S* const tokens = source + b * s.src_strides[0] + ((lt * rows_y + ly) * columns + first) * s.src_strides[1];
        D buffer[3 * kMaxPatch];
        F sums[3 * kMaxPatch];
        static_assert(kStretch <= kMaxPatch, "the buffers hold one row of a stretch");

        for (int64_t i = 0; i < q && lt * q + i < frames; ++i) {
            for (int64_t j = 0; j < p && ly * p + j < height; ++j) {
                const int64_t t = lt * q + i, y = ly * p + j;
                D* const to = target + b * s.strides[0] + t * s.strides[1] + y * s.strides[2] + x0 * s.strides[3];
                D* const line = interleaved ? to : buffer;
                // The rows of the tubelets that belong to this row of the clip: several where padding repeated it.
                const int64_t i_end = s.fold_edges && t == frames - 1 ? q : i + 1;
                const int64_t j_end = s.fold_edges && y == height - 1 ? p : j + 1;
                const bool fold_x = s.fold_edges && x0 + pixels == width && width % p != 0;

                if (i_end > i + 1 || j_end > j + 1 || fold_x) {
                    for (int64_t e = 0; e < 3 * pixels; ++e) sums[e] = 0;
                    for (int64_t from_i = i; from_i < i_end; ++from_i)
                        for (int64_t from_j = j; from_j < j_end; ++from_j)
                            for (int64_t x = 0; x < (fold_x ? (last - first) * p : pixels); ++x) {
                                const S* from = tokens + x / p * s.src_strides[1] +
                                                ((from_i * p + from_j) * run + x % p * 3) * stride_e;
                                F* const sum = sums + 3 * clamp_edge(x, pixels);
                                for (int64_t ch = 0; ch < 3; ++ch) sum[ch] += widen(from[ch * stride_e]);
                            }
                    for (int64_t e = 0; e < 3 * pixels; ++e) to_pixel(sums[e], line[e]);
                } else {
                    const S* from = tokens + (i * p + j) * run * stride_e;
                    for (int64_t x = 0; x < pixels; x += p, from += s.src_strides[1]) {
                        const int64_t n = 3 * (x + p < pixels ? p : pixels - x);
                        if (stride_e == 1) {
                            convert(from, line + 3 * x, n);
                        } else {
                            for (int64_t e = 0; e < n; ++e) to_pixel(widen(from[e * stride_e]), line[3 * x + e]);
                        }
                    }
                }
                if (!interleaved) deinterleave(buffer, to, s.strides[3], s.strides[4], pixels);
            }
        }
    }
}

}  // namespace

void tubelet_scatter(const TubeletScatter& s) {
    with_dtypes(s.dst_dtype, s.src_dtype, [&](auto target, auto source) {
        scatter<decltype(source), decltype(target), compute_t<decltype(source)>>(s);
    });
}

}  // namespace VITOK_ISA
}  // namespace vitok
