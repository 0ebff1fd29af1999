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

// Elements first .. first + n - 1 of rows of `channels` elements, widened.
template <class T, class F>
VITOK_INLINE void gather(const T* rows, int64_t channels, int64_t row_stride, int64_t stride, int64_t first, int64_t n, F* to) {
    if (stride == 1 && row_stride == channels) channels = first + n;  // the rows are one
    for (int64_t row = first / channels, begin = first % channels; n > 0; ++row, begin = 0) {
        const int64_t run = channels - begin < n ? channels - begin : n;
        const T* const from = rows + row * row_stride + begin * stride;
        int64_t i = 0;
        if constexpr (sizeof(F) == sizeof(float))
            if (stride == 1)
                for (; i + kLanes <= run; i += kLanes) lanes_store(to + i, lanes_load(from + i));
        for (; i < run; ++i) to[i] = widen(from[i * stride]);
        to += run, n -= run;
    }
}

// The reverse, to rows of unit stride.
template <class T, class F>
VITOK_INLINE void scatter(T* rows, int64_t channels, int64_t row_stride, int64_t first, int64_t n, const F* from) {
    if (row_stride == channels) channels = first + n;
    for (int64_t row = first / channels, begin = first % channels; n > 0; ++row, begin = 0) {
        const int64_t run = channels - begin < n ? channels - begin : n;
        T* const to = rows + row * row_stride + begin;
        int64_t i = 0;
        if constexpr (sizeof(F) == sizeof(float))
            for (; i + kLanes <= run; i += kLanes) lanes_store(to + i, lanes_load(from + i));
        for (; i < run; ++i) narrow(from[i], to[i]);
        from += run, n -= run;
    }
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
    Lanes sum = lanes_set(0.0f);
    for (int64_t e = 0; e < n; e += kLanes) {
        const Lanes m = lanes_load(mean + e), v = clamp_lanes(lanes_load(logvar + e));
        const Lanes deviation = lanes_exp(v * 0.5f);
        sum += lanes_fma(m, m, excess_lanes(v, deviation * deviation));
        if (noise) lanes_store(mean + e, lanes_fma(deviation, lanes_load(noise + e), m));
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
    F mean[kSampleChunk], logvar[kSampleChunk];
    float noise[kSampleChunk];

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
        F dz[kSampleChunk];
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
