// packed_linear: rows times a weight that was packed once, with what stands before and behind the product.
//
//   y[r, j]   = sum_i norm(x)[r, i] weight[j, i] + bias[j]       norm: none, or of each row, without parameters
//   out[r, j] = residual[r, j] + y[r, j]                         or, gated with h = columns / 2,
//   out[r, j] = residual[r, j] + act(y[r, j]) y[r, h + j]
//
// Sums are fp32, rounded once to the dtype of x. The packed weight has the same bytes for every instruction set: panels of 64
// columns, [panels][ceil(inner / e)][64][e] with e = 4 / size of an element, zeros past the ends. Gated, panel p has columns
// 32 p .. of the gate and then 32 p .. of the other half. bias, scales and sums follow the order of the packed columns.
//
// int8: weight = q scale with the largest of a column at 127. Rows of (normalised) x are quantised likewise as they are read,
// the sums of products are exact integers, and y = sum * scale of the row * scale of the column + bias. `sums` holds the sum of
// each column's q: instructions that take one operand unsigned get q + 128 of a row and give back 128 * sums.
#pragma once

#include "dtype.h"

namespace vitok {

enum class PackedType { float32, bfloat16, int8 };

constexpr int64_t kPackedColumns = 64;  // of a panel
constexpr int64_t kPackedRows = 512;    // of x that a thread holds at once, at the most
constexpr int64_t kPackedTile = 32;     // of them that are multiplied at once, at the most
constexpr int64_t kPackedPart = 768;    // elements of a row that are multiplied at once, at the least

constexpr int64_t packed_elements(PackedType type) {
    return type == PackedType::float32 ? 1 : type == PackedType::bfloat16 ? 2 : 4;
}

// Rows of the scratch memory, in units of 4 bytes: whole vectors of fp32, an odd number of cache lines apart, so that a column
// of them does not fall into one cache set.
constexpr int64_t packed_row_stride(int64_t units) { return (units + 63) / 64 * 64 + 16; }

// Sizes below this and their products by a stride or by each other, in bytes, stay in 64 bits.
constexpr int64_t kPackedMost = int64_t(1) << 56;
VITOK_INLINE bool packed_fits(int64_t count, int64_t stride) { return count <= 0 || stride <= kPackedMost / count; }

struct PackedShape {
    int64_t columns, inner;  // rows of the weight, and their length
    bool gated;
    PackedType type;

    int64_t width() const { return gated ? columns / 2 : columns; }  // of the result
    int64_t panels() const { return ceil_div(width(), gated ? kPackedColumns / 2 : kPackedColumns); }
    int64_t units() const { return ceil_div(inner, packed_elements(type)); }
    int64_t panel_bytes() const { return units() * kPackedColumns * 4; }
    int64_t bytes() const { return panels() * panel_bytes(); }

    const char* problem() const {
        if (columns < 0 || inner < 0) return "columns and inner must not be negative";
        if (gated && columns % 2) return "columns must be even where there is a gate";
        if (columns > kPackedMost / 64 || inner > kPackedMost / 64 || !packed_fits(columns + 64, 4 * (inner + 64)))
            return "columns x inner exceeds 2^54 elements";
        // 127 * 127 * inner must be an int32.
        if (type == PackedType::int8 && inner > 1 << 17) return "inner must be at most 131072 for int8";
        return nullptr;
    }
};

struct LinearPack {
    const void* weight;  // [columns, inner] by strides
    DType dtype;
    int64_t columns, inner;
    int64_t weight_strides[2];
    const void* bias;  // [columns], neighbours, or null
    DType bias_dtype;
    bool gated;
    PackedType packed_dtype;
    void* packed;  // out
    int64_t packed_bytes;
    float* packed_bias;  // out, with a bias only
    float* scales;       // out, with int8 only
    int32_t* sums;       // out, with int8 only
    int64_t threads;

    template <class Visit>
    void fields(Visit&& visit) {
        visit("weight", weight), visit("dtype", dtype), visit("columns", columns), visit("inner", inner);
        visit("weight_strides", weight_strides), visit("bias", bias), visit("bias_dtype", bias_dtype);
        visit("gated", gated), visit("packed_dtype", packed_dtype), visit("packed", packed);
        visit("packed_bytes", packed_bytes), visit("packed_bias", packed_bias), visit("scales", scales);
        visit("sums", sums), visit("threads", threads);
    }

    PackedShape shape() const { return {columns, inner, gated, packed_dtype}; }

    const char* problem() const {
        if (!is_float(dtype) || !is_float(bias_dtype)) return "dtype and bias_dtype must be float types";
        if (const char* wrong = shape().problem()) return wrong;
        if (threads < 1 || threads > 4096) return "threads must be from 1 to 4096";
        if (weight_strides[0] < 0 || weight_strides[1] < 0) return "weight_strides must not be negative";
        if (!packed_fits(columns, weight_strides[0]) || !packed_fits(inner, weight_strides[1]))
            return "weight_strides lead beyond 64-bit addresses";
        if (empty()) return nullptr;
        if (inner > 0 && (!weight || !packed)) return "weight and packed must not be null";
        if (packed_bytes < shape().bytes()) return "packed_bytes is less than the packed weight has";
        if ((bias == nullptr) != (packed_bias == nullptr)) return "packed_bias goes with a bias";
        const bool integers = packed_dtype == PackedType::int8;
        if ((scales != nullptr) != integers || (sums != nullptr) != integers) return "scales and sums go with int8";
        return nullptr;
    }

    bool empty() const { return columns == 0; }
};

struct PackedLinear {
    const void* x;  // rows of `inner` neighbours, x_stride apart
    DType dtype;    // of x, residual and out
    int64_t rows, inner, columns, x_stride;
    int64_t norm;  // 0: none, 1: RMS, 2: layer
    double eps;
    const void* weight;  // as LinearPack wrote it, with bias, scales and sums
    PackedType weight_dtype;
    const float* bias;
    const float* scales;
    const int32_t* sums;
    int64_t gate;          // 0: none, 1: silu, 2: gelu
    const void* residual;  // rows of neighbours, or null
    int64_t residual_stride;
    void* out;  // rows of neighbours; it may be the residual itself, element for element
    int64_t out_stride;
    void* scratch;
    int64_t scratch_bytes, threads;

    template <class Visit>
    void fields(Visit&& visit) {
        visit("x", x), visit("dtype", dtype), visit("rows", rows), visit("inner", inner), visit("columns", columns);
        visit("x_stride", x_stride), visit("norm", norm), visit("eps", eps), visit("weight", weight);
        visit("weight_dtype", weight_dtype), visit("bias", bias), visit("scales", scales), visit("sums", sums);
        visit("gate", gate), visit("residual", residual), visit("residual_stride", residual_stride), visit("out", out);
        visit("out_stride", out_stride), visit("scratch", scratch), visit("scratch_bytes", scratch_bytes);
        visit("threads", threads);
    }

    PackedShape shape() const { return {columns, inner, gate != 0, weight_dtype}; }

    // Units of 4 bytes that a thread needs: its rows, one that is on its way, a panel of wider elements, and its sums, of a tile
    // or, where rows are multiplied in parts, of all.
    int64_t thread_units() const {
        const bool whole = weight_dtype == PackedType::int8 || inner <= kPackedPart;
        const int64_t sums = whole ? kPackedTile * kPackedColumns : kPackedRows * kPackedColumns * shape().panels();
        return (kPackedRows + 1 + kPackedColumns) * packed_row_stride(inner) + sums;
    }

    const char* problem() const {
        if (!is_float(dtype) || dtype == DType::float64) return "dtype must be float32, bfloat16 or float16";
        if (rows < 0) return "rows must not be negative";
        if (norm < 0 || norm > 2) return "norm must be 0, 1 or 2";
        if (gate < 0 || gate > 2) return "gate must be 0, 1 or 2";
        if (!(eps >= 0)) return "eps must not be negative";
        if (const char* wrong = shape().problem()) return wrong;
        if (threads < 1 || threads > 4096) return "threads must be from 1 to 4096";
        if (x_stride < 0 || residual_stride < 0 || out_stride < 0) return "strides must not be negative";
        if (rows > kPackedMost / 64 || !packed_fits(rows, x_stride + inner) || !packed_fits(rows, residual_stride + columns) ||
            !packed_fits(rows, out_stride + columns))
            return "rows and strides lead beyond 64-bit addresses";
        if (empty()) return nullptr;
        if (rows > 1 && out_stride < shape().width()) return "out_stride must be at least a row of out";
        if (inner > 0 && (!x || !weight)) return "x and weight must not be null";
        if (!out || !scratch) return "out and scratch must not be null";
        const bool integers = weight_dtype == PackedType::int8;
        if ((scales != nullptr) != integers || (sums != nullptr) != integers) return "scales and sums go with int8";
        if (scratch_bytes / threads < 4 * thread_units() + 64) return "scratch_bytes is less than these sizes and threads need";
        return nullptr;
    }

    bool empty() const { return rows == 0 || shape().width() == 0; }
};

}  // namespace vitok
