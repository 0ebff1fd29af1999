// norm: layer or RMS norm of rows, optionally of residual + scale * x.
//
//   s = x                      or  residual + scale * x, rounded to the dtype of x
//   y = (s - mean) * rstd * weight + bias,  rstd = 1 / sqrt(mean((s - mean)^2) + eps);  mean = 0 unless centred
//
// With g = grad_y * weight, h = (s - mean) * rstd and means over the row, the gradients are
//
//   grad_sum    = rstd * (g - [centred] mean(g) - h * mean(g * h)) + grad_s      of s and so of the residual
//   grad_x      = scale * grad_sum
//   grad_weight = sum over rows of grad_y * h,  grad_bias = of grad_y,  grad_scale = of grad_sum * x
#pragma once

#include "dtype.h"

namespace vitok {

// Rows lie a stride apart (0 repeats one row), their elements are neighbours. Absent tensors are null.
VITOK_INLINE bool norm_rows_fit(int64_t rows, int64_t width, int64_t stride) {
    return stride >= 0 && (rows <= 1 || stride <= (INT64_MAX / 8 - width) / rows);
}

static inline const char* norm_problem(DType dtype, DType parameter_dtype, int64_t rows, int64_t width) {
    if (!is_float(dtype)) return "dtype is 'uint8'; it must be a float type";
    if (parameter_dtype != dtype && (parameter_dtype != DType::float32 || dtype == DType::float64))
        return "parameter_dtype must be that of the rows or, unless that is float64, float32";
    if (rows < 0) return "rows must not be negative";
    if (width < 1) return "width must be at least 1";
    if (rows > 0 && width > INT64_MAX / 8 / rows) return "rows * width elements are beyond 64-bit addresses";
    return nullptr;
}

struct NormForward {
    const void* x;  // [rows, width]
    int64_t x_stride;
    const void* residual;  // [rows, width] or absent
    int64_t residual_stride;
    const void *scale, *weight, *bias;  // [width], each may be absent; a scale goes with a residual only
    DType dtype, parameter_dtype;       // of x and residual; of scale, weight and bias
    int64_t rows, width;
    bool centred;
    double eps;
    void* s;      // out, contiguous [rows, width], with a residual only
    void* y;      // out, contiguous [rows, width]
    void* stats;  // out, [2, rows] (mean, rstd) or, not centred, [1, rows] (rstd), float32 or float64; may be absent

    template <class Visit>
    void fields(Visit&& visit) {
        visit("x", x), visit("x_stride", x_stride), visit("residual", residual), visit("residual_stride", residual_stride);
        visit("scale", scale), visit("weight", weight), visit("bias", bias);
        visit("dtype", dtype), visit("parameter_dtype", parameter_dtype), visit("rows", rows), visit("width", width);
        visit("centred", centred), visit("eps", eps), visit("s", s), visit("y", y), visit("stats", stats);
    }

    const char* problem() const {
        if (const char* problem = norm_problem(dtype, parameter_dtype, rows, width)) return problem;
        if (!norm_rows_fit(rows, width, x_stride)) return "x_stride must not be negative nor lead beyond 64-bit addresses";
        if (!norm_rows_fit(rows, width, residual_stride))
            return "residual_stride must not be negative nor lead beyond 64-bit addresses";
        if (!(eps >= 0)) return "eps must not be negative";
        if (scale && !residual) return "scale goes with a residual only";
        if (rows > 0 && (!x || !y || (residual && !s))) return "x, y and, with a residual, s must not be null";
        return nullptr;
    }

    bool empty() const { return rows == 0; }
};

struct NormBackward {
    const void* grad_y;  // [rows, width]
    int64_t grad_y_stride;
    const void* grad_s;  // [rows, width] or absent
    int64_t grad_s_stride;
    const void* s;  // [rows, width], what was normalised
    int64_t s_stride;
    const void* x;  // [rows, width], with a scale only
    int64_t x_stride;
    const void *scale, *weight;  // [width], each may be absent
    const void* stats;           // as NormForward wrote them
    DType dtype, parameter_dtype;
    int64_t rows, width;
    bool centred;
    void* grad_sum;  // out, contiguous [rows, width]
    void* grad_x;    // out, contiguous [rows, width], with a scale only
    // Gradients of the parameters asked for, in this order, n of them. Rows are cut into equal blocks, each summed by itself.
    bool weight_grad, bias_grad, scale_grad;
    int64_t blocks;
    void* partials;  // scratch, [blocks, n, width], float32 or float64
    void* grads;     // out, [n, width], float32 or float64

    template <class Visit>
    void fields(Visit&& visit) {
        visit("grad_y", grad_y), visit("grad_y_stride", grad_y_stride), visit("grad_s", grad_s);
        visit("grad_s_stride", grad_s_stride), visit("s", s), visit("s_stride", s_stride), visit("x", x);
        visit("x_stride", x_stride), visit("scale", scale), visit("weight", weight), visit("stats", stats);
        visit("dtype", dtype), visit("parameter_dtype", parameter_dtype), visit("rows", rows), visit("width", width);
        visit("centred", centred), visit("grad_sum", grad_sum), visit("grad_x", grad_x), visit("weight_grad", weight_grad);
        visit("bias_grad", bias_grad), visit("scale_grad", scale_grad), visit("blocks", blocks);
        visit("partials", partials), visit("grads", grads);
    }

    const char* problem() const {
        if (const char* problem = norm_problem(dtype, parameter_dtype, rows, width)) return problem;
        const int64_t strides[] = {grad_y_stride, grad_s_stride, s_stride, x_stride};
        for (const int64_t stride : strides)
            if (!norm_rows_fit(rows, width, stride)) return "strides must not be negative nor lead beyond 64-bit addresses";
        if (scale_grad && !scale) return "scale_grad asks for the gradient of an absent scale";
        if (blocks < 1 || blocks > kMaxBlocks) return "blocks must be from 1 to 65535";
        if (rows > 0 && (!grad_y || !s || !stats || !grad_sum)) return "grad_y, s, stats and grad_sum must not be null";
        if (rows > 0 && scale && (!x || !grad_x)) return "with a scale, x and grad_x must not be null";
        if (rows > 0 && parameters() > 0 && (!partials || !grads)) return "partials and grads must not be null";
        return nullptr;
    }

    bool empty() const { return rows == 0; }

    int64_t parameters() const { return weight_grad + bias_grad + scale_grad; }

    static constexpr int64_t kMaxBlocks = 65535;
};

// First row of a block: the first `rows % blocks` blocks have one row more than the others.
VITOK_INLINE int64_t norm_first_row(int64_t block, int64_t rows, int64_t blocks) {
    const int64_t longer = rows % blocks;
    return block * (rows / blocks) + (block < longer ? block : longer);
}

// Calls fn(element, parameter) with zero values of the two element types.
template <class Fn>
static inline void with_norm_dtypes(DType dtype, DType parameter_dtype, Fn&& fn) {
    with_float(dtype, [&](auto element) {
        if (parameter_dtype == DType::float32) {
            if constexpr (sizeof(element) < sizeof(double)) fn(element, float{});
        } else {
            fn(element, element);
        }
    });
}

// The normalised value, and the gradient that reaches it through y.
template <class V>
VITOK_INLINE V norm_hat(V s, V mean, V rstd) {
    return (s - mean) * rstd;
}
template <class V>
VITOK_INLINE V norm_grad(V g, V hat, V rstd, V mean_g, V mean_g_hat) {
    return (g - mean_g - hat * mean_g_hat) * rstd;
}

}  // namespace vitok
