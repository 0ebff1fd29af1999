// A line of pixels out of a clip of any strides.
#pragma once

#include "../common/formulas.h"

namespace vitok {
namespace VITOK_ISA {
namespace {

// An element as it is, or widened.
template <class T>
VITOK_INLINE void copy_element(T from, T& to) {
    to = from;
}
template <class T, class S>
VITOK_INLINE void copy_element(T from, S& to) {
    to = widen(from);
}

// count pixels of one line as r g b r g b ...
template <class T, class S>
VITOK_INLINE void interleave(const T* from, int64_t stride_x, int64_t stride_c, S* __restrict to, int64_t count) {
    if (stride_x == 1) {  // three planes: this form is vectorised
        const T* __restrict red = from;
        const T* __restrict green = from + stride_c;
        const T* __restrict blue = from + 2 * stride_c;
        for (int64_t x = 0; x < count; ++x) {
            copy_element(red[x], to[3 * x]);
            copy_element(green[x], to[3 * x + 1]);
            copy_element(blue[x], to[3 * x + 2]);
        }
    } else {
        for (int64_t x = 0; x < count; ++x)
            for (int64_t ch = 0; ch < 3; ++ch) copy_element(from[x * stride_x + ch * stride_c], to[3 * x + ch]);
    }
}

}  // namespace
}  // namespace VITOK_ISA
}  // namespace vitok
