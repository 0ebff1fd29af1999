// Element types of the tensors that kernels are given.
#pragma once

#include "formulas.h"

namespace vitok {

enum class DType { uint8, float16, bfloat16, float32, float64 };

constexpr bool is_float(DType dtype) { return dtype != DType::uint8; }

// Calls fn with a zero value of the C++ type of a floating dtype; does nothing for uint8.
template <class Fn>
static inline void with_float(DType dtype, Fn&& fn) {
    switch (dtype) {
        case DType::float16: fn(f16{}); break;
        case DType::bfloat16: fn(bf16{}); break;
        case DType::float32: fn(float{}); break;
        case DType::float64: fn(double{}); break;
        case DType::uint8: break;
    }
}

// What a kernel computes in: fp32, or fp64 where the elements are fp64.
template <class T>
struct Compute {
    using type = float;
};
template <>
struct Compute<double> {
    using type = double;
};
template <class T>
using compute_t = typename Compute<T>::type;

}  // namespace vitok
