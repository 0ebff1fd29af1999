// qk_norm_rope on the CPU. Compiled once per instruction set, in the namespace VITOK_ISA; no standard library templates in
// here, because their inline copies would leak across instruction sets.
#include "../common/qk_norm_rope.h"

#include "dispatch.h"
#include "head_row.h"

namespace vitok {
namespace VITOK_ISA {
namespace {

// Tokens of one work item: 16 tokens of 12 heads of 64 channels are 73 KB in bf16 either way, few enough to share evenly.
constexpr int64_t kStretch = 16;

// Below this many elements the fork costs more than the threads save.
constexpr int64_t kParallelElements = 1 << 15;

template <class F>
void widen_row(const void* from, DType dtype, int64_t n, F* to) {
    with_float(dtype, [&](auto element) {
        const auto* const source = static_cast<const decltype(element)*>(from);
        for (int64_t i = 0; i < n; ++i) to[i] = static_cast<F>(widen(source[i]));
    });
}

// Calls fn(count), count() being the width: a compile-time constant for the head_dims in use, so that the loops over a row
// unroll.
template <class V, class Fn>
VITOK_INLINE void with_width(int64_t width, const Fn& fn) {
    if constexpr (V::kCount > 1) {
        if (width == 64) return fn([] { return int64_t{64}; });
        if (width == 72) return fn([] { return int64_t{72}; });
        if (width == 128) return fn([] { return int64_t{128}; });
    }
    fn([=] { return width; });
}

// The rows of one part (q, k or v) of one token that need no arithmetic.
template <class T>
VITOK_INLINE void copy_rows(const T* from, int64_t stride, T* to, int64_t heads, int64_t width) {
    if (stride == width) {
        memcpy(to, from, static_cast<size_t>(heads * width) * sizeof(T));
    } else {
        for (int64_t h = 0; h < heads; ++h) memcpy(to + h * width, from + h * stride, static_cast<size_t>(width) * sizeof(T));
    }
}

// A packed tensor by strides.
template <class T>
struct Packed {
    T* data;
    const int64_t* strides;
    T* at(int64_t b, int64_t l, int64_t part) const { return data + b * strides[0] + l * strides[1] + part * strides[2]; }
};

template <class T, class V, bool NORM, bool ROTATE>
void forward(const QkNormRopeForward& a) {
    using F = typename V::Element;
    const int64_t tokens = a.sizes[0] * a.sizes[1], length = a.sizes[1], heads = a.sizes[2], width = a.sizes[3];
    const int64_t items = ceil_div(tokens, kStretch), stride = a.strides[3];
    const Packed<const T> source{static_cast<const T*>(a.qkv), a.strides};
    T* const target = static_cast<T*>(a.out);
    const float* const table = static_cast<const float*>(a.table);
    F weights[2][NORM ? kMaxHeadDim : 1];
    if (NORM) widen_row(a.q_weight, a.weight_dtype, width, weights[0]), widen_row(a.k_weight, a.weight_dtype, width, weights[1]);
    [[maybe_unused]] const bool parallel = items > 1 && tokens * heads * width >= kParallelElements;

#if defined(_OPENMP)
#pragma omp parallel for schedule(static) if (parallel)
#endif
    for (int64_t item = 0; item < items; ++item) {
        const int64_t last = (item + 1) * kStretch < tokens ? (item + 1) * kStretch : tokens;
        for (int64_t token = item * kStretch; token < last; ++token) {
            const int64_t b = token / length, l = token % length;
            T* out = target + token * 3 * heads * width;
            for (int part = 0; part < 2; ++part, out += heads * width) {
                const T* const x = source.at(b, l, part);
                if (!NORM && !ROTATE) {
                    copy_rows(x, stride, out, heads, width);
                    continue;
                }
                const float* const cos = ROTATE ? table + l * a.table_strides[1] : nullptr;
                const float* const sin = ROTATE ? cos + a.table_strides[0] : nullptr;
                with_width<V>(width, [&](const auto& count) {
                    const HeadRow<F> row{count(), weights[part], cos, sin, static_cast<F>(a.eps)};
                    for (int64_t h = 0; h < heads; ++h)
                        head_forward<V, NORM, ROTATE>(x + h * stride, out + h * count(), row);
                });
            }
            copy_rows(source.at(b, l, 2), stride, out, heads, width);
        }
    }
}

template <class T, class V, bool NORM, bool ROTATE>
void backward(const QkNormRopeBackward& a) {
    using F = typename V::Element;
    const int64_t tokens = a.sizes[0] * a.sizes[1], length = a.sizes[1], heads = a.sizes[2], width = a.sizes[3];
    const int64_t grad_stride = a.grad_strides[3], stride = a.strides[3];
    const Packed<const T> gradient{static_cast<const T*>(a.grad), a.grad_strides};
    const Packed<const T> source{static_cast<const T*>(a.qkv), a.strides};
    T* const target = static_cast<T*>(a.dqkv);
    F* const partials = static_cast<F*>(a.partials);
    const float* const table = static_cast<const float*>(a.table);
    F weights[2][NORM ? kMaxHeadDim : 1];
    if (NORM) widen_row(a.q_weight, a.weight_dtype, width, weights[0]), widen_row(a.k_weight, a.weight_dtype, width, weights[1]);
    const int64_t stretch = ceil_div(tokens, a.blocks);
    [[maybe_unused]] const bool parallel = a.blocks > 1 && tokens * heads * width >= kParallelElements;

#if defined(_OPENMP)
#pragma omp parallel for schedule(static) if (parallel)
#endif
    for (int64_t block = 0; block < a.blocks; ++block) {
        const int64_t last = (block + 1) * stretch < tokens ? (block + 1) * stretch : tokens;
        F* const dweight = NORM ? partials + block * 2 * width : nullptr;
        F shares[NORM ? kMaxHeadDim : 1];  // of one token: sums of sums lose less than one long sum
        if (NORM)
            for (int64_t i = 0; i < 2 * width; ++i) dweight[i] = 0;
        for (int64_t token = block * stretch; token < last; ++token) {
            const int64_t b = token / length, l = token % length;
            T* out = target + token * 3 * heads * width;
            for (int part = 0; part < 2; ++part, out += heads * width) {
                const T* const grad = gradient.at(b, l, part);
                if (!NORM && !ROTATE) {
                    copy_rows(grad, grad_stride, out, heads, width);
                    continue;
                }
                const T* const x = NORM ? source.at(b, l, part) : nullptr;
                const float* const cos = ROTATE ? table + l * a.table_strides[1] : nullptr;
                const float* const sin = ROTATE ? cos + a.table_strides[0] : nullptr;
                with_width<V>(width, [&](const auto& count) {
                    const HeadRow<F> row{count(), weights[part], cos, sin, static_cast<F>(a.eps)};
                    if (NORM)
                        for (int64_t i = 0; i < count(); ++i) shares[i] = 0;
                    for (int64_t h = 0; h < heads; ++h)
                        head_backward<V, NORM, ROTATE>(grad + h * grad_stride, NORM ? x + h * stride : nullptr,
                                                       out + h * count(), shares, row);
                    if (NORM)
                        for (int64_t i = 0; i < count(); ++i) dweight[part * count() + i] += shares[i];
                });
            }
            copy_rows(gradient.at(b, l, 2), grad_stride, out, heads, width);
        }
    }
    if (!NORM) return;
    with_float(a.weight_dtype, [&](auto element) {
        using W = decltype(element);
        W* const sums[2] = {static_cast<W*>(a.dq_weight), static_cast<W*>(a.dk_weight)};
        for (int64_t i = 0; i < 2 * width; ++i) {
            double sum = 0;
            for (int64_t block = 0; block < a.blocks; ++block) sum += partials[block * 2 * width + i];
            narrow(static_cast<compute_t<W>>(sum), sums[i / width][i % width]);
        }
    });
}

// Calls kernel.run<element, arithmetic, norm, rotate>() for the arguments.
template <class Kernel, class Args>
void choose(const Args& a) {
    const bool rotates = a.table != nullptr;
    const bool vectors = (rotates ? a.sizes[3] / 2 : a.sizes[3]) >= kLanes;
    with_float(a.dtype, [&](auto element) {
        using T = decltype(element);
        using F = compute_t<T>;
        if constexpr (sizeof(F) == sizeof(float)) {
            if (vectors) return Kernel::template run<T, Vectors>(a, a.q_weight != nullptr, rotates);
        }
        Kernel::template run<T, Scalars<F>>(a, a.q_weight != nullptr, rotates);
    });
}

struct Forward {
    template <class T, class V>
    static void run(const QkNormRopeForward& a, bool norms, bool rotates) {
        if (norms) return rotates ? forward<T, V, true, true>(a) : forward<T, V, true, false>(a);
        rotates ? forward<T, V, false, true>(a) : forward<T, V, false, false>(a);
    }
};

struct Backward {
    template <class T, class V>
    static void run(const QkNormRopeBackward& a, bool norms, bool rotates) {
        if (norms) return rotates ? backward<T, V, true, true>(a) : backward<T, V, true, false>(a);
        rotates ? backward<T, V, false, true>(a) : backward<T, V, false, false>(a);
    }
};

}  // namespace

void qk_norm_rope_forward(const QkNormRopeForward& args) { choose<Forward>(args); }

void qk_norm_rope_backward(const QkNormRopeBackward& args) { choose<Backward>(args); }

}  // namespace VITOK_ISA
}  // namespace vitok
