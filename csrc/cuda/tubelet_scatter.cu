// The scatter of common/tubelet_scatter.h on CUDA. It moves bytes and little else: a thread takes 8 neighbouring pixels with
// their three colours, 24 elements that lie together in a patch row, and writes them as one vector a plane, or as one stretch
// of an interleaved row. The lanes of a warp go along x, so that a warp writes whole lines of every plane (512 bytes of a
// 16-bit type) and reads every sector of the rows it touches once. The half dozen divisions a thread needs cost about 150
// instructions a warp; 3 KB a warp at 4.3 TB/s leave room for four times as many.
#include "../common/tubelet_scatter.h"

#include <type_traits>

#include "launch.h"
#include "ops.h"

namespace vitok {
namespace {

constexpr int kChunks = 32, kRows = 8;  // threads of a block: along x, and rows of the clip
constexpr int kBlocks = 3;              // a multiprocessor: 80 registers a thread; left to itself ptxas takes 48 and spills

// Pixels of one thread where patch rows divide into such chunks: 16 bytes of a 16-bit type in each plane.
constexpr int kVector = 8;

template <class S, class D>
struct Args {
    const S* __restrict__ source;
    int64_t src_stride_b, src_stride_l, src_stride_e;
    int64_t stride_b, stride_t, stride_y, stride_x, stride_c;
    uint32_t frames, height, width, clip_rows, chunks;  // clip_rows: B * T * H
    uint32_t rows_y, columns, q, p;
    bool fold_edges;
    bool wide_loads;   // a chunk's 24 elements are contiguous and aligned
    bool wide_planes;  // so are its 8 pixels in every plane of the clip
    bool wide_row;     // or its 24 elements in an interleaved row
};

// N elements with the alignment of the widest access that divides them: 16 bytes, 8 or an element.
template <class T, int N>
struct alignas(N * sizeof(T) % 16 == 0 ? 16 : N * sizeof(T) % 8 == 0 ? 8 : sizeof(T)) Wide {
    T element[N];
};

template <class S, class D, class F, int V>
__global__ void __launch_bounds__(kChunks * kRows, kBlocks)
    tubelet_scatter_kernel(const Args<S, D> a, D* __restrict__ target) {
    const uint32_t clip_row = blockIdx.x * kRows + threadIdx.y;
    if (clip_row >= a.clip_rows) return;
    const uint32_t y = clip_row % a.height, t = clip_row / a.height % a.frames, b = clip_row / a.height / a.frames;
    const uint32_t ly = y / a.p, j = y - ly * a.p, lt = t / a.q, i = t - lt * a.q;
    const int64_t token_row = static_cast<int64_t>(lt) * a.rows_y + ly;
    const S* const tokens = a.source + b * a.src_stride_b + token_row * a.columns * a.src_stride_l;
    D* const row = target + b * a.stride_b + t * a.stride_t + y * a.stride_y;

    const uint32_t i_end = a.fold_edges && t == a.frames - 1 ? a.q : i + 1;
    const uint32_t j_end = a.fold_edges && y == a.height - 1 ? a.p : j + 1;
    const uint32_t last_x = a.width - 1;

    for (uint32_t chunk = blockIdx.y * kChunks + threadIdx.x; chunk < a.chunks; chunk += gridDim.y * kChunks) {
        const uint32_t x = chunk * V, lx = x / a.p, k = x - lx * a.p;
        const bool whole = x + V <= a.width;
        const bool folds = i_end > i + 1 || j_end > j + 1 || (a.fold_edges && x <= last_x && last_x < x + V);
        const S* const from = tokens + lx * a.src_stride_l;

        D* const to = row + x * a.stride_x;
        if (V == 1 || !a.wide_loads || folds) {
#pragma unroll 1
            for (uint32_t e = 0; e < 3 * V && x + e / 3 < a.width; ++e) {
                const uint32_t n = e / 3, ch = e - 3 * n;
                const uint32_t k_end = a.fold_edges && x + n == last_x ? a.p : k + n + 1;
                F sum = 0;
#pragma unroll 1
                for (uint32_t from_i = i; from_i < i_end; ++from_i)
#pragma unroll 1
                    for (uint32_t from_j = j; from_j < j_end; ++from_j)
#pragma unroll 1
                        for (uint32_t from_k = k + n; from_k < k_end; ++from_k) {
                            const int64_t pixel = static_cast<int64_t>(from_i * a.p + from_j) * a.p + from_k;
                            sum += widen(from[(pixel * 3 + ch) * a.src_stride_e]);
                        }
                to_pixel(sum, to[n * a.stride_x + ch * a.stride_c]);
            }
            continue;
        }

        Wide<D, 3 * V> out;
        const auto in = *reinterpret_cast<const Wide<S, 3 * V>*>(from + (static_cast<int64_t>(i * a.p + j) * a.p + k) * 3);
#pragma unroll
        for (int n = 0; n < 3 * V; ++n) to_pixel(static_cast<F>(widen(in.element[n])), out.element[n]);

        if (a.wide_planes && whole) {
#pragma unroll
            for (int ch = 0; ch < 3; ++ch) {
                Wide<D, V> plane;
#pragma unroll
                for (int n = 0; n < V; ++n) plane.element[n] = out.element[3 * n + ch];
                *reinterpret_cast<Wide<D, V>*>(to + ch * a.stride_c) = plane;
            }
        } else if (a.wide_row && whole) {
            *reinterpret_cast<Wide<D, 3 * V>*>(to) = out;
        } else {
#pragma unroll
            for (int n = 0; n < V; ++n)
                if (x + n < a.width)
#pragma unroll
                    for (int ch = 0; ch < 3; ++ch) to[n * a.stride_x + ch * a.stride_c] = out.element[3 * n + ch];
        }
    }
}

template <class S, class D, class F, int V>
void launch(const TubeletScatter& s, cudaStream_t stream) {
    const int64_t rows_y = ceil_div(s.sizes[2], s.p), columns = ceil_div(s.sizes[3], s.p);
    for (const int64_t n : {s.sizes[1], s.sizes[2], s.sizes[3], s.sizes[0] * s.sizes[1] * s.sizes[2], s.q * s.p})
        if (n < 0 || n > INT32_MAX - (1 << 24))
            throw std::runtime_error("tubelet_scatter: more than 2^31 rows, columns or frames do not fit one launch");
    const auto aligned = [](int64_t stride, int64_t size, int64_t bytes) { return stride * size % bytes == 0; };

    Args<S, D> a;
    a.source = static_cast<const S*>(s.src);
    a.src_stride_b = s.src_strides[0], a.src_stride_l = s.src_strides[1], a.src_stride_e = s.src_strides[2];
    a.stride_b = s.strides[0], a.stride_t = s.strides[1], a.stride_y = s.strides[2];
    a.stride_x = s.strides[3], a.stride_c = s.strides[4];
    a.frames = static_cast<uint32_t>(s.sizes[1]), a.height = static_cast<uint32_t>(s.sizes[2]);
    a.width = static_cast<uint32_t>(s.sizes[3]);
    a.clip_rows = static_cast<uint32_t>(s.sizes[0] * s.sizes[1] * s.sizes[2]);
    a.chunks = static_cast<uint32_t>(ceil_div(s.sizes[3], V));
    a.rows_y = static_cast<uint32_t>(rows_y), a.columns = static_cast<uint32_t>(columns);
    a.q = static_cast<uint32_t>(s.q), a.p = static_cast<uint32_t>(s.p);
    a.fold_edges = s.fold_edges && (s.sizes[1] % s.q != 0 || s.sizes[2] % s.p != 0 || s.sizes[3] % s.p != 0);

    constexpr int64_t in = alignof(Wide<S, 3 * V>), plane = alignof(Wide<D, V>), out = alignof(Wide<D, 3 * V>);
    a.wide_loads = s.src_strides[2] == 1 && reinterpret_cast<uintptr_t>(s.src) % in == 0 &&
                   aligned(s.src_strides[0], sizeof(S), in) && aligned(s.src_strides[1], sizeof(S), in);
    const auto rows_aligned = [&](int64_t bytes) {
        return reinterpret_cast<uintptr_t>(s.dst) % bytes == 0 && aligned(s.strides[0], sizeof(D), bytes) &&
               aligned(s.strides[1], sizeof(D), bytes) && aligned(s.strides[2], sizeof(D), bytes);
    };
    a.wide_planes = s.strides[3] == 1 && rows_aligned(plane) && aligned(s.strides[4], sizeof(D), plane);
    a.wide_row = s.strides[4] == 1 && s.strides[3] == 3 && rows_aligned(out);

    const int64_t blocks = ceil_div(a.chunks, kChunks);
    const dim3 grid(static_cast<unsigned>(ceil_div(a.clip_rows, kRows)),
                    static_cast<unsigned>(blocks < 65535 ? blocks : 65535));
    tubelet_scatter_kernel<S, D, F, V><<<grid, dim3(kChunks, kRows), 0, stream>>>(a, static_cast<D*>(s.dst));
    check_launch("tubelet_scatter");
}

}  // namespace

void tubelet_scatter_cuda(const TubeletScatter& s, void* stream) {
    const DeviceGuard guard("tubelet_scatter", s.dst);
    with_dtypes(s.dst_dtype, s.src_dtype, [&](auto target, auto source) {
        using S = decltype(source);
        using D = decltype(target);
        const auto on = static_cast<cudaStream_t>(stream);
        if constexpr (std::is_same_v<S, double>) {
            launch<double, double, double, 1>(s, on);  // exists for gradient checks; speed does not matter
        } else if (s.p % kVector == 0) {
            launch<S, D, float, kVector>(s, on);
        } else {
            launch<S, D, float, 1>(s, on);
        }
    });
}

}  // namespace vitok
