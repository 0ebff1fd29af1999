// gaussian_sample of common/gaussian_sample.h on the CPU. Compiled once per instruction set, in the namespace VITOK_ISA; no
// standard library templates in here.
//
// A work item is a chunk of one sample: its moments are widened into flat buffers in the first-level cache, whatever the number
// of channels and the strides, the noise is made beside them, and everything after that is a loop over whole vectors.
#include "../common/gaussian_sample.h"

#include "dispatch.h"
#include "noise_lanes.h"

namespace vitok {
namespace VITOK_ISA {
namespace {

static_assert(kSampleChunk % kNoiseGroup == 0, "chunks begin where the noise can");

// Below this many elements, some 30 us of work, the fork costs more than the threads save.
constexpr int64_t kParallelElements = 1 << 13;

// Calls move(address in a row, index in the chunk, run) for stretches of rows of `channels` elements that make up the elements
// first .. first + n - 1.
template <class T, class Move>
VITOK_INLINE void walk(T* rows, int64_t channels, int64_t row_stride, int64_t stride, int64_t first, int64_t n, Move&& move) {
    if (stride == 1 && row_stride == channels) channels = first + n;  // the rows are one
    T* row = rows + first / channels * row_stride;
    int64_t begin = first % channels;
    for (int64_t e = 0; e < n; row += row_stride, begin = 0) {
        const int64_t run = channels - begin < n - e ? channels - begin : n - e;
        move(row + begin * stride, e, run);
        e += run;
    }
}

// A vector at a time where the vectors of a chunk never cross the end of a row: chunks begin at multiples of kLanes.
template <class T, class Move>
VITOK_INLINE void walk_vectors(T* rows, int64_t channels, int64_t row_stride, int64_t first, int64_t n, Move&& move) {
    T* row = rows + first / channels * row_stride;
    int64_t at = first % channels;
    for (int64_t e = 0; e < n; e += kLanes) {
        move(row + at, e);
        at += kLanes;
        if (at == channels) at = 0, row += row_stride;
    }
}

// Elements first .. first + n - 1 of rows of `channels` elements, widened.
template <class T, class F>
VITOK_INLINE void gather(const T* rows, int64_t channels, int64_t row_stride, int64_t stride, int64_t first, int64_t n, F* to) {
    if constexpr (sizeof(F) == sizeof(float)) {
        if (stride == 1 && channels % kLanes == 0) {
            walk_vectors(rows, channels, row_stride, first, n, [&](const T* from, int64_t e) { lanes_store(to + e, lanes_load(from)); });
            return;
        }
    }
    walk(rows, channels, row_stride, stride, first, n, [&](const T* from, int64_t e, int64_t run) {
        for (int64_t i = 0; i < run; ++i) to[e + i] = widen(from[i * stride]);
    });
}

// The reverse, to rows of unit stride.
template <class T, class F>
VITOK_INLINE void scatter(T* rows, int64_t channels, int64_t row_stride, int64_t first, int64_t n, const F* from) {
    if constexpr (sizeof(F) == sizeof(float)) {
        if (channels % kLanes == 0) {
            walk_vectors(rows, channels, row_stride, first, n, [&](T* to, int64_t e) { lanes_store(to, lanes_load(from + e)); });
            return;
        }
    }
    walk(rows, channels, row_stride, 1, first, n, [&](T* to, int64_t e, int64_t run) {
        for (int64_t i = 0; i < run; ++i) narrow(from[e + i], to[i]);
    });
}

VITOK_INLINE Lanes excess_lanes(Lanes v, Lanes variance) {
    Lanes y = lanes_set(0x1.a0b914p-13f);
#define VITOK_STEP(c) y = lanes_fma(y, v, lanes_set(c));
    VITOK_EXCESS_COEFFICIENTS(VITOK_STEP)
#undef VITOK_STEP
    return lanes_where_less(lanes_max(v, -v), lanes_set(0.5f), y * v * v, variance - lanes_set(1.0f) - v);
}

VITOK_INLINE Lanes clamp_lanes(Lanes x) {
    return lanes_min(lanes_set(kLogvarHigh), lanes_max(lanes_set(kLogvarLow), x));
}

// The chunk's sum of mean^2 + e^v - 1 - v; a sample takes the place of the mean. The buffers are filled up with zeros to whole
// vectors, and those add nothing.
VITOK_INLINE float sample_chunk(float* mean, const float* logvar, const float* noise, int64_t n) {
    constexpr int64_t kRun = 8 * kLanes;  // runs of their own sum: fewer roundings of a sum with one large term
    Lanes sum = lanes_set(0.0f);
    for (int64_t begin = 0; begin < n; begin += kRun) {
        Lanes run = lanes_set(0.0f);
        for (int64_t e = begin; e < n && e < begin + kRun; e += kLanes) {
            const Lanes m = lanes_load(mean + e), v = clamp_lanes(lanes_load(logvar + e));
            const Lanes deviation = lanes_exp(v * 0.5f);
            run += lanes_fma(m, m, excess_lanes(v, deviation * deviation));
            if (noise) lanes_store(mean + e, lanes_fma(deviation, lanes_load(noise + e), m));
        }
        sum += run;
    }
    return lanes_sum(sum);
}

VITOK_INLINE double sample_chunk(double* mean, const double* logvar, const float* noise, int64_t n) {
    double sum = 0.0;
    for (int64_t e = 0; e < n; ++e) {
        const double m = mean[e], v = clamp_logvar(logvar[e]);
        sum += m * m + variance_excess(v, 0.0);
        if (noise) mean[e] = m + __builtin_exp(0.5 * v) * noise[e];
    }
    return sum;
}

// The gradients take the places of mean and logvar. `scale` is s; noise is null where there is no dz.
VITOK_INLINE void gradient_chunk(float* mean, float* logvar, const float* dz, const float* noise, float scale, int64_t n) {
    const Lanes zero = lanes_set(0.0f), low = lanes_set(kLogvarLow), high = lanes_set(kLogvarHigh);
    for (int64_t e = 0; e < n; e += kLanes) {
        const Lanes given = lanes_load(logvar + e), v = clamp_lanes(given);
        const Lanes deviation = lanes_exp(v * 0.5f);
        Lanes dmean = lanes_load(mean + e) * scale;
        Lanes dlogvar = (excess_lanes(v, deviation * deviation) + v) * scale;
        if (noise) {
            const Lanes d = lanes_load(dz + e);
            dmean += d;
            dlogvar = lanes_fma(d * deviation, lanes_load(noise + e), dlogvar);
        }
        dlogvar = lanes_where_less(given, low, zero, lanes_where_less(high, given, zero, dlogvar * 0.5f));
        lanes_store(mean + e, dmean);
        lanes_store(logvar + e, dlogvar);
    }
}

VITOK_INLINE void gradient_chunk(double* mean, double* logvar, const double* dz, const float* noise, double scale, int64_t n) {
    for (int64_t e = 0; e < n; ++e) {
        const double v = clamp_logvar(logvar[e]);
        double dmean = mean[e] * scale, dlogvar = __builtin_expm1(v) * scale;
        if (noise) {
            dmean += dz[e];
            dlogvar += dz[e] * __builtin_exp(0.5 * v) * noise[e];
        }
        logvar[e] = clamp_passes(logvar[e]) ? 0.5 * dlogvar : 0.0;
        mean[e] = dmean;
    }
}

// One work item: where it begins and its moments, widened.
template <class T, class F>
struct Chunk {
    int64_t b, first, n;
    alignas(64) F mean[kSampleChunk];
    alignas(64) F logvar[kSampleChunk];
    alignas(64) float noise[kSampleChunk];

    VITOK_INLINE void load(Chunk& chunk, const GaussianMoments& m, int64_t item, uint64_t seed, bool noisy) {
        const int64_t elements = m.elements(), chunks = m.chunks();
        chunk.b = item / chunks;
        chunk.first = item % chunks * kSampleChunk;
        chunk.n = elements - chunk.first < kSampleChunk ? elements - chunk.first : kSampleChunk;
        const T* const rows = static_cast<const T*>(m.data) + chunk.b * m.strides[0];
        gather(rows, m.sizes[2], m.strides[1], m.strides[2], chunk.first, chunk.n, chunk.mean);
        gather(rows + m.sizes[2] * m.strides[2], m.sizes[2], m.strides[1], m.strides[2], chunk.first, chunk.n, chunk.logvar);
        for (int64_t e = chunk.n; e % kLanes; ++e) chunk.mean[e] = chunk.logvar[e] = F(0);
        if (noisy) fill_noise(chunk.noise, seed, NoiseKeys::sample(m.keys, chunk.b), chunk.first, chunk.n);
    }
};

template <class T>
void forward(const GaussianSampleForward& g) {
    using F = compute_t<T>;
    const GaussianMoments& m = g.moments;
    const int64_t elements = m.elements(), chunks = m.chunks(), items = m.sizes[0] * chunks;
    const uint64_t seed = NoiseKeys::the_seed(m.keys);
    F* const kl = static_cast<F*>(g.kl);
    F* const partials = static_cast<F*>(g.partials);

#if defined(_OPENMP)
#pragma omp parallel for schedule(static) if (items > 1 && m.sizes[0] * elements >= kParallelElements)
#endif
    for (int64_t item = 0; item < items; ++item) {
        Chunk<T, F> chunk;
        Chunk<T, F>::load(chunk, m, item, seed, g.z != nullptr);
        partials[item] = sample_chunk(chunk.mean, chunk.logvar, g.z ? chunk.noise : nullptr, chunk.n);
        if (g.z) scatter(static_cast<T*>(g.z) + chunk.b * elements, elements, elements, chunk.first, chunk.n, chunk.mean);
    }
    for (int64_t b = 0; b < m.sizes[0]; ++b) {
        double sum = 0.0;
        for (int64_t i = 0; i < chunks; ++i) sum += partials[b * chunks + i];
        kl[b] = static_cast<F>(sum * 0.5 / static_cast<double>(elements));
    }
}

template <class T>
void backward(const GaussianSampleBackward& g) {
    using F = compute_t<T>;
    const GaussianMoments& m = g.moments;
    const int64_t channels = m.sizes[2], elements = m.elements(), items = m.sizes[0] * m.chunks();
    const uint64_t seed = NoiseKeys::the_seed(m.keys);

#if defined(_OPENMP)
#pragma omp parallel for schedule(static) if (items > 1 && m.sizes[0] * elements >= kParallelElements)
#endif
    for (int64_t item = 0; item < items; ++item) {
        Chunk<T, F> chunk;
        alignas(64) F dz[kSampleChunk];
        Chunk<T, F>::load(chunk, m, item, seed, g.dz != nullptr);
        const int64_t b = chunk.b, first = chunk.first, n = chunk.n;
        if (g.dz) {
            const T* const rows = static_cast<const T*>(g.dz) + b * g.dz_strides[0];
            gather(rows, channels, g.dz_strides[1], g.dz_strides[2], first, n, dz);
            for (int64_t e = n; e % kLanes; ++e) dz[e] = F(0);
        }
        const F scale = g.dkl ? static_cast<const F*>(g.dkl)[b * g.dkl_stride] / static_cast<F>(elements) : F(0);
        gradient_chunk(chunk.mean, chunk.logvar, dz, g.dz ? chunk.noise : nullptr, scale, n);
        T* const out = static_cast<T*>(g.dmoments) + 2 * b * elements;
        scatter(out, channels, 2 * channels, first, n, chunk.mean);
        scatter(out + channels, channels, 2 * channels, first, n, chunk.logvar);
    }
}

}  // namespace

void gaussian_sample_forward(const GaussianSampleForward& g) {
    with_float(g.moments.dtype, [&](auto element) { forward<decltype(element)>(g); });
}

void gaussian_sample_backward(const GaussianSampleBackward& g) {
    with_float(g.moments.dtype, [&](auto element) { backward<decltype(element)>(g); });
}

}  // namespace VITOK_ISA
}  // namespace vitok
