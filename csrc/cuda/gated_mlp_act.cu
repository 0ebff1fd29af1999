// The kernels of common/gated_mlp_act.h on CUDA. One thread makes one vector of a row, 16 bytes wide where the halves are
// aligned to that (hidden sizes such as 2050 leave 4 bytes, odd ones single elements); the grid has a row on x and the
// vectors of a row on y, so that no index is divided.
#include "../common/gated_mlp_act.h"

#include "launch.h"
#include "ops.h"
#include "vector.h"

namespace vitok {
namespace {

constexpr int kThreads = 256;

template <class T, int V>
VITOK_INLINE Vector<T, V> load(const T* from) {
    return *reinterpret_cast<const Vector<T, V>*>(from);
}

template <class T, int V>
VITOK_INLINE void store(T* to, const Vector<T, V>& x) {
    *reinterpret_cast<Vector<T, V>*>(to) = x;
}

template <class T, int V, bool kGelu>
__global__ void __launch_bounds__(kThreads)
    gated_mlp_act_forward_kernel(const T* __restrict__ gate_up, T* __restrict__ out, int64_t hidden, int64_t row_stride) {
    using F = compute_t<T>;
    const int64_t row = blockIdx.x;
    const T* const from = gate_up + row * row_stride;
    T* const to = out + row * hidden;
    const int64_t step = static_cast<int64_t>(gridDim.y) * kThreads * V;
    for (int64_t e = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * V; e < hidden; e += step) {
        const auto gates = load<T, V>(from + e), ups = load<T, V>(from + hidden + e);
        Vector<T, V> y;
#pragma unroll
        for (int n = 0; n < V; ++n) {
            const F gate = widen(gates.element[n]), up = widen(ups.element[n]);
            F c, slope;
            gate_distribution<kGelu>(gate, c, slope);
            narrow(gated(gate, up, c), y.element[n]);
        }
        store(to + e, y);
    }
}

template <class T, int V, bool kGelu>
__global__ void __launch_bounds__(kThreads)
    gated_mlp_act_backward_kernel(const T* __restrict__ grad, const T* __restrict__ gate_up, T* __restrict__ grad_gate_up,
                                  int64_t hidden, int64_t grad_stride, int64_t row_stride) {
    using F = compute_t<T>;
    const int64_t row = blockIdx.x;
    const T* const seed = grad + row * grad_stride;
    const T* const from = gate_up + row * row_stride;
    T* const to = grad_gate_up + row * 2 * hidden;
    const int64_t step = static_cast<int64_t>(gridDim.y) * kThreads * V;
    for (int64_t e = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * V; e < hidden; e += step) {
        const auto seeds = load<T, V>(seed + e), gates = load<T, V>(from + e), ups = load<T, V>(from + hidden + e);
        Vector<T, V> first, second;
#pragma unroll
        for (int n = 0; n < V; ++n) {
            const F gate = widen(gates.element[n]), up = widen(ups.element[n]);
            F c, slope, dgate, dup;
            gate_distribution<kGelu>(gate, c, slope);
            gated_gradients(static_cast<F>(widen(seeds.element[n])), gate, up, c, slope, dgate, dup);
            narrow(dgate, first.element[n]);
            narrow(dup, second.element[n]);
        }
        store(to + e, first);
        store(to + hidden + e, second);
    }
}

// Elements of the widest vector that all rows of all tensors are aligned to.
template <class T>
int vector_width(int64_t hidden, int64_t strides, uintptr_t addresses) {
    constexpr int kWidest = sizeof(T) < 8 ? 16 / sizeof(T) : 1;  // double exists for gradient checks
    for (const int width : {kWidest, 2})
        if (width <= kWidest && hidden % width == 0 && strides % width == 0 && addresses % (width * sizeof(T)) == 0) return width;
    return 1;
}

dim3 grid_of(const char* op, int64_t rows, int64_t vectors) {
    if (rows > INT32_MAX) throw std::runtime_error(std::string(op) + ": more than 2^31 rows in one launch");
    const int64_t blocks = ceil_div(vectors, kThreads);
    return dim3(static_cast<unsigned>(rows), static_cast<unsigned>(blocks < 65535 ? blocks : 65535));
}

template <class T, int V>
void launch(const GatedMlpActForward& a, cudaStream_t stream) {
    const dim3 grid = grid_of("gated_mlp_act_forward", a.rows, a.hidden / V);
    const auto kernel = a.gelu ? gated_mlp_act_forward_kernel<T, V, true> : gated_mlp_act_forward_kernel<T, V, false>;
    kernel<<<grid, kThreads, 0, stream>>>(static_cast<const T*>(a.gate_up), static_cast<T*>(a.out), a.hidden, a.row_stride);
    check_launch("gated_mlp_act_forward");
}

template <class T, int V>
void launch(const GatedMlpActBackward& a, cudaStream_t stream) {
    const dim3 grid = grid_of("gated_mlp_act_backward", a.rows, a.hidden / V);
    const auto kernel = a.gelu ? gated_mlp_act_backward_kernel<T, V, true> : gated_mlp_act_backward_kernel<T, V, false>;
    kernel<<<grid, kThreads, 0, stream>>>(static_cast<const T*>(a.grad), static_cast<const T*>(a.gate_up),
                                          static_cast<T*>(a.grad_gate_up), a.hidden, a.grad_stride, a.row_stride);
    check_launch("gated_mlp_act_backward");
}

template <class T, class Args>
void launch_for_width(const Args& a, int width, cudaStream_t stream) {
    if constexpr (sizeof(T) < 8) {
        constexpr int kWidest = 16 / sizeof(T);
        if (width == kWidest) return launch<T, kWidest>(a, stream);
        if (width == 2) return launch<T, 2>(a, stream);
    }
    launch<T, 1>(a, stream);
}

uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

}  // namespace

void gated_mlp_act_forward_cuda(const GatedMlpActForward& a, void* stream) {
    const DeviceGuard guard("gated_mlp_act_forward", a.out);
    with_float(a.dtype, [&](auto element) {
        using T = decltype(element);
        const int width = vector_width<T>(a.hidden, a.row_stride, address(a.gate_up) | address(a.out));
        launch_for_width<T>(a, width, static_cast<cudaStream_t>(stream));
    });
}

void gated_mlp_act_backward_cuda(const GatedMlpActBackward& a, void* stream) {
    const DeviceGuard guard("gated_mlp_act_backward", a.grad_gate_up);
    with_float(a.dtype, [&](auto element) {
        using T = decltype(element);
        const uintptr_t addresses = address(a.grad) | address(a.gate_up) | address(a.grad_gate_up);
        const int width = vector_width<T>(a.hidden, a.row_stride | a.grad_stride, addresses);
        launch_for_width<T>(a, width, static_cast<cudaStream_t>(stream));
    });
}

}  // namespace vitok
