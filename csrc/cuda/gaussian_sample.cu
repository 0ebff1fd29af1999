// gaussian_sample of common/gaussian_sample.h on CUDA. A block takes one chunk of one sample, a thread 8 neighbouring elements of
// it: two blocks of noise, made in registers. Sums go through partial ones in memory and a second kernel, so they are added in
// one order always.
#include "../common/gaussian_sample.h"

#include "launch.h"
#include "ops.h"

namespace vitok {
namespace {

template <class T>
constexpr int kEach = sizeof(T) == 8 ? 4 : 8;  // elements of a thread; fp64, which exists for gradient checks, would spill at 8
template <class T>
constexpr int kThreads = kSampleChunk / kEach<T>;
constexpr int kSumThreads = 128;

struct Where {
    uint32_t token, channel;
};

template <class T>
struct alignas(16) Vector {
    T element[kEach<T>];
};

// kEach<T> elements of a sample, from element `first` at `where`; zero past the end. `vectors` promises rows whose vectors are
// aligned and do not cross from row to row.
template <class T, class F>
__device__ __forceinline__ void load(const T* __restrict__ rows, int64_t stride_l, int64_t stride_c, Where where, uint32_t channels,
                                     int32_t left, bool vectors, F (&to)[kEach<T>]) {
    if (vectors) {
        if (left > 0) {
            const auto wide = *reinterpret_cast<const Vector<T>*>(rows + where.token * stride_l + where.channel);
#pragma unroll
            for (int i = 0; i < kEach<T>; ++i) to[i] = widen(wide.element[i]);
        } else {
#pragma unroll
            for (int i = 0; i < kEach<T>; ++i) to[i] = F(0);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < kEach<T>; ++i) {
        to[i] = i < left ? widen(rows[where.token * stride_l + where.channel * stride_c]) : F(0);
        if (++where.channel == channels) where.channel = 0, ++where.token;
    }
}

template <class T, class F>
__device__ __forceinline__ void store(T* __restrict__ rows, int64_t stride_l, Where where, uint32_t channels, int32_t left,
                                      bool vectors, const F (&from)[kEach<T>]) {
    if (vectors) {
        if (left <= 0) return;
        Vector<T> wide;
#pragma unroll
        for (int i = 0; i < kEach<T>; ++i) narrow(from[i], wide.element[i]);
        *reinterpret_cast<Vector<T>*>(rows + where.token * stride_l + where.channel) = wide;
        return;
    }
#pragma unroll
    for (int i = 0; i < kEach<T>; ++i) {
        if (i < left) narrow(from[i], rows[where.token * stride_l + where.channel]);
        if (++where.channel == channels) where.channel = 0, ++where.token;
    }
}

template <int N>
__device__ __forceinline__ void noise(const NoiseKeys& keys, int64_t b, uint32_t first, float (&to)[N]) {
    const uint64_t seed = NoiseKeys::the_seed(keys), sample = NoiseKeys::sample(keys, b);
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        uint32_t c[4] = {(first + i) / 4, 0, static_cast<uint32_t>(sample), static_cast<uint32_t>(sample >> 32)};
        float value[4];
        normal_block<ScalarMath>(c, seed, value);
#pragma unroll
        for (int j = 0; j < 4; ++j) to[i + j] = value[j];
    }
}

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// What a thread is to do: sample, first element, how many are left from there, and where they are.
// Within a sample 32 bits do, in addresses they do not.
struct Task {
    int64_t b;
    uint32_t first;
    int32_t left;
    Where where;
};

template <class T>
__device__ __forceinline__ Task task(const GaussianMoments& m, int64_t elements, uint32_t chunks) {
    Task t;
    t.b = blockIdx.x / chunks;
    t.first = blockIdx.x % chunks * static_cast<uint32_t>(kSampleChunk) + threadIdx.x * kEach<T>;
    t.left = static_cast<int32_t>(elements) - static_cast<int32_t>(t.first);
    const uint32_t channels = static_cast<uint32_t>(m.sizes[2]);
    t.where = {t.first / channels, t.first % channels};
    return t;
}

template <class T>
__global__ void __launch_bounds__(kThreads<T>)
    gaussian_sample_forward_kernel(const GaussianMoments m, int64_t elements, uint32_t chunks, bool vectors, T* __restrict__ z,
                                   compute_t<T>* __restrict__ partials) {
    using F = compute_t<T>;
    const Task t = task<T>(m, elements, chunks);
    const uint32_t channels = static_cast<uint32_t>(m.sizes[2]);
    const T* const rows = static_cast<const T*>(m.data) + t.b * m.strides[0];
    F mean[kEach<T>], logvar[kEach<T>];
    load(rows, m.strides[1], m.strides[2], t.where, channels, t.left, vectors, mean);
    load(rows + m.sizes[2] * m.strides[2], m.strides[1], m.strides[2], t.where, channels, t.left, vectors, logvar);

    F sum = 0;
#pragma unroll
    for (int i = 0; i < kEach<T>; ++i) {
        const F v = clamp_logvar(logvar[i]);
        logvar[i] = exponential(F(0.5) * v);  // the standard deviation
        sum += mean[i] * mean[i] + variance_excess(v, logvar[i] * logvar[i]);
    }
    if (z && t.left > 0) {
        float normal[kEach<T>];
        noise(m.keys, t.b, t.first, normal);
#pragma unroll
        for (int i = 0; i < kEach<T>; ++i) mean[i] += logvar[i] * normal[i];
        store(z + t.b * elements, channels, t.where, channels, t.left, vectors, mean);
    }

    __shared__ F warp_sums[kThreads<T> / 32];
#pragma unroll
    for (int offset = 16; offset; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 1; i < kThreads<T> / 32; ++i) sum += warp_sums[i];
        partials[blockIdx.x] = sum;
    }
}

// kl[b] = scale * sum of the sample's partial sums; a block a sample.
template <class F>
__global__ void __launch_bounds__(kSumThreads)
    sum_partials_kernel(const F* __restrict__ partials, int64_t chunks, F scale, F* __restrict__ kl) {
    const F* const of_sample = partials + blockIdx.x * chunks;
    F sum = 0;
    for (int64_t i = threadIdx.x; i < chunks; i += kSumThreads) sum += of_sample[i];
    __shared__ F warp_sums[kSumThreads / 32];
#pragma unroll
    for (int offset = 16; offset; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 1; i < kSumThreads / 32; ++i) sum += warp_sums[i];
        kl[blockIdx.x] = sum * scale;
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads<T>)
    gaussian_sample_backward_kernel(const GaussianSampleBackward g, int64_t elements, uint32_t chunks, bool vectors, bool dz_vectors) {
    using F = compute_t<T>;
    const GaussianMoments& m = g.moments;
    const Task t = task<T>(m, elements, chunks);
    if (t.left <= 0) return;
    const uint32_t channels = static_cast<uint32_t>(m.sizes[2]);
    const T* const rows = static_cast<const T*>(m.data) + t.b * m.strides[0];
    F mean[kEach<T>], logvar[kEach<T>];
    load(rows, m.strides[1], m.strides[2], t.where, channels, t.left, vectors, mean);
    load(rows + m.sizes[2] * m.strides[2], m.strides[1], m.strides[2], t.where, channels, t.left, vectors, logvar);
    F dz[kEach<T>];
    float normal[kEach<T>];
    if (g.dz) {
        const T* const dz_rows = static_cast<const T*>(g.dz) + t.b * g.dz_strides[0];
        load(dz_rows, g.dz_strides[1], g.dz_strides[2], t.where, channels, t.left, dz_vectors, dz);
        noise(m.keys, t.b, t.first, normal);
    }
    const F scale = g.dkl ? static_cast<const F*>(g.dkl)[t.b * g.dkl_stride] / static_cast<F>(elements) : F(0);
#pragma unroll
    for (int i = 0; i < kEach<T>; ++i) {
        const F v = clamp_logvar(logvar[i]), deviation = exponential(F(0.5) * v);
        F dlogvar = (variance_excess(v, deviation * deviation) + v) * scale;
        mean[i] *= scale;
        if (g.dz) {
            mean[i] += dz[i];
            dlogvar += dz[i] * deviation * normal[i];
        }
        logvar[i] = clamp_passes(logvar[i]) ? F(0.5) * dlogvar : F(0);
    }
    T* const out = static_cast<T*>(g.dmoments) + 2 * t.b * elements;
    store(out, 2 * channels, t.where, channels, t.left, vectors, mean);
    store(out + channels, 2 * channels, t.where, channels, t.left, vectors, logvar);
}

// Whether vectors of kEach<T> elements of these rows are aligned and end with a row.
template <class T>
bool has_vectors(const void* data, const int64_t (&strides)[3], int64_t channels) {
    const auto whole = [](int64_t stride) { return stride * static_cast<int64_t>(sizeof(T)) % 16 == 0; };
    return channels % kEach<T> == 0 && strides[2] == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && whole(strides[0]) &&
           whole(strides[1]);
}

unsigned grid(const char* op, const GaussianMoments& m) {
    if (m.elements() > INT32_MAX - kSampleChunk || m.sizes[0] > INT32_MAX / m.chunks())
        throw std::runtime_error(std::string(op) + ": more than 2^31 elements in a sample, or too many samples for one launch");
    return static_cast<unsigned>(m.sizes[0] * m.chunks());
}

}  // namespace

void gaussian_sample_forward_cuda(const GaussianSampleForward& g, void* stream) {
    const DeviceGuard guard("gaussian_sample_forward", g.kl);
    const GaussianMoments& m = g.moments;
    const unsigned blocks = grid("gaussian_sample_forward", m);
    const auto on = static_cast<cudaStream_t>(stream);
    with_float(m.dtype, [&](auto element) {
        using T = decltype(element);
        using F = compute_t<T>;
        const bool vectors = has_vectors<T>(m.data, m.strides, m.sizes[2]) && reinterpret_cast<uintptr_t>(g.z) % 16 == 0;
        F* const partials = static_cast<F*>(g.partials);
        gaussian_sample_forward_kernel<T>
            <<<blocks, kThreads<T>, 0, on>>>(m, m.elements(), static_cast<uint32_t>(m.chunks()), vectors, static_cast<T*>(g.z), partials);
        const F scale = static_cast<F>(0.5 / static_cast<double>(m.elements()));
        sum_partials_kernel<F>
            <<<static_cast<unsigned>(m.sizes[0]), kSumThreads, 0, on>>>(partials, m.chunks(), scale, static_cast<F*>(g.kl));
    });
    check_launch("gaussian_sample_forward");
}

void gaussian_sample_backward_cuda(const GaussianSampleBackward& g, void* stream) {
    const DeviceGuard guard("gaussian_sample_backward", g.dmoments);
    const GaussianMoments& m = g.moments;
    const unsigned blocks = grid("gaussian_sample_backward", m);
    const auto on = static_cast<cudaStream_t>(stream);
    with_float(m.dtype, [&](auto element) {
        using T = decltype(element);
        const bool vectors = has_vectors<T>(m.data, m.strides, m.sizes[2]) && reinterpret_cast<uintptr_t>(g.dmoments) % 16 == 0;
        const bool dz_vectors = g.dz && has_vectors<T>(g.dz, g.dz_strides, m.sizes[2]);
        gaussian_sample_backward_kernel<T><<<blocks, kThreads<T>, 0, on>>>(g, m.elements(), static_cast<uint32_t>(m.chunks()), vectors, dz_vectors);
    });
    check_launch("gaussian_sample_backward");
}

}  // namespace vitok
