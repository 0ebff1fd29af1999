// The norms of common/norm.h on CUDA. A row stays in the registers of one warp or, beyond 1024 elements, of one block, so that
// memory is read once; vectors of 16 bytes where rows and parameters are aligned for them.
#include "../common/norm.h"

#include <type_traits>

#include "launch.h"
#include "ops.h"
#include "vector.h"

namespace vitok {
namespace {

constexpr int kThreads = 128;
constexpr int kValues = 32;    // elements of a row that one thread holds
constexpr int kColumns = 32;   // columns of partial sums that one block of the last sum adds up,
constexpr int kSumGroups = 16; // by this many groups of threads

template <int V, class T>
__device__ __forceinline__ Vector<T, V> load(const void* base, int64_t offset) {
    return *reinterpret_cast<const Vector<T, V>*>(static_cast<const T*>(base) + offset);
}

template <int V, class T>
__device__ __forceinline__ void store(void* base, int64_t offset, const float (&value)[V]) {
    Vector<T, V> out;
#pragma unroll
    for (int n = 0; n < V; ++n) narrow(value[n], out.element[n]);
    *reinterpret_cast<Vector<T, V>*>(static_cast<T*>(base) + offset) = out;
}

// The sum over the kGroup threads that share a row, the same bits in each of them.
template <int kGroup>
__device__ __forceinline__ float row_sum(float value) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
    if constexpr (kGroup > 32) {
        __shared__ float warps[kGroup / 32];
        __syncthreads();  // the sum before this one has been read
        if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
        __syncthreads();
        value = 0;
#pragma unroll
        for (int warp = 0; warp < kGroup / 32; ++warp) value += warps[warp];
    }
    return value;
}

template <class T, class W, int V, int kGroup>
__global__ void __launch_bounds__(kThreads) norm_forward_kernel(const NormForward n) {
    constexpr int kVectors = kValues / V;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kGroup) + threadIdx.x / kGroup;
    if (row >= n.rows) return;
    const int32_t width = static_cast<int32_t>(n.width);
    const int32_t first = static_cast<int32_t>(threadIdx.x % kGroup) * V;

    float value[kVectors][V];
    float sum = 0;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
        const int32_t e = first + k * kGroup * V;
        if (e < width) {
            const auto x = load<V, T>(n.x, row * n.x_stride + e);
#pragma unroll
            for (int v = 0; v < V; ++v) value[k][v] = widen(x.element[v]);
            if (n.residual) {
                const auto residual = load<V, T>(n.residual, row * n.residual_stride + e);
                if (n.scale) {
                    const auto scale = load<V, W>(n.scale, e);
#pragma unroll
                    for (int v = 0; v < V; ++v) value[k][v] *= widen(scale.element[v]);
                }
                Vector<T, V> s;
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    narrow(value[k][v] + widen(residual.element[v]), s.element[v]);
                    value[k][v] = widen(s.element[v]);  // the sum as it is stored
                }
                *reinterpret_cast<Vector<T, V>*>(static_cast<T*>(n.s) + row * n.width + e) = s;
            }
        } else {
#pragma unroll
            for (int v = 0; v < V; ++v) value[k][v] = 0;
        }
#pragma unroll
        for (int v = 0; v < V; ++v) sum += n.centred ? value[k][v] : value[k][v] * value[k][v];
    }
    float mean = 0, variance = row_sum<kGroup>(sum) / width;
    if (n.centred) {
        mean = variance;
        float spread = 0;
#pragma unroll
        for (int k = 0; k < kVectors; ++k) {
            if (first + k * kGroup * V < width) {
#pragma unroll
                for (int v = 0; v < V; ++v) spread += (value[k][v] - mean) * (value[k][v] - mean);
            }
        }
        variance = row_sum<kGroup>(spread) / width;
    }
    const float rstd = rsqrtf(variance + static_cast<float>(n.eps));
    if (n.stats && first == 0) {
        float* const stats = static_cast<float*>(n.stats) + row;
        if (n.centred) stats[0] = mean;
        stats[n.centred ? n.rows : 0] = rstd;
    }
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
        const int32_t e = first + k * kGroup * V;
        if (e < width) {
#pragma unroll
            for (int v = 0; v < V; ++v) value[k][v] = norm_hat(value[k][v], mean, rstd);
            if (n.weight) {
                const auto weight = load<V, W>(n.weight, e);
#pragma unroll
                for (int v = 0; v < V; ++v) value[k][v] *= widen(weight.element[v]);
            }
            if (n.bias) {
                const auto bias = load<V, W>(n.bias, e);
#pragma unroll
                for (int v = 0; v < V; ++v) value[k][v] += widen(bias.element[v]);
            }
            store<V, T>(n.y, row * n.width + e, value[k]);
        }
    }
}

// Makes of a width a number the compiler does not know: it kept one loop's comparisons with it for the next loop, more than
// there are predicates, and spilled them.
__device__ __forceinline__ void hide(int32_t& width) { asm("" : "+r"(width)); }

// The sums that the threads of this block hold of one parameter, added over its rows and written to its place.
template <int V, int kGroup>
__device__ __forceinline__ void write_partial(float* to, int32_t width, int32_t first, const float (&sum)[kValues / V][V]) {
    constexpr int kGroups = kThreads / kGroup;
    __shared__ float shared[kGroups > 1 ? kGroup * kValues : 1];
    hide(width);
    for (int group = 0; group < kGroups; ++group) {  // one after another: always the same order
        if (kGroups > 1) __syncthreads();
        if (static_cast<int>(threadIdx.x / kGroup) != group) continue;
#pragma unroll
        for (int k = 0; k < kValues / V; ++k) {
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const int32_t e = first + k * kGroup * V + v;
                if (e >= width) continue;
                const float total = group ? shared[e] + sum[k][v] : sum[k][v];
                if (group == kGroups - 1) to[e] = total;
                else shared[e] = total;
            }
        }
    }
}

template <class T, class W, int V, int kGroup, bool kScaled>
__global__ void __launch_bounds__(kThreads) norm_backward_kernel(const NormBackward n, const int64_t columns) {
    constexpr int kVectors = kValues / V, kGroups = kThreads / kGroup;
    constexpr bool kHold = V > 1;  // element by element there are too few registers; the second pass loads again, from the cache
    const int32_t width = static_cast<int32_t>(n.width);
    const int32_t first = static_cast<int32_t>(threadIdx.x % kGroup) * V;
    const int64_t end = norm_first_row(blockIdx.x + 1, n.rows, n.blocks);

    float weight_sum[kVectors][V] = {}, bias_sum[kVectors][V] = {};
    [[maybe_unused]] float scale_sum[kScaled ? kVectors : 1][V] = {};

    for (int64_t row = norm_first_row(blockIdx.x, n.rows, n.blocks) + threadIdx.x / kGroup; row < end; row += kGroups) {
        const float* const stats = static_cast<const float*>(n.stats) + row;
        const float mean = n.centred ? stats[0] : 0.0f, rstd = stats[n.centred ? n.rows : 0];
        Vector<T, V> s[kVectors], grad_y[kVectors];
        float sum = 0, product = 0;
        const auto fetch = [&](int k) {
            const int32_t e = first + k * kGroup * V;
            if (e < width) {
                s[k] = load<V, T>(n.s, row * n.s_stride + e);
                grad_y[k] = load<V, T>(n.grad_y, row * n.grad_y_stride + e);
            }
        };
        if constexpr (kHold) {
#pragma unroll
            for (int k = 0; k < kVectors; ++k) fetch(k);
        }
#pragma unroll
        for (int k = 0; k < kVectors; ++k) {
            const int32_t e = first + k * kGroup * V;
            if (e < width) {
                if constexpr (!kHold) fetch(k);
                float w[V];
#pragma unroll
                for (int v = 0; v < V; ++v) w[v] = 1;
                if (n.weight) {
                    const auto weight = load<V, W>(n.weight, e);
#pragma unroll
                    for (int v = 0; v < V; ++v) w[v] = widen(weight.element[v]);
                }
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    const float dy = widen(grad_y[k].element[v]), hat = norm_hat(widen(s[k].element[v]), mean, rstd);
                    sum += dy * w[v];
                    product += dy * w[v] * hat;
                    weight_sum[k][v] += dy * hat;
                    bias_sum[k][v] += dy;
                }
            }
        }
        const float mean_g_hat = row_sum<kGroup>(product) / width;
        const float mean_g = n.centred ? row_sum<kGroup>(sum) / width : 0.0f;
        int32_t limit = width;
        hide(limit);
#pragma unroll
        for (int k = 0; k < kVectors; ++k) {
            const int32_t e = first + k * kGroup * V;
            if (e < limit) {
                if constexpr (!kHold) fetch(k);
                float gradient[V];
#pragma unroll
                for (int v = 0; v < V; ++v) gradient[v] = widen(grad_y[k].element[v]);
                if (n.weight) {
                    const auto weight = load<V, W>(n.weight, e);
#pragma unroll
                    for (int v = 0; v < V; ++v) gradient[v] *= widen(weight.element[v]);
                }
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    const float hat = norm_hat(widen(s[k].element[v]), mean, rstd);
                    gradient[v] = norm_grad(gradient[v], hat, rstd, mean_g, mean_g_hat);
                }
                if (n.grad_s) {
                    const auto grad_s = load<V, T>(n.grad_s, row * n.grad_s_stride + e);
#pragma unroll
                    for (int v = 0; v < V; ++v) gradient[v] += widen(grad_s.element[v]);
                }
                store<V, T>(n.grad_sum, row * n.width + e, gradient);
                if constexpr (kScaled) {
                    const auto x = load<V, T>(n.x, row * n.x_stride + e);
                    const auto scale = load<V, W>(n.scale, e);
#pragma unroll
                    for (int v = 0; v < V; ++v) {
                        scale_sum[k][v] += gradient[v] * widen(x.element[v]);
                        gradient[v] *= widen(scale.element[v]);
                    }
                    store<V, T>(n.grad_x, row * n.width + e, gradient);
                }
            }
        }
    }

    float* to = static_cast<float*>(n.partials) + blockIdx.x * columns;
    if (n.weight_grad) {
        write_partial<V, kGroup>(to, width, first, weight_sum);
        to += n.width;
    }
    if (n.bias_grad) {
        write_partial<V, kGroup>(to, width, first, bias_sum);
        to += n.width;
    }
    if constexpr (kScaled)
        if (n.scale_grad) write_partial<V, kGroup>(to, width, first, scale_sum);
}

__global__ void __launch_bounds__(kColumns* kSumGroups)
    norm_sum_kernel(const float* __restrict__ partials, float* __restrict__ grads, int64_t blocks, int64_t columns) {
    __shared__ float shared[kSumGroups][kColumns];
    const int column = threadIdx.x % kColumns, group = threadIdx.x / kColumns;
    const int64_t c = static_cast<int64_t>(blockIdx.x) * kColumns + column;
    float sum = 0;
    if (c < columns)
        for (int64_t block = group; block < blocks; block += kSumGroups) sum += partials[block * columns + c];
    shared[group][column] = sum;
    __syncthreads();
    if (group > 0 || c >= columns) return;
    for (int other = 1; other < kSumGroups; ++other) sum += shared[other][column];
    grads[c] = sum;
}

// Whether 16-byte vectors of V elements reach all of a tensor whose rows are a stride apart; an absent one does not mind.
template <class T, int V>
bool aligned(const void* pointer, int64_t stride) {
    return !pointer || (reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride % V == 0);
}

// Calls fn(V, threads of a row) as integral constants.
template <class T, class Fn>
void with_geometry(int64_t width, bool vectors, Fn&& fn) {
    constexpr int V = 16 / sizeof(T);
    using Block = std::integral_constant<int, kThreads>;
    if (!vectors) fn(std::integral_constant<int, 1>{}, Block{});  // a warp a row has too few registers for single elements
    else if (width <= 32 * kValues) fn(std::integral_constant<int, V>{}, std::integral_constant<int, 32>{});
    else fn(std::integral_constant<int, V>{}, Block{});
}

void check_size(const char* op, DType dtype, int64_t width, int64_t blocks) {
    if (dtype == DType::float64) throw std::runtime_error(std::string(op) + ": float64 is computed on the CPU only");
    if (width > kThreads * kValues) throw std::runtime_error(std::string(op) + ": rows have at most 4096 elements on CUDA");
    if (blocks > INT32_MAX) throw std::runtime_error(std::string(op) + ": too many rows for one launch");
}

}  // namespace

void norm_forward_cuda(const NormForward& n, void* stream) {
    check_size("norm_forward", n.dtype, n.width, n.rows);
    const DeviceGuard guard("norm_forward", n.y);
    with_norm_dtypes(n.dtype, n.parameter_dtype, [&](auto element, auto parameter) {
        using T = decltype(element);
        using W = decltype(parameter);
        if constexpr (!std::is_same_v<T, double>) {
            constexpr int kVector = 16 / sizeof(T);
            const bool vectors = n.width % kVector == 0 && aligned<T, kVector>(n.x, n.x_stride) &&
                                 aligned<T, kVector>(n.residual, n.residual_stride) && aligned<W, kVector>(n.scale, 0) &&
                                 aligned<W, kVector>(n.weight, 0) && aligned<W, kVector>(n.bias, 0) &&
                                 aligned<T, kVector>(n.s, 0) && aligned<T, kVector>(n.y, 0);
            with_geometry<T>(n.width, vectors, [&](auto v, auto group) {
                constexpr int V = decltype(v)::value, kGroup = decltype(group)::value;
                const unsigned blocks = static_cast<unsigned>(ceil_div(n.rows, kThreads / kGroup));
                norm_forward_kernel<T, W, V, kGroup><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(n);
            });
        }
    });
    check_launch("norm_forward");
}

void norm_backward_cuda(const NormBackward& n, void* stream) {
    check_size("norm_backward", n.dtype, n.width, n.blocks);
    const DeviceGuard guard("norm_backward", n.grad_sum);
    const cudaStream_t order = static_cast<cudaStream_t>(stream);
    const int64_t columns = n.parameters() * n.width;
    with_norm_dtypes(n.dtype, n.parameter_dtype, [&](auto element, auto parameter) {
        using T = decltype(element);
        using W = decltype(parameter);
        if constexpr (!std::is_same_v<T, double>) {
            constexpr int kVector = 16 / sizeof(T);
            const bool vectors = n.width % kVector == 0 && aligned<T, kVector>(n.grad_y, n.grad_y_stride) &&
                                 aligned<T, kVector>(n.grad_s, n.grad_s_stride) && aligned<T, kVector>(n.s, n.s_stride) &&
                                 aligned<T, kVector>(n.x, n.x_stride) && aligned<W, kVector>(n.scale, 0) &&
                                 aligned<W, kVector>(n.weight, 0) && aligned<T, kVector>(n.grad_sum, 0) &&
                                 aligned<T, kVector>(n.grad_x, 0);
            with_geometry<T>(n.width, vectors, [&](auto v, auto group) {
                constexpr int V = decltype(v)::value, kGroup = decltype(group)::value;
                const unsigned blocks = static_cast<unsigned>(n.blocks);
                if (n.scale) norm_backward_kernel<T, W, V, kGroup, true><<<blocks, kThreads, 0, order>>>(n, columns);
                else norm_backward_kernel<T, W, V, kGroup, false><<<blocks, kThreads, 0, order>>>(n, columns);
            });
        }
    });
    check_launch("norm_backward");
    if (columns > 0) {
        const unsigned blocks = static_cast<unsigned>(ceil_div(columns, kColumns));
        norm_sum_kernel<<<blocks, kColumns * kSumGroups, 0, order>>>(static_cast<const float*>(n.partials),
                                                                     static_cast<float*>(n.grads), n.blocks, columns);
        check_launch("norm_backward");
    }
}

}  // namespace vitok
