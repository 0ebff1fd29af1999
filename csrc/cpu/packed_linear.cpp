// PackedLinear of common/packed_linear.h on the CPU. Compiled once per instruction set, in the namespace VITOK_ISA; no standard
// library templates in here.
//
// A thread makes units of a block of rows in its own scratch memory and multiplies them with one panel after another: a part of
// every row with that part of all panels, so that the second cache holds both, and then the next part. Every element is summed
// by one thread, in the same order however the work is divided.
#include "../common/packed_linear.h"

#include "dispatch.h"
#include "gate_lanes.h"
#include "packed_rows.h"
#include "team.h"

namespace vitok {
namespace VITOK_ISA {
namespace {

// A tile of sums has rows of kWide vectors. Wide ones: fewest instructions, one broadcast unit serves more.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kWide = 4;
#else
constexpr int kWide = 2;
#endif
static_assert(kPackedColumns % (kWide * kLanes) == 0, "tiles divide panels");
static_assert(kPackedColumns / 2 % kLanes == 0, "vectors divide the halves of a gated panel");

// The units of a panel, which is made of `units` of its own: in `room` where they are not as they were packed.
template <class Dot>
VITOK_INLINE const typename Dot::Unit* open_panel(Dot, PackedType, const void* panel, int64_t, typename Dot::Unit*) {
    return static_cast<const typename Dot::Unit*>(panel);
}

// Calls fn(vector, where its first and its second half go) for every vector of a panel whose units give two each.
template <class Fn>
VITOK_INLINE void split_panel(const void* panel, int64_t units, Fn&& fn) {
    for (int64_t i = 0; i < units; ++i)
        for (int64_t c = 0; c < kPackedColumns; c += kLanes) {
            UnsignedLanes x;
            memcpy(&x, static_cast<const uint32_t*>(panel) + i * kPackedColumns + c, sizeof x);
            fn(x, 2 * i * kPackedColumns + c, (2 * i + 1) * kPackedColumns + c);
        }
}

VITOK_INLINE const float* open_panel(Singles, PackedType type, const void* panel, int64_t units, float* room) {
    if (type == PackedType::float32) return static_cast<const float*>(panel);
    split_panel(panel, units, [&](UnsignedLanes x, int64_t first, int64_t second) {
        const UnsignedLanes low = x << 16, high = x & 0xffff0000u;
        memcpy(room + first, &low, sizeof low), memcpy(room + second, &high, sizeof high);
    });
    return room;
}

VITOK_INLINE const uint32_t* open_panel(Words, PackedType, const void* panel, int64_t units, uint32_t* room) {
    split_panel(panel, units, [&](UnsignedLanes x, int64_t first, int64_t second) {
        const IntLanes q = reinterpret_cast<IntLanes>(x);
        const IntLanes low = (q << 24 >> 24 & 0xffff) | q << 16 >> 24 << 16, high = (q << 8 >> 24 & 0xffff) | q >> 24 << 16;
        memcpy(room + first, &low, sizeof low), memcpy(room + second, &high, sizeof high);
    });
    return room;
}

// Rows of 64 or 128 bytes that a tile will be written to, to be brought into the cache meanwhile; or none.
struct Target {
    uintptr_t row;
    int64_t stride, rows, bytes;

    VITOK_INLINE void fetch(Target& t) {
        if (t.rows <= 0) return;
        for (uintptr_t line = t.row, end = line + static_cast<uintptr_t>(t.bytes); line < end; line += 64)
            __builtin_prefetch(reinterpret_cast<const void*>(line), 1);
        t.row += static_cast<uintptr_t>(t.stride), --t.rows;
    }
};

// A part of a panel, and the tiles of sums that its products with rows give. kRows rows are of a tile, and kPart steps are taken
// through a panel at once, with as many rows of a block that the second cache holds both. To bring a panel there takes as long
// as kBringing tiles, or is hidden behind them.
template <class Dot, bool kTiles = Dot::kTiles>
class Product {
  public:
    static constexpr int kRows = 6;
    static constexpr int64_t kSummed = 256;  // products in one fp32 sum: the roundings of longer ones grow with their length
    static constexpr int64_t kPart = 3 * kSummed, kBringing = 0;
    static int64_t block(int64_t) { return 144; }

    void open(const typename Dot::Unit* panel, int64_t steps, int64_t, const int32_t* sums, typename Dot::Unit*) {
        panel_ = panel, steps_ = steps, sums_ = sums;
    }

    // The tile becomes, or if `add` is increased by, kRows rows, `stride` apart, times the panel, as fp32.
    __attribute__((noinline)) void fill(const typename Dot::Unit* rows, int64_t stride, int64_t, bool add, float* tile,
                                        Target) const {
        const int64_t step = Dot::kIntegers ? larger(steps_, 1) : kSummed;
        for (int64_t c = 0; c < kPackedColumns; c += kWide * kLanes) {
            int64_t k = 0;
            do {
                typename Dot::Sum sum[kRows][kWide];
#pragma GCC unroll 4
                for (int w = 0; w < kWide; ++w) {
                    typename Dot::Sum start{};
                    if constexpr (Dot::kIntegers) {
                        memcpy(&start, sums_ + c + w * kLanes, sizeof start);
                        start *= -Dot::kOffset;
                    }
#pragma GCC unroll 12
                    for (int r = 0; r < kRows; ++r) sum[r][w] = start;
                }
                multiply<Dot>(rows + k, stride, 1, panel_ + k * kPackedColumns + c, kPackedColumns,
                              smaller(step, steps_ - k), sum);
#pragma GCC unroll 12
                for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
                    for (int w = 0; w < kWide; ++w) {
                        float* const to = tile + r * kPackedColumns + c + w * kLanes;
                        if constexpr (Dot::kIntegers) lanes_store(to, __builtin_convertvector(sum[r][w], Lanes));
                        else lanes_store(to, add || k > 0 ? lanes_load(to) + sum[r][w] : sum[r][w]);
                    }
                k += step;
            } while (k < steps_);
        }
    }

  private:
    const typename Dot::Unit* panel_;
    int64_t steps_;
    const int32_t* sums_;
};

#if defined(VITOK_AMX)
// By AMX: in its own registers, 16 steps at a time.
template <class Dot>
class Product<Dot, true> {
  public:
    static constexpr int kRows = 2 * kTileRows;
    static constexpr int64_t kPart = 1024, kBringing = 2;
    static int64_t block(int64_t steps) {  // of a megabyte
        return smaller(kPackedRows, larger((1 << 20) / 4 / larger(steps, 1) / kRows, 1) * kRows);
    }

    // The last steps, where they do not fill a tile, go to `room` with zeros behind them. While `rows` rows are multiplied what
    // follows the panel comes into the second cache.
    void open(const uint32_t* panel, int64_t steps, int64_t rows, const int32_t*, uint32_t* room) {
        panel_ = panel, whole_ = steps / kTileUnits, end_ = nullptr;
        next_ = reinterpret_cast<uintptr_t>(panel + steps * kPackedColumns);
        lines_ = ceil_div(kTileUnits * kPackedColumns * 4 / 64, ceil_div(rows, kRows) * (kPackedColumns / (2 * kTileUnits)));
        const int64_t rest = (steps - whole_ * kTileUnits) * kPackedColumns, size = kTileUnits * kPackedColumns;
        if (rest == 0) return;
        end_ = room;
        memcpy(room, panel + whole_ * size, static_cast<size_t>(rest) * sizeof *room);
        memset(room + rest, 0, static_cast<size_t>(size - rest) * sizeof *room);
    }

    // Of `wanted` rows, which may be fewer than kRows.
    void fill(const uint32_t* rows, int64_t stride, int64_t wanted, bool add, float* tile, Target target) {
        if (wanted > kTileRows) fill_rows<2>(rows, stride, add, tile, target);
        else fill_rows<1>(rows, stride, add, tile, target);
    }

  private:
    template <int kDown>
    __attribute__((noinline)) void fill_rows(const uint32_t* rows, int64_t stride, bool add, float* tile, Target target) {
        uintptr_t next = next_;
        const auto fetch = [&, lines = lines_]() __attribute__((always_inline)) {
            for (int64_t line = 0; line < lines; ++line, next += 64)
                __builtin_prefetch(reinterpret_cast<const void*>(next), 0, 2);
            Target::fetch(target);
        };
        // So few steps that the second half of the columns finds the rows in the first cache.
        constexpr int64_t few = 12;
        const auto multiply = [&](int64_t at, const uint32_t* columns, int64_t steps, bool more) __attribute__((always_inline)) {
            for (int64_t c = 0; c < kPackedColumns; c += 2 * kTileUnits)
                multiply_tiles<Dot, kDown, 2>(rows + at * kTileUnits, stride, columns + c, kPackedColumns, steps, more, tile + c,
                                              kPackedColumns, fetch);
        };
        int64_t k = 0;
        do {
            multiply(k, panel_ + k * kTileUnits * kPackedColumns, smaller(few, whole_ - k), add || k > 0);
            k += few;
        } while (k < whole_);
        if (end_) multiply(whole_, end_, 1, true);
        next_ = next;
        if constexpr (Dot::kIntegers) {
            for (int64_t i = 0; i < kDown * kTileRows * kPackedColumns; i += kLanes)
                lanes_store(tile + i, __builtin_convertvector(lanes_bits(lanes_load(tile + i)), Lanes));
        }
    }

    const TileRegisters registers_;
    const uint32_t* panel_;
    int64_t whole_;
    const uint32_t* end_;
    uintptr_t next_;  // to be fetched, and how many lines of it in a step
    int64_t lines_;
};
#endif

// A row of a tile on its way out, all of it or its first `count` columns; absent are null.
template <int kGate, bool kWhole, class T>
VITOK_INLINE void finish_row(const float* sums, const float* scale, const float* column_scales, const float* bias,
                             const T* residual, T* to, int64_t count) {
    constexpr int64_t most = kGate ? kPackedColumns / 2 : kPackedColumns;
    const auto value = [&](int64_t c) __attribute__((always_inline)) {
        Lanes y = lanes_load(sums + c);
        if (column_scales) y = y * *scale * lanes_load(column_scales + c);
        return bias ? y + lanes_load(bias + c) : y;
    };
#pragma GCC unroll 8
    for (int64_t c = 0; c < (kWhole ? most : count); c += kLanes) {
        Lanes y = value(c);
        if constexpr (kGate > 0) y = gated<kGate == 2>(y, value(c + most));
        if (kWhole || count - c >= kLanes) {
            lanes_store(to + c, residual ? lanes_load(residual + c) + y : y);
        } else {
            lanes_store_first(to + c, residual ? lanes_load_first(residual + c, count - c) + y : y, count - c);
        }
    }
}

// A tile's first `rows` rows, which have `scales` where the weight has.
template <int kGate, class T>
void finish_tile(const PackedLinear& a, int64_t first, int64_t rows, int64_t panel, const float* tile, const float* scales) {
    constexpr int64_t most = kGate ? kPackedColumns / 2 : kPackedColumns;
    const int64_t column = panel * most, count = a.shape().width() - column;
    const float* const column_scales = a.scales ? a.scales + panel * kPackedColumns : nullptr;
    const float* const bias = a.bias ? a.bias + panel * kPackedColumns : nullptr;
    T* to = static_cast<T*>(a.out) + first * a.out_stride + column;
    const T* residual = a.residual ? static_cast<const T*>(a.residual) + first * a.residual_stride + column : nullptr;
    const int64_t residual_stride = residual ? a.residual_stride : 0;
    const auto each_row = [&](auto finish) __attribute__((always_inline)) {
        for (int64_t r = 0; r < rows; ++r, tile += kPackedColumns, ++scales, to += a.out_stride, residual += residual_stride)
            finish(tile, scales, column_scales, bias, residual, to, count);
    };
    if (count >= most) each_row(finish_row<kGate, true, T>);
    else each_row(finish_row<kGate, false, T>);
}

template <class T>
VITOK_INLINE Target target_of(const PackedLinear& a, int64_t first, int64_t rows, int64_t panel) {
    const int64_t most = a.gate ? kPackedColumns / 2 : kPackedColumns;
    const auto* const to = static_cast<const T*>(a.out) + first * a.out_stride + panel * most;
    constexpr int64_t size = sizeof(T);
    return {reinterpret_cast<uintptr_t>(to), a.out_stride * size, rows, most * size};
}

// What one thread does: groups of a tile's rows with panels.
template <class Dot, class T>
void work(const PackedLinear& a, Interval groups, Interval panels, typename Dot::Unit* scratch) {
    using Unit = typename Dot::Unit;
    constexpr int64_t kRows = Product<Dot>::kRows, kPart = Product<Dot>::kPart;
    static_assert(kPart >= kPackedPart && kRows <= kPackedTile, "scratch has room for the sums");
    const PackedShape shape = a.shape();
    const int64_t each = packed_elements(shape.type) / Dot::kElements;  // steps that a packed unit makes
    const int64_t depth = shape.units() * each, stride = packed_row_stride(depth);
    Unit* const room = scratch + kPackedRows * stride;
    float* const wide = reinterpret_cast<float*>(room + kPackedColumns * stride);
    float* const sums = wide + packed_row_stride(a.inner);
    const auto finish = a.gate == 0 ? finish_tile<0, T> : a.gate == 1 ? finish_tile<1, T> : finish_tile<2, T>;
    const int64_t part = Dot::kIntegers ? depth : smaller(kPart, depth);  // integers are small, and their sums whole
    const int64_t blocks = ceil_div(groups.end - groups.begin, Product<Dot>::block(part) / kRows);
    float scales[kPackedRows];
    Product<Dot> product;

    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t begin = groups.begin + (groups.end - groups.begin) * block / blocks;
        const int64_t count = groups.begin + (groups.end - groups.begin) * (block + 1) / blocks - begin;
        const int64_t first = begin * kRows, rows = smaller(count * kRows, a.rows - first);
        for (int64_t row = 0; row < rows; ++row)
            scales[row] = make_row<Dot, T>(a, first + row, wide, scratch + row * stride);
        memset(scratch + rows * stride, 0, static_cast<size_t>((count * kRows - rows) * stride) * sizeof *scratch);
        int64_t k = 0;
        do {
            const int64_t steps = smaller(part, depth - k);
            const bool last = k + steps == depth;
            for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
                const char* const packed = static_cast<const char*>(a.weight) + panel * shape.panel_bytes();
                product.open(open_panel(Dot{}, shape.type, packed + k / each * kPackedColumns * 4, steps / each, room), steps, rows,
                             a.sums ? a.sums + panel * kPackedColumns : nullptr, room);
                for (int64_t row = 0; row < rows; row += kRows) {
                    // Where one part is all, every tile may have the same place.
                    float* const tile = sums + (part == depth ? 0 : (panel - panels.begin) * kPackedRows + row) * kPackedColumns;
                    product.fill(scratch + row * stride + k, stride, rows - row, k > 0, tile,
                                 target_of<T>(a, first + row, last ? smaller(kRows, rows - row) : 0, panel));
                    if (last) finish(a, first + row, smaller(kRows, rows - row), panel, tile, scales + row);
                }
            }
            k += steps;
        } while (k < depth);
    }
}

template <class Dot, class T>
void forward(const PackedLinear& a) {
    const int64_t groups = ceil_div(a.rows, int64_t{Product<Dot>::kRows}), panels = a.shape().panels();
    // Threads share the groups and, where these are few, the panels: as evenly as can be. A group's own cost is that of its
    // product with a panel; a panel costs as well what it takes to bring it for a block.
    int64_t shares = 1, least = INT64_MAX;
    for (int64_t n = 1; n <= a.threads; ++n) {
        const int64_t high = ceil_div(groups, a.threads / n), wide = ceil_div(panels, n);
        const int64_t blocks = ceil_div(high * Product<Dot>::kRows, kPackedRows);
        const int64_t cost = high * (wide + 1) + blocks * wide * Product<Dot>::kBringing;
        if (cost < least) least = cost, shares = n;
    }
    const int64_t parts = a.threads / shares;
    const uintptr_t start = (reinterpret_cast<uintptr_t>(a.scratch) + 63) / 64 * 64;
#if defined(_OPENMP)
#pragma omp parallel num_threads(static_cast<int>(a.threads)) if (a.threads > 1)
#endif
    {
        const Team team = Team::current();
        auto* const scratch = reinterpret_cast<typename Dot::Unit*>(start) + team.thread * a.thread_units();
        for (int64_t item = team.thread; item < parts * shares; item += team.threads) {
            const int64_t part = item / shares, share = item % shares;
            work<Dot, T>(a, {groups * part / parts, groups * (part + 1) / parts},
                         {panels * share / shares, panels * (share + 1) / shares}, scratch);
        }
    }
}

template <class T>
void forward(const PackedLinear& a) {
#if defined(VITOK_AMX)
    if (a.weight_dtype == PackedType::int8) return forward<TileBytes, T>(a);
#elif defined(__AVX512F__)
    if (a.weight_dtype == PackedType::int8 && Quads::usable()) return forward<Quads, T>(a);
#endif
    if (a.weight_dtype == PackedType::int8) return forward<Words, T>(a);
    // A product of bf16 with other rows than of bf16 would round them.
    if constexpr (sizeof(T) == sizeof(bf16)) {
        if (a.weight_dtype == PackedType::bfloat16 && a.dtype == DType::bfloat16) return forward<TiledBfloat16, T>(a);
    }
    forward<Singles, T>(a);
}

}  // namespace

void packed_linear(const PackedLinear& a) {
    switch (a.dtype) {
        case DType::float32: return forward<float>(a);
        case DType::bfloat16: return forward<bf16>(a);
        case DType::float16: return forward<f16>(a);
        case DType::float64:
        case DType::uint8: return;
    }
}

}  // namespace VITOK_ISA
}  // namespace vitok
