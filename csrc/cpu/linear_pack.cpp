// LinearPack of common/packed_linear.h on the CPU: once a weight, so it is plain. Compiled once per instruction set, in the
// namespace VITOK_ISA; no standard library templates in here.
#include "../common/packed_linear.h"
#include "dispatch.h"

namespace vitok {
namespace VITOK_ISA {
namespace {

// The row of the weight at a place of a panel, or -1 past the end.
VITOK_INLINE int64_t column_at(const PackedShape& shape, int64_t panel, int64_t place) {
    constexpr int64_t half = kPackedColumns / 2;
    const int64_t first = panel * (shape.gated ? half : kPackedColumns);
    const int64_t column = first + (shape.gated ? place % half : place);
    if (column >= shape.width()) return -1;
    return shape.gated && place >= half ? shape.width() + column : column;
}

// To the nearest integer of at most 2^22.
VITOK_INLINE int32_t nearest(float x) { return static_cast<int32_t>(float_bits(x + 0x1.8p23f) - 0x4b400000u); }

template <PackedType kType, class T>
void pack_column(const LinearPack& a, int64_t panel, int64_t place) {
    const PackedShape shape = a.shape();
    constexpr int64_t elements = packed_elements(kType);
    const int64_t column = column_at(shape, panel, place);
    const T* const from = static_cast<const T*>(a.weight) + (column < 0 ? 0 : column * a.weight_strides[0]);
    const int64_t inner = column < 0 ? 0 : a.inner;  // past the end there are zeros alone
    char* const to = static_cast<char*>(a.packed) + panel * shape.panel_bytes() + place * 4;
    const auto weight = [&](int64_t i) { return static_cast<float>(widen(from[i * a.weight_strides[1]])); };
    const auto at = [&](int64_t i) {  // the address of an element
        return to + i / elements * (kPackedColumns * 4) + i % elements * (4 / elements);
    };
    const int64_t place_in_row = panel * kPackedColumns + place;

    float factor = 0;
    if constexpr (kType == PackedType::int8) {
        uint32_t largest = 0;  // as bits, in which NaN is larger than every number
        for (int64_t i = 0; i < inner; ++i) {
            const uint32_t size = float_bits(weight(i)) & 0x7fffffffu;
            largest = size > largest ? size : largest;
        }
        const float top = bits_float(largest);
        a.scales[place_in_row] = top / 127.0f;
        factor = top > 0x1p-119f ? 127.0f / top : 0.0f;  // of smaller ones it would be infinite
    }
    int32_t sum = 0;
    for (int64_t i = 0; i < shape.units() * elements; ++i) {
        const float value = i < inner ? weight(i) : 0.0f;
        if constexpr (kType == PackedType::float32) {
            memcpy(at(i), &value, 4);
        } else if constexpr (kType == PackedType::bfloat16) {
            bf16 rounded;
            narrow(value, rounded);
            memcpy(at(i), &rounded, 2);
        } else {
            const int8_t q = static_cast<int8_t>(nearest(value * factor));
            memcpy(at(i), &q, 1);
            sum += q;
        }
    }
    if constexpr (kType == PackedType::int8) a.sums[place_in_row] = sum;
    if (a.bias) {
        with_float(a.bias_dtype, [&](auto element) {
            const auto* const bias = static_cast<const decltype(element)*>(a.bias);
            a.packed_bias[place_in_row] = column < 0 ? 0.0f : static_cast<float>(widen(bias[column]));
        });
    }
}

template <PackedType kType>
void pack(const LinearPack& a) {
    with_float(a.dtype, [&](auto element) {
        const int64_t panels = a.shape().panels();
#if defined(_OPENMP)
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(a.threads)) if (a.threads > 1)
#endif
        for (int64_t panel = 0; panel < panels; ++panel)
            for (int64_t place = 0; place < kPackedColumns; ++place) pack_column<kType, decltype(element)>(a, panel, place);
    });
}

}  // namespace

void linear_pack(const LinearPack& a) {
    switch (a.shape().type) {
        case PackedType::float32: return pack<PackedType::float32>(a);
        case PackedType::bfloat16: return pack<PackedType::bfloat16>(a);
        case PackedType::int8: return pack<PackedType::int8>(a);
    }
}

}  // namespace VITOK_ISA
}  // namespace vitok
