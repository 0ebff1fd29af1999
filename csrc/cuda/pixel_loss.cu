// The kernels of common/pixel_loss.h on CUDA. Both read 8 elements of the prediction and of the target at a time where these are
// aligned. Forward, a warp sums one token into one partial sum, whatever the launch, and a block a sample then adds those in a
// fixed order: no atomics, the same bits every time. 64-bit numbers appear only in addresses.
#include "../common/pixel_loss.h"

#include "launch.h"
#include "ops.h"
#include "vector.h"

namespace vitok {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 4;  // a multiprocessor: 64 registers a thread, without which ptxas spills a few to fit more blocks
constexpr int kWarp = 32;

// Elements of one thread's vector where patch rows of 3p elements divide into such.
constexpr int kVector = 8;

template <class P, class S, class F>
struct Args {
    const P* __restrict__ prediction;
    const S* __restrict__ target;
    int64_t prediction_b, prediction_l;
    int64_t stride_b, stride_t, stride_y, stride_x, stride_c;
    int64_t tokens;  // of all samples
    int32_t frames, height, width, rows_t, rows_y, columns, q, p;
    Distance kind;
    bool wide;  // every vector that lies in the clip is aligned in both pictures
    F scale, shift, eps_squared;
};

// Which token this is, and its first element in both pictures.
template <class P, class S, class F>
struct Token {
    const P* prediction;
    const S* target;
    int64_t sample;
    int32_t frames, lines, pixels;  // that are left of the clip from the token's first on

    __device__ __forceinline__ Token(const Args<P, S, F>& a, int64_t index) {
        const uint32_t per_sample = static_cast<uint32_t>(a.rows_t) * a.rows_y * a.columns;
        sample = index / per_sample;
        const uint32_t l = static_cast<uint32_t>(index - sample * per_sample);
        const int32_t lx = l % a.columns, ly = l / a.columns % a.rows_y, lt = l / a.columns / a.rows_y;
        frames = a.frames - lt * a.q, lines = a.height - ly * a.p, pixels = a.width - lx * a.p;
        prediction = a.prediction + sample * a.prediction_b + l * a.prediction_l;
        target = a.target + sample * a.stride_b + static_cast<int64_t>(lt) * a.q * a.stride_t +
                 static_cast<int64_t>(ly) * a.p * a.stride_y + static_cast<int64_t>(lx) * a.p * a.stride_x;
    }
};

// d of the V elements of a token from its vector v on, and which of them are the clip's.
template <int V, class P, class S, class F>
__device__ __forceinline__ void differences(const Args<P, S, F>& a, const Token<P, S, F>& token, int32_t v, F (&d)[V],
                                            bool (&inside)[V]) {
    const int32_t run = 3 * a.p / V;  // vectors in one patch row
    const int32_t row = v / run, e = v % run * V;
    const int32_t i = row / a.p, j = row % a.p;
    const bool line = i < token.frames && j < token.lines;
    const S* const from = token.target + i * a.stride_t + j * a.stride_y;
    const P* const of = token.prediction + static_cast<int64_t>(v) * V;
    if (V > 1 && a.wide && line && (e + V - 1) / 3 < token.pixels) {
        const auto x = *reinterpret_cast<const Vector<P, V>*>(of);
        const auto y = *reinterpret_cast<const Vector<S, V>*>(from + e);
#pragma unroll
        for (int n = 0; n < V; ++n) {
            d[n] = static_cast<F>(widen(x.element[n])) - normalise(static_cast<F>(widen(y.element[n])), a.scale, a.shift);
            inside[n] = true;
        }
    } else {
#pragma unroll
        for (int n = 0; n < V; ++n) {
            const int32_t x = (e + n) / 3;
            inside[n] = line && x < token.pixels;
            d[n] = F(0);
            if (inside[n]) {
                const S y = from[x * a.stride_x + (e + n) % 3 * a.stride_c];
                d[n] = static_cast<F>(widen(of[n])) - normalise(static_cast<F>(widen(y)), a.scale, a.shift);
            }
        }
    }
}

template <class F>
__device__ __forceinline__ F distance_of(Distance kind, F d, F eps_squared) {
    if (kind == Distance::l1) return pixel_distance<Distance::l1>(d, eps_squared);
    if (kind == Distance::l2) return pixel_distance<Distance::l2>(d, eps_squared);
    return pixel_distance<Distance::charbonnier>(d, eps_squared);
}

template <class F>
__device__ __forceinline__ F slope_of(Distance kind, F d, F eps_squared) {
    if (kind == Distance::l1) return pixel_slope<Distance::l1>(d, eps_squared);
    if (kind == Distance::l2) return pixel_slope<Distance::l2>(d, eps_squared);
    return pixel_slope<Distance::charbonnier>(d, eps_squared);
}

template <class F>
__device__ __forceinline__ F warp_sum(F x) {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_down_sync(0xffffffffu, x, step);
    return x;
}

// partial[token] = sum of f(d) over the token, by one warp.
template <class P, class S, class F, int V>
__global__ void __launch_bounds__(kThreads, kBlocks) pixel_loss_forward_kernel(const Args<P, S, F> a, F* __restrict__ partial) {
    const int64_t index = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
    if (index >= a.tokens) return;
    const Token<P, S, F> token(a, index);
    const int32_t vectors = 3 * a.q * a.p * a.p / V;
    F sum = 0;
    for (int32_t v = threadIdx.x % kWarp; v < vectors; v += kWarp) {
        F d[V];
        bool inside[V];
        differences<V>(a, token, v, d, inside);
#pragma unroll
        for (int n = 0; n < V; ++n) sum += inside[n] ? distance_of(a.kind, d[n], a.eps_squared) : F(0);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) partial[index] = sum;
}

// loss[b] = weight * sum of the sample's partial sums, by one block.
template <class F>
__global__ void __launch_bounds__(kThreads)
    pixel_loss_sum_kernel(const F* __restrict__ partial, F* __restrict__ loss, int64_t count, F weight) {
    __shared__ F of_warp[kThreads / kWarp];
    const F* const from = partial + blockIdx.x * count;
    F sum = 0;
    for (int64_t l = threadIdx.x; l < count; l += kThreads) sum += from[l];
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int warp = 1; warp < kThreads / kWarp; ++warp) sum += of_warp[warp];
    loss[blockIdx.x] = sum * weight;
}

// grad_prediction = grad[b] * weight * f'(d), 0 beyond the clip; a warp a token.
template <class P, class S, class F, int V>
__global__ void __launch_bounds__(kThreads, kBlocks) pixel_loss_backward_kernel(const Args<P, S, F> a, const F* __restrict__ grad,
                                                                       int64_t grad_stride, F weight, P* __restrict__ out) {
    const int64_t index = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
    if (index >= a.tokens) return;
    const Token<P, S, F> token(a, index);
    const int32_t vectors = 3 * a.q * a.p * a.p / V;
    const F seed = grad[token.sample * grad_stride] * weight;
    P* const to = out + index * vectors * V;
    for (int32_t v = threadIdx.x % kWarp; v < vectors; v += kWarp) {
        F d[V];
        bool inside[V];
        differences<V>(a, token, v, d, inside);
        Vector<P, V> y;
#pragma unroll
        for (int n = 0; n < V; ++n)
            narrow(inside[n] ? seed * slope_of(a.kind, d[n], a.eps_squared) : F(0), y.element[n]);
        *reinterpret_cast<Vector<P, V>*>(to + static_cast<int64_t>(v) * V) = y;
    }
}

bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

template <class P, class S, class F>
Args<P, S, F> args_of(const char* op, const PixelPair& g) {
    if (g.tokens() > INT32_MAX || g.token() > INT32_MAX || g.sizes[1] > INT32_MAX / 2 || g.sizes[2] > INT32_MAX / 2 ||
        g.sizes[3] > INT32_MAX / 2 || g.q > INT32_MAX / 2 || ceil_div(g.sizes[0] * g.tokens(), kThreads / kWarp) > INT32_MAX)
        throw std::runtime_error(std::string(op) + ": more than 2^31 tokens or elements of a token in one launch");
    constexpr int64_t kBytes = kVector * sizeof(S) < 16 ? kVector * sizeof(S) : 16;
    constexpr int64_t kWideP = 16 / sizeof(P), kWideS = kBytes / sizeof(S);  // elements that alignment is counted in
    Args<P, S, F> a;
    a.prediction = static_cast<const P*>(g.prediction), a.target = static_cast<const S*>(g.target);
    a.prediction_b = g.prediction_strides[0], a.prediction_l = g.prediction_strides[1];
    a.stride_b = g.strides[0], a.stride_t = g.strides[1], a.stride_y = g.strides[2];
    a.stride_x = g.strides[3], a.stride_c = g.strides[4];
    a.tokens = g.sizes[0] * g.tokens();
    a.frames = static_cast<int32_t>(g.sizes[1]), a.height = static_cast<int32_t>(g.sizes[2]);
    a.width = static_cast<int32_t>(g.sizes[3]);
    a.rows_t = static_cast<int32_t>(g.rows_t()), a.rows_y = static_cast<int32_t>(g.rows_y());
    a.columns = static_cast<int32_t>(g.columns());
    a.q = static_cast<int32_t>(g.q), a.p = static_cast<int32_t>(g.p);
    a.kind = g.distance();
    a.wide = g.strides[4] == 1 && (g.strides[3] == 3 || g.sizes[3] == 1) && aligned(g.target, kBytes) &&
             aligned(g.prediction, 16) && g.strides[0] % kWideS == 0 && g.strides[1] % kWideS == 0 &&
             g.strides[2] % kWideS == 0 && g.prediction_strides[0] % kWideP == 0 && g.prediction_strides[1] % kWideP == 0;
    a.scale = static_cast<F>(g.scale), a.shift = static_cast<F>(g.shift), a.eps_squared = static_cast<F>(g.eps * g.eps);
    return a;
}

unsigned blocks_of(int64_t tokens) { return static_cast<unsigned>(ceil_div(tokens, kThreads / kWarp)); }

template <class P, class S, int V>
void launch(const PixelLossForward& g, cudaStream_t stream) {
    using F = compute_t<P>;
    const auto a = args_of<P, S, F>("pixel_loss_forward", g);
    F* const partial = static_cast<F*>(g.partial);
    pixel_loss_forward_kernel<P, S, F, V><<<blocks_of(a.tokens), kThreads, 0, stream>>>(a, partial);
    check_launch("pixel_loss_forward");
    pixel_loss_sum_kernel<F><<<static_cast<unsigned>(g.sizes[0]), kThreads, 0, stream>>>(
        partial, static_cast<F*>(g.loss), g.tokens(), static_cast<F>(g.weight()));
    check_launch("pixel_loss_forward");
}

template <class P, class S, int V>
void launch(const PixelLossBackward& g, cudaStream_t stream) {
    using F = compute_t<P>;
    const auto a = args_of<P, S, F>("pixel_loss_backward", g);
    pixel_loss_backward_kernel<P, S, F, V><<<blocks_of(a.tokens), kThreads, 0, stream>>>(
        a, static_cast<const F*>(g.grad), g.grad_stride, static_cast<F>(g.weight()), static_cast<P*>(g.grad_prediction));
    check_launch("pixel_loss_backward");
}

template <class Pair>
void launch_for_types(const Pair& g, bool aligned_output, void* stream) {
    with_pair(g.dtype, g.target_dtype, [&](auto prediction, auto target) {
        using P = decltype(prediction);
        using S = decltype(target);
        if constexpr (sizeof(P) < 8) {
            if (g.p % 8 == 0 && aligned_output) return launch<P, S, kVector>(g, static_cast<cudaStream_t>(stream));
        }
        launch<P, S, 1>(g, static_cast<cudaStream_t>(stream));
    });
}

}  // namespace

void pixel_loss_forward_cuda(const PixelLossForward& g, void* stream) {
    const DeviceGuard guard("pixel_loss_forward", g.loss);
    launch_for_types(g, true, stream);
}

void pixel_loss_backward_cuda(const PixelLossBackward& g, void* stream) {
    const DeviceGuard guard("pixel_loss_backward", g.grad_prediction);
    launch_for_types(g, aligned(g.grad_prediction, 16), stream);
}

}  // namespace vitok
