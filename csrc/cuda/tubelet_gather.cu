// The gather of common/tubelet_gather.h on CUDA. It moves bytes and little else, so what counts is that a warp writes one
// contiguous stretch (16 bytes a lane for patch edges that are multiples of 8) and that index arithmetic stays cheap: the
// patch edge is a compile-time constant for 8 and 16, and 64-bit numbers appear only in addresses.
#include "../common/tubelet_gather.h"

#include <type_traits>

#include "launch.h"
#include "ops.h"
#include "vector.h"

namespace vitok {
namespace {

constexpr int kThreads = 256;

// Elements one thread makes where runs of 3p elements divide into such vectors: 16 bytes of a 16-bit type.
constexpr int kVector = 8;

template <class S, class F>
struct Args {
    const S* __restrict__ source;
    int64_t stride_b, stride_t, stride_y, stride_x, stride_c;
    int64_t frames, height;
    int32_t width;
    int32_t rows_t, rows_y, row_vectors;  // token rows in time and height; vectors in one token row
    int32_t q, p;
    bool pad_zero;
    bool wide_loads;  // rows are interleaved and every vector in them is aligned to its size
    F scale, shift;
};

template <class S, class D, class F, int P, int V>
__global__ void __launch_bounds__(kThreads) tubelet_gather_kernel(const Args<S, F> a, D* __restrict__ target) {
    const int32_t p = P ? P : a.p;
    const int32_t run = 3 * p / V;  // vectors in one patch row

    const uint32_t token_row = blockIdx.x;  // (b, lt, ly)
    const uint32_t ly = token_row % a.rows_y;
    const uint32_t lt = token_row / a.rows_y % a.rows_t;
    const uint32_t b = token_row / a.rows_y / a.rows_t;
    const S* const frame_zero = a.source + b * a.stride_b;

    for (uint32_t v = blockIdx.y * kThreads + threadIdx.x; v < static_cast<uint32_t>(a.row_vectors); v += gridDim.y * kThreads) {
        const uint32_t patch = v / (run * p);  // lx * q + i: one p x p square of one frame
        const uint32_t within = v % (run * p);
        const int32_t lx = patch / a.q, i = patch % a.q;
        const int32_t j = within / run, e = within % run * V;  // first element of the vector within its patch row
        const int64_t t = static_cast<int64_t>(lt) * a.q + i, y = static_cast<int64_t>(ly) * p + j;
        const bool outside = t >= a.frames || y >= a.height;
        const S* const row = frame_zero + clamp_edge(t, a.frames) * a.stride_t + clamp_edge(y, a.height) * a.stride_y;
        const int32_t last_x = lx * p + (e + V - 1) / 3;

        S in[V];
        bool zero[V];
        if (V > 1 && a.wide_loads && last_x < a.width) {
            const auto wide = *reinterpret_cast<const Vector<S, V>*>(row + static_cast<int64_t>(lx) * p * 3 + e);
#pragma unroll
            for (int n = 0; n < V; ++n) {
                in[n] = wide.element[n];
                zero[n] = a.pad_zero && outside;
            }
        } else {
#pragma unroll
            for (int n = 0; n < V; ++n) {
                const int32_t x = lx * p + (e + n) / 3;
                in[n] = row[clamp_edge(x, a.width) * a.stride_x + (e + n) % 3 * a.stride_c];
                zero[n] = a.pad_zero && (outside || x >= a.width);
            }
        }

        Vector<D, V> out;
#pragma unroll
        for (int n = 0; n < V; ++n) narrow(zero[n] ? F(0) : normalise(widen(in[n]), a.scale, a.shift), out.element[n]);
        *reinterpret_cast<Vector<D, V>*>(target + (static_cast<int64_t>(token_row) * a.row_vectors + v) * V) = out;
    }
}

template <class S, class D, class F, int P, int V>
void launch(const TubeletGather& g, cudaStream_t stream) {
    const int64_t rows_t = ceil_div(g.sizes[1], g.q), rows_y = ceil_div(g.sizes[2], g.p), columns = ceil_div(g.sizes[3], g.p);
    const int64_t token_rows = g.sizes[0] * rows_t * rows_y;
    const int64_t row_vectors = columns * g.q * g.p * g.p * 3 / V;
    if (token_rows > INT32_MAX || row_vectors > INT32_MAX - (1 << 24) || g.sizes[3] > INT32_MAX - kMaxPatch)
        throw std::runtime_error("tubelet_gather: more than 2^31 token rows, or a token row too large for one launch");

    const int64_t bytes = V * sizeof(S) < 16 ? V * sizeof(S) : 16;
    const auto aligned = [&](int64_t stride) { return stride * static_cast<int64_t>(sizeof(S)) % bytes == 0; };
    const bool interleaved = g.strides[4] == 1 && (g.strides[3] == 3 || g.sizes[3] == 1);

    Args<S, F> a;
    a.source = static_cast<const S*>(g.src);
    a.stride_b = g.strides[0], a.stride_t = g.strides[1], a.stride_y = g.strides[2], a.stride_x = g.strides[3], a.stride_c = g.strides[4];
    a.frames = g.sizes[1], a.height = g.sizes[2], a.width = static_cast<int32_t>(g.sizes[3]);
    a.rows_t = static_cast<int32_t>(rows_t), a.rows_y = static_cast<int32_t>(rows_y);
    a.row_vectors = static_cast<int32_t>(row_vectors);
    a.q = static_cast<int32_t>(g.q), a.p = static_cast<int32_t>(g.p);
    a.pad_zero = g.pad_zero;
    a.wide_loads = interleaved && reinterpret_cast<uintptr_t>(g.src) % bytes == 0 && aligned(g.strides[0]) &&
                   aligned(g.strides[1]) && aligned(g.strides[2]);
    a.scale = static_cast<F>(g.scale), a.shift = static_cast<F>(g.shift);

    const int64_t blocks = ceil_div(row_vectors, kThreads);
    const dim3 grid(static_cast<unsigned>(token_rows), static_cast<unsigned>(blocks < 65535 ? blocks : 65535));
    tubelet_gather_kernel<S, D, F, P, V><<<grid, kThreads, 0, stream>>>(a, static_cast<D*>(g.dst));
    check_launch("tubelet_gather");
}

template <class S, class D>
void launch_for_patch(const TubeletGather& g, cudaStream_t stream) {
    if constexpr (std::is_same_v<D, double>) {
        launch<double, double, double, 0, 1>(g, stream);  // exists for gradient checks; speed does not matter
    } else {
        const bool vectors = g.p % 8 == 0 && reinterpret_cast<uintptr_t>(g.dst) % 16 == 0;
        if (vectors && g.p == 8) return launch<S, D, float, 8, kVector>(g, stream);
        if (vectors && g.p == 16) return launch<S, D, float, 16, kVector>(g, stream);
        if (vectors) return launch<S, D, float, 0, kVector>(g, stream);
        launch<S, D, float, 0, 1>(g, stream);
    }
}

}  // namespace

void tubelet_gather_cuda(const TubeletGather& gather, void* stream) {
    const DeviceGuard guard("tubelet_gather", gather.dst);
    with_dtypes(gather.src_dtype, gather.dst_dtype, [&](auto source, auto target) {
        launch_for_patch<decltype(source), decltype(target)>(gather, static_cast<cudaStream_t>(stream));
    });
}

}  // namespace vitok
