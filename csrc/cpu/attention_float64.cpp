// attention of common/attention.h in float64 on the CPU, row by row: for gradient checks, not for speed.
#include "attention_work.h"

namespace vitok {
namespace VITOK_ISA {
namespace {

// One row of q or k: normalised and rotated.
void transform(const AttentionInputs& g, const void* weights, const double* from, int64_t token, double* to) {
    const int64_t width = g.width(), half = width / 2;
    double rstd = 1.0;
    if (weights) {
        double squares = 0.0;
        for (int64_t i = 0; i < width; ++i) squares += from[i] * from[i];
        rstd = 1.0 / __builtin_sqrt(squares / static_cast<double>(width) + g.eps);
    }
    with_float(g.weight_dtype, [&](auto zero) {
        using W = decltype(zero);
        for (int64_t i = 0; i < width; ++i)
            to[i] = weights ? from[i] * rstd * static_cast<double>(widen(static_cast<const W*>(weights)[i])) : from[i];
    });
    if (!g.table) return;
    const double* const c = static_cast<const double*>(g.table) + token * half;
    const double* const s = c + g.tokens() * half;
    for (int64_t i = 0; i < half; ++i) {
        const double a = to[i], b = to[i + half];
        to[i] = a * c[i] - b * s[i];
        to[i + half] = b * c[i] + a * s[i];
    }
}

double dot(const double* a, const double* b, int64_t n) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

// The gradient of one row of q or k, back through rotation and norm; adds the row's part of the weight's gradient.
void untransform(const AttentionBackward& g, const void* weights, const double* from, int64_t token, double* row,
                 double* partial, double* to) {
    const int64_t width = g.width(), half = width / 2;
    if (g.table) {
        const double* const c = static_cast<const double*>(g.table) + token * half;
        const double* const s = c + g.tokens() * half;
        for (int64_t i = 0; i < half; ++i) {
            const double a = row[i], b = row[i + half];
            row[i] = a * c[i] + b * s[i];
            row[i + half] = b * c[i] - a * s[i];
        }
    }
    if (!weights) {
        for (int64_t e = 0; e < width; ++e) to[e] = row[e];
        return;
    }
    const double rstd = 1.0 / __builtin_sqrt(dot(from, from, width) / static_cast<double>(width) + g.eps);
    with_float(g.weight_dtype, [&](auto zero) {
        const auto* const weight = static_cast<const decltype(zero)*>(weights);
        double mean = 0.0;
        for (int64_t e = 0; e < width; ++e) {
            partial[e] += row[e] * from[e] * rstd;
            mean += row[e] * static_cast<double>(widen(weight[e])) * from[e] * rstd;
        }
        mean /= static_cast<double>(width);
        for (int64_t e = 0; e < width; ++e)
            to[e] = (row[e] * static_cast<double>(widen(weight[e])) - from[e] * rstd * mean) * rstd;
    });
}

}  // namespace

void attention_forward_float64(const AttentionForward& g) {
    const Scratch scratch(g);
    const int64_t tokens = g.tokens(), width = g.width(), stride = g.padded_width(), heads = g.batch() * g.heads();
    const double scale = 1.0 / __builtin_sqrt(static_cast<double>(width));
    fill_intervals(g, scratch.keys);
    for (int64_t head = 0; head < heads; ++head) {
        const int64_t b = head / g.heads(), h = head % g.heads();
        double* const q = scratch.matrix<double>(g, 0);
        double* const k = scratch.matrix<double>(g, 1);
        for (int64_t i = 0; i < tokens; ++i) {
            transform(g, g.q_weight, head_row<double>(g, b, i, 0, h), i, q + i * stride);
            transform(g, g.k_weight, head_row<double>(g, b, i, 1, h), i, k + i * stride);
        }
        for (int64_t i = 0; i < tokens; ++i) {
            const Interval seen = scratch.keys[i];
            double* const out = static_cast<double*>(g.out) + ((b * tokens + i) * g.heads() + h) * width;
            double top = -__builtin_inf(), total = 0.0;
            for (int64_t e = 0; e < width; ++e) out[e] = 0.0;
            for (int64_t j = seen.begin; j < seen.end; ++j) {
                const double score = scale * dot(q + i * stride, k + j * stride, width);
                top = score > top ? score : top;
            }
            for (int64_t j = seen.begin; j < seen.end; ++j) {
                const double* const v = head_row<double>(g, b, j, 2, h);
                const double weight = __builtin_exp(scale * dot(q + i * stride, k + j * stride, width) - top);
                total += weight;
                for (int64_t e = 0; e < width; ++e) out[e] += weight * v[e];
            }
            for (int64_t e = 0; e < width; ++e) out[e] = total == 0.0 ? 0.0 : out[e] / total;
            if (g.lse) static_cast<double*>(g.lse)[head * tokens + i] = top + __builtin_log(total);
        }
    }
}

void attention_backward_float64(const AttentionBackward& g) {
    const Scratch scratch(g);
    const int64_t tokens = g.tokens(), width = g.width(), stride = g.padded_width(), between = g.heads() * width;
    const double scale = 1.0 / __builtin_sqrt(static_cast<double>(width));
    double* const q = scratch.matrix<double>(g, 0);
    double* const k = scratch.matrix<double>(g, 1);
    double* const dq = scratch.matrix<double>(g, 2);
    double* const dk = scratch.matrix<double>(g, 3);
    double* const dq_weight = scratch.matrix<double>(g, 4);
    double* const dk_weight = scratch.matrix<double>(g, 5);
    fill_intervals(g, scratch.keys);
    for (int64_t e = 0; e < width; ++e) dq_weight[e] = dk_weight[e] = 0.0;
    for (int64_t head = 0; head < g.batch() * g.heads(); ++head) {
        const int64_t b = head / g.heads(), h = head % g.heads();
        const auto target = [&](int64_t i) {
            return static_cast<double*>(g.dqkv) + ((b * tokens + i) * 3 * g.heads() + h) * width;
        };
        for (int64_t i = 0; i < tokens; ++i) {
            transform(g, g.q_weight, head_row<double>(g, b, i, 0, h), i, q + i * stride);
            transform(g, g.k_weight, head_row<double>(g, b, i, 1, h), i, k + i * stride);
            for (int64_t e = 0; e < width; ++e) dq[i * stride + e] = dk[i * stride + e] = target(i)[2 * between + e] = 0.0;
        }
        for (int64_t i = 0; i < tokens; ++i) {
            const double* const grad = static_cast<const double*>(g.grad) + b * g.grad_strides[0] + i * g.grad_strides[1] +
                                       h * g.grad_strides[2];
            const double* const out = static_cast<const double*>(g.out) + ((b * tokens + i) * g.heads() + h) * width;
            const double delta = dot(grad, out, width), lse = static_cast<const double*>(g.lse)[head * tokens + i];
            for (int64_t j = scratch.keys[i].begin; j < scratch.keys[i].end; ++j) {
                const double weight = __builtin_exp(scale * dot(q + i * stride, k + j * stride, width) - lse);
                const double score = weight * (dot(grad, head_row<double>(g, b, j, 2, h), width) - delta) * scale;
                for (int64_t e = 0; e < width; ++e) {
                    target(j)[2 * between + e] += weight * grad[e];
                    dq[i * stride + e] += score * k[j * stride + e];
                    dk[j * stride + e] += score * q[i * stride + e];
                }
            }
        }
        for (int64_t i = 0; i < tokens; ++i) {
            untransform(g, g.q_weight, head_row<double>(g, b, i, 0, h), i, dq + i * stride, dq_weight, target(i));
            untransform(g, g.k_weight, head_row<double>(g, b, i, 1, h), i, dk + i * stride, dk_weight, target(i) + between);
        }
    }
    if (!g.q_weight) return;
    with_float(g.weight_dtype, [&](auto zero) {
        using W = decltype(zero);
        for (int64_t e = 0; e < width; ++e) {
            narrow(static_cast<compute_t<W>>(dq_weight[e]), static_cast<W*>(g.dq_weight)[e]);
            narrow(static_cast<compute_t<W>>(dk_weight[e]), static_cast<W*>(g.dk_weight)[e]);
        }
    });
}

}  // namespace VITOK_ISA
}  // namespace vitok
