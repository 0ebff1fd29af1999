// qk_norm_rope on CUDA. Memory-bound: every element is read once and written once, so what counts is 16-byte accesses and
// enough of them in flight. G neighbouring threads share one row of one head; each holds up to ITER vectors of V pairs
// (channels i and i + D/2) in registers from the load to the store, and the norm's sums are shuffles among the G. blockIdx.y is q,
// k or v, so that the weights of a thread's channels are loaded once for all its rows.
#include "../common/qk_norm_rope.h"

#include <type_traits>

#include "launch.h"
#include "ops.h"
#include "vector.h"

namespace vitok {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;

// Blocks for each of q, k and v in the forward pass: more than any GPU holds at once, few enough to reuse the weights.
constexpr int64_t kForwardBlocks = 4096;

struct Strides {
    int64_t b, l, part, h;
};

struct Layout {
    int64_t rows;  // of q: B * L * H; as many of k and of v
    uint32_t length, heads;
    Strides strides;  // of qkv
    int32_t width, half, seconds;  // half: first channels, ceil(width / 2); seconds: width - half
    bool rotates, norms;
    const float* table;
    int64_t table_stride_part, table_stride_l;
    DType weight_dtype;
    const void* q_weight;
    const void* k_weight;
};

template <class F, class T, int V>
__device__ __forceinline__ void load(const T* from, F (&to)[V]) {
    const auto wide = *reinterpret_cast<const Vector<T, V>*>(from);
#pragma unroll
    for (int n = 0; n < V; ++n) to[n] = widen(wide.element[n]);
}

template <class F, class T, int V>
__device__ __forceinline__ void store(T* to, const F (&from)[V]) {
    Vector<T, V> wide;
#pragma unroll
    for (int n = 0; n < V; ++n) narrow(from[n], wide.element[n]);
    *reinterpret_cast<Vector<T, V>*>(to) = wide;
}

template <class F>
__device__ __forceinline__ F weight_at(const Layout& a, int part, int32_t i) {
    const void* const weight = part ? a.k_weight : a.q_weight;
    switch (a.weight_dtype) {
        case DType::float16: return static_cast<F>(widen(static_cast<const f16*>(weight)[i]));
        case DType::bfloat16: return static_cast<F>(widen(static_cast<const bf16*>(weight)[i]));
        case DType::float64: return static_cast<F>(static_cast<const double*>(weight)[i]);
        default: return static_cast<F>(static_cast<const float*>(weight)[i]);
    }
}

// The same for the G threads of a row, in the same order on all of them.
template <int G, class F>
__device__ __forceinline__ F row_sum(F value) {
#pragma unroll
    for (int step = G / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAll, value, step);
    return value;
}

// Row r of q, of k or of v: head h of token l of sample b.
struct Row {
    int64_t token, b, l, h;
};

__device__ __forceinline__ Row row_at(const Layout& a, int64_t row) {
    Row at;
    if (a.rows <= UINT32_MAX) {  // a division of 64-bit numbers takes longer than the row's share of the memory
        const uint32_t narrow_row = static_cast<uint32_t>(row);
        const uint32_t token = narrow_row / a.heads, b = token / a.length;
        at.token = token, at.b = b, at.l = token - b * a.length, at.h = narrow_row - token * a.heads;
    } else {
        at.token = row / a.heads, at.h = row - at.token * a.heads;
        at.b = at.token / a.length, at.l = at.token - at.b * a.length;
    }
    return at;
}

__device__ __forceinline__ int64_t offset_in(const Strides& strides, const Row& at, int part) {
    return at.b * strides.b + at.l * strides.l + part * strides.part + at.h * strides.h;
}

// What a thread holds of a row: its vectors of first channels, and of the second ones that belong to them.
template <int G, class F, int V, int ITER>
__device__ __forceinline__ void load_weights(const Layout& a, int part, int32_t lane, bool norms, F (&to)[ITER][2][V]) {
#pragma unroll
    for (int it = 0; it < ITER; ++it) {
        const int32_t i = (it * G + lane) * V;
#pragma unroll
        for (int n = 0; n < V; ++n) {
            to[it][0][n] = norms && i < a.half ? weight_at<F>(a, part, i + n) : F(1);
            to[it][1][n] = norms && i < a.seconds ? weight_at<F>(a, part, a.half + i + n) : F(1);
        }
    }
}

// The same of vector `it` of a row of numbers: zeros where there is no row, or no channel.
template <class T, class F, int V>
__device__ __forceinline__ void load_pair(const Layout& a, const T* from, int32_t i, bool inside, F (&to)[2][V]) {
#pragma unroll
    for (int n = 0; n < V; ++n) to[0][n] = to[1][n] = 0;
    if (inside && i < a.half) load(from + i, to[0]);
    if (inside && i < a.seconds) load(from + a.half + i, to[1]);
}

// Cosines and sines of V pairs of a token.
template <class F, int V>
__device__ __forceinline__ void load_angles(const Layout& a, const Row& at, int32_t i, F (&cos)[V], F (&sin)[V]) {
    const float* const from = a.table + at.l * a.table_stride_l + i;
    load(from, cos);
    load(from + a.table_stride_part, sin);
}

template <class T, class F, int V, int G, int ITER>
__global__ void __launch_bounds__(kThreads) qk_norm_rope_forward_kernel(const Layout a, const T* __restrict__ source,
                                                                        T* __restrict__ target, F eps) {
    const int part = blockIdx.y;
    const int32_t lane = threadIdx.x % G;
    const bool norms = a.norms && part < 2, rotates = a.rotates && part < 2;
    F weight[ITER][2][V];
    load_weights<G>(a, part, lane, norms, weight);

    constexpr int64_t per_block = kThreads / G;
    // All threads of a warp make the same number of turns, because they shuffle.
    for (int64_t first_row = blockIdx.x * per_block; first_row < a.rows; first_row += gridDim.x * per_block) {
        const int64_t row = first_row + threadIdx.x / G;
        const bool inside = row < a.rows;
        const Row at = row_at(a, inside ? row : 0);
        const T* const x = source + offset_in(a.strides, at, part);
        T* const y = target + ((at.token * 3 + part) * a.heads + at.h) * a.width;

        F value[ITER][2][V];
        F squares = 0;
#pragma unroll
        for (int it = 0; it < ITER; ++it) {
            const int32_t i = (it * G + lane) * V;
            load_pair(a, x, i, inside, value[it]);
#pragma unroll
            for (int n = 0; n < V; ++n)
                squares += value[it][0][n] * value[it][0][n] + value[it][1][n] * value[it][1][n];
        }
        if (norms) {
            const F rstd = rms_rstd(row_sum<G>(squares), static_cast<F>(a.width), eps);
#pragma unroll
            for (int it = 0; it < ITER; ++it)
#pragma unroll
                for (int n = 0; n < 2 * V; ++n) value[it][n / V][n % V] *= rstd * weight[it][n / V][n % V];
        }
#pragma unroll
        for (int it = 0; it < ITER; ++it) {
            const int32_t i = (it * G + lane) * V;
            if (!inside || i >= a.half) continue;
            if (rotates) {
                F cos[V], sin[V];
                load_angles(a, at, i, cos, sin);
#pragma unroll
                for (int n = 0; n < V; ++n) rotate(value[it][0][n], value[it][1][n], cos[n], sin[n]);
            }
            store(y + i, value[it][0]);
            if (i < a.seconds) store(y + a.half + i, value[it][1]);
        }
    }
}

template <class T, class F, int V, int G, int ITER>
__global__ void __launch_bounds__(kThreads)
    qk_norm_rope_backward_kernel(const Layout a, const Strides grad_strides, const T* __restrict__ gradient,
                                 const T* __restrict__ source, T* __restrict__ target, F* __restrict__ partials, F eps) {
    const int part = blockIdx.y;
    const int32_t lane = threadIdx.x % G;
    const bool norms = a.norms && part < 2, rotates = a.rotates && part < 2;
    F weight[ITER][2][V], dweight[ITER][2][V] = {};
    load_weights<G>(a, part, lane, norms, weight);

    constexpr int64_t per_block = kThreads / G;
    for (int64_t first_row = blockIdx.x * per_block; first_row < a.rows; first_row += gridDim.x * per_block) {
        const int64_t row = first_row + threadIdx.x / G;
        const bool inside = row < a.rows;
        const Row at = row_at(a, inside ? row : 0);
        const T* const grad = gradient + offset_in(grad_strides, at, part);
        T* const dx = target + ((at.token * 3 + part) * a.heads + at.h) * a.width;

        F u[ITER][2][V];
#pragma unroll
        for (int it = 0; it < ITER; ++it) {
            const int32_t i = (it * G + lane) * V;
            load_pair(a, grad, i, inside, u[it]);
            if (rotates && inside && i < a.half) {
                F cos[V], sin[V];
                load_angles(a, at, i, cos, sin);
#pragma unroll
                for (int n = 0; n < V; ++n) rotate_back(u[it][0][n], u[it][1][n], cos[n], sin[n]);
            }
        }
        if (norms) {
            const T* const x = source + offset_in(a.strides, at, part);
            F value[ITER][2][V];
            F squares = 0, products = 0;
#pragma unroll
            for (int it = 0; it < ITER; ++it) {
                const int32_t i = (it * G + lane) * V;
                load_pair(a, x, i, inside, value[it]);
#pragma unroll
                for (int n = 0; n < 2 * V; ++n) {
                    const F v = value[it][n / V][n % V];
                    squares += v * v;
                    products += u[it][n / V][n % V] * weight[it][n / V][n % V] * v;
                }
            }
            const F rstd = rms_rstd(row_sum<G>(squares), static_cast<F>(a.width), eps);
            const F mean = row_sum<G>(products) * rstd / static_cast<F>(a.width);
#pragma unroll
            for (int it = 0; it < ITER; ++it)
#pragma unroll
                for (int n = 0; n < 2 * V; ++n) {
                    F& gradient_of_norm = u[it][n / V][n % V];
                    // Rows outside are all zeros, and with eps = 0 zero times an infinite rstd would be NaN.
                    const F unit = inside ? value[it][n / V][n % V] * rstd : F(0);
                    dweight[it][n / V][n % V] += gradient_of_norm * unit;
                    gradient_of_norm = rms_backward(gradient_of_norm * weight[it][n / V][n % V], unit, rstd, mean);
                }
        }
#pragma unroll
        for (int it = 0; it < ITER; ++it) {
            const int32_t i = (it * G + lane) * V;
            if (!inside || i >= a.half) continue;
            store(dx + i, u[it][0]);
            if (i < a.seconds) store(dx + a.half + i, u[it][1]);
        }
    }
    if (!norms) return;

    // Over the rows of a warp by shuffles, over the warps through shared memory, both in a fixed order.
    constexpr int warps = kThreads / kWarp;
    __shared__ F sums[warps][ITER * G * V * 2];
    const int warp = threadIdx.x / kWarp;
#pragma unroll
    for (int it = 0; it < ITER; ++it)
#pragma unroll
        for (int n = 0; n < 2 * V; ++n) {
            F sum = dweight[it][n / V][n % V];
#pragma unroll
            for (int step = kWarp / 2; step >= G; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
            const int32_t i = (it * G + lane) * V + n % V;
            const bool present = i < (n < V ? a.half : a.seconds);
            if (threadIdx.x % kWarp < G && present) sums[warp][n < V ? i : a.half + i] = sum;
        }
    __syncthreads();
    for (int32_t i = threadIdx.x; i < a.width; i += kThreads) {
        F sum = 0;
        for (int w = 0; w < warps; ++w) sum += sums[w][i];
        partials[(static_cast<int64_t>(blockIdx.x) * 2 + part) * a.width + i] = sum;
    }
}

// Channels of a block of the last sum, and threads that share its partials.
constexpr int kColumns = 32, kSharers = 16;

// dweight[part][i] = sum of partials[block][part][i] over the blocks: strided, then the strides, always in this order.
template <class F>
__global__ void __launch_bounds__(kColumns* kSharers)
    qk_norm_rope_sum_kernel(const F* __restrict__ partials, int64_t blocks, int32_t width, DType dtype, void* dq_weight,
                            void* dk_weight) {
    __shared__ F sums[kSharers][kColumns];
    const int32_t i = blockIdx.x * kColumns + threadIdx.x;
    const int part = blockIdx.y;
    F sum = 0;
    if (i < width)
        for (int64_t block = threadIdx.y; block < blocks; block += kSharers) sum += partials[(block * 2 + part) * width + i];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || i >= width) return;
    for (int n = 1; n < kSharers; ++n) sum += sums[n][threadIdx.x];
    void* const to = part ? dk_weight : dq_weight;
    switch (dtype) {
        case DType::float16: narrow(static_cast<float>(sum), static_cast<f16*>(to)[i]); break;
        case DType::bfloat16: narrow(static_cast<float>(sum), static_cast<bf16*>(to)[i]); break;
        case DType::float64: static_cast<double*>(to)[i] = sum; break;
        default: static_cast<float*>(to)[i] = static_cast<float>(sum);
    }
}

Strides strides_of(const int64_t (&strides)[4]) { return {strides[0], strides[1], strides[2], strides[3]}; }

template <class Args>
Layout layout_of(const Args& args) {
    if (args.sizes[1] > INT32_MAX || args.sizes[2] > INT32_MAX)
        throw std::runtime_error("qk_norm_rope: more than 2^31 tokens or heads");
    Layout a;
    a.rows = args.sizes[0] * args.sizes[1] * args.sizes[2];
    a.length = static_cast<uint32_t>(args.sizes[1]), a.heads = static_cast<uint32_t>(args.sizes[2]);
    a.strides = strides_of(args.strides);
    a.width = static_cast<int32_t>(args.sizes[3]), a.half = (a.width + 1) / 2, a.seconds = a.width / 2;
    a.rotates = args.table != nullptr, a.norms = args.q_weight != nullptr;
    a.table = static_cast<const float*>(args.table);
    a.table_stride_part = args.table_strides[0], a.table_stride_l = args.table_strides[1];
    a.weight_dtype = args.weight_dtype;
    a.q_weight = args.q_weight, a.k_weight = args.k_weight;
    return a;
}

// Whether every row starts at a multiple of `bytes`.
template <class T, size_t N>
bool aligned(const void* data, const int64_t (&strides)[N], int64_t bytes) {
    if (reinterpret_cast<uintptr_t>(data) % bytes) return false;
    for (const int64_t stride : strides)
        if (stride * static_cast<int64_t>(sizeof(T)) % bytes) return false;
    return true;
}

template <int VALUE>
using Constant = std::integral_constant<int, VALUE>;

// Calls fn(V, G, ITER) for the widest vectors that the width and `fits(V)` allow: 2 * V * G * ITER channels are covered.
template <class T, class Fits, class Fn>
void with_tiles(int64_t width, const Fits& fits, const Fn& fn) {
    if constexpr (!std::is_same_v<T, double>) {
        if (width % 16 == 0 && fits(8)) {
            if (width <= 64) return fn(Constant<8>{}, Constant<4>{}, Constant<1>{});
            if (width <= 128) return fn(Constant<8>{}, Constant<8>{}, Constant<1>{});
            if (width <= 256) return fn(Constant<8>{}, Constant<16>{}, Constant<1>{});
        }
        // Halves such as the 36 of head_dim 72: nine vectors, three for each of three threads out of four.
        if (width % 8 == 0 && fits(4)) {
            if (width <= 96) return fn(Constant<4>{}, Constant<4>{}, Constant<3>{});
            return fn(Constant<4>{}, Constant<32>{}, Constant<4>{});
        }
    }
    if constexpr (std::is_same_v<T, double>) {
        if (width > 256) throw std::runtime_error("qk_norm_rope: float64 heads have at most 256 channels on CUDA");
        fn(Constant<1>{}, Constant<32>{}, Constant<4>{});
    } else {
        if (width <= 128) return fn(Constant<1>{}, Constant<32>{}, Constant<2>{});
        fn(Constant<1>{}, Constant<32>{}, Constant<16>{});
    }
}

}  // namespace

void qk_norm_rope_forward_cuda(const QkNormRopeForward& args, void* stream) {
    const DeviceGuard guard("qk_norm_rope_forward", args.out);
    const Layout a = layout_of(args);
    with_float(args.dtype, [&](auto element) {
        using T = decltype(element);
        using F = compute_t<T>;
        const auto fits = [&](int v) {
            const int64_t bytes = v * sizeof(T) < 16 ? v * sizeof(T) : 16;
            return aligned<T>(args.qkv, args.strides, bytes) && aligned<float>(args.table, args.table_strides, 16) &&
                   reinterpret_cast<uintptr_t>(args.out) % bytes == 0;
        };
        with_tiles<T>(args.sizes[3], fits, [&](auto v, auto g, auto iterations) {
            constexpr int V = decltype(v)::value, G = decltype(g)::value, ITER = decltype(iterations)::value;
            const int64_t blocks = ceil_div(a.rows, kThreads / G);
            const dim3 grid(static_cast<unsigned>(blocks < kForwardBlocks ? blocks : kForwardBlocks), 3);
            qk_norm_rope_forward_kernel<T, F, V, G, ITER><<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
                a, static_cast<const T*>(args.qkv), static_cast<T*>(args.out), static_cast<F>(args.eps));
        });
    });
    check_launch("qk_norm_rope_forward");
}

void qk_norm_rope_backward_cuda(const QkNormRopeBackward& args, void* stream) {
    const DeviceGuard guard("qk_norm_rope_backward", args.q_weight ? args.dq_weight : args.dqkv);
    const Layout a = layout_of(args);
    with_float(args.dtype, [&](auto element) {
        using T = decltype(element);
        using F = compute_t<T>;
        const auto fits = [&](int v) {
            const int64_t bytes = v * sizeof(T) < 16 ? v * sizeof(T) : 16;
            return aligned<T>(args.grad, args.grad_strides, bytes) && aligned<T>(args.qkv, args.strides, bytes) &&
                   aligned<float>(args.table, args.table_strides, 16) && reinterpret_cast<uintptr_t>(args.dqkv) % bytes == 0;
        };
        with_tiles<T>(args.sizes[3], fits, [&](auto v, auto g, auto iterations) {
            constexpr int V = decltype(v)::value, G = decltype(g)::value, ITER = decltype(iterations)::value;
            const dim3 grid(static_cast<unsigned>(args.blocks), 3);
            qk_norm_rope_backward_kernel<T, F, V, G, ITER><<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
                a, strides_of(args.grad_strides), static_cast<const T*>(args.grad), static_cast<const T*>(args.qkv),
                static_cast<T*>(args.dqkv), static_cast<F*>(args.partials), static_cast<F>(args.eps));
        });
        if (!args.q_weight) return;
        const dim3 grid(static_cast<unsigned>(ceil_div(a.width, kColumns)), 2);
        qk_norm_rope_sum_kernel<F><<<grid, dim3(kColumns, kSharers), 0, static_cast<cudaStream_t>(stream)>>>(
            static_cast<const F*>(args.partials), args.blocks, a.width, args.weight_dtype, args.dq_weight, args.dk_weight);
    });
    check_launch("qk_norm_rope_backward");
}

}  // namespace vitok
