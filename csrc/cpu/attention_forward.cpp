// The forward of common/attention.h on the CPU: blocked, with running maxima and sums, memory linear in the length.
//
// Heads are taken `slots` at a time. First all threads pack their keys and values: k is normalised, rotated and transposed
// to panels [depth][kPanel], v widened (or, with bf16 dot products, interleaved by pairs of keys). Then all threads share
// the blocks of queries. Both products run through the same micro-kernel; a block of scores never leaves the first-level cache.
#include "attention_rows.h"
#include "attention_work.h"

namespace vitok {
namespace VITOK_ISA {
namespace {

constexpr float kLowest = -0x1.fffffep127f, kLn2 = 0x1.62e43p-1f;

// How the work is cut: queries of a work item, and keys between two updates of the running maxima.
template <class Dot>
struct Blocks {
    static constexpr int kRows = kRowsOf<Dot>;
    static constexpr int64_t kQueries = Dot::kTiles ? 64 : 48;
    static constexpr int64_t kKeys = Dot::kTiles ? 288 : 384;  // a block of scores is 39 KB or 19 KB
    static constexpr int64_t kScoreStride = kKeys + 16;
    static constexpr int kNumbers = (kRows + kLanes - 1) / kLanes * kLanes;  // one a row, in whole vectors
    static_assert(kKeys % kPanel == 0 && kQueries % kRows == 0, "blocks divide evenly");
};

// The packed keys and values of a head.
template <class Dot>
struct Head {
    typename Dot::Unit* keys;    // [panel][depth][kPanel]
    typename Dot::Unit* values;  // [token / kElements][padded width]
};

// Running state of a tile's queries: the largest raw score, the sum of weights lane by lane, and which keys are seen.
template <class Dot>
struct Rows {
    float top[Blocks<Dot>::kNumbers];
    Lanes total[Blocks<Dot>::kRows];
    Interval keys[Blocks<Dot>::kRows];
};

// v of one panel's keys, zeros past the end.
template <class Dot, class T>
void pack_values(const AttentionForward& g, int64_t b, int64_t h, int64_t first, typename Dot::Unit* to) {
    const int64_t stride = g.padded_width();
    if constexpr (Dot::kElements == 2) {  // of bf16, as they are
        const auto row = [&](int64_t token) { return token < g.tokens() ? next_head_row<T>(g, b, token, 2, h) : nullptr; };
        for (int64_t token = first; token < first + kPanel; token += 2)
            Dot::join_rows(row(token), row(token + 1), g.width(), to + token / 2 * stride);
    } else {
        for (int64_t token = first; token < first + kPanel; ++token) {
            if (token < g.tokens()) {
                widen_row(next_head_row<T>(g, b, token, 2, h), g.width(), to + token * stride);
            } else {
                zero_row(g.width(), to + token * stride);
            }
        }
    }
}

// Raw scores of a tile's queries with the keys from `first` to `last`, both panel-aligned, and each row's largest where sums are
// made of vectors.
template <class Dot>
VITOK_INLINE void score(const typename Dot::Unit* queries, const Head<Dot>& head, int64_t depth, int64_t first, int64_t last,
                        float* scores, Lanes (&largest)[Blocks<Dot>::kRows]) {
    constexpr int64_t kScoreStride = Blocks<Dot>::kScoreStride;
    for (Lanes& row : largest) row = lanes_set(kLowest);
    product<Dot>(queries, head.keys + first * depth, depth, last - first, scores, kScoreStride,
                 [&](int r, int64_t column, Lanes sum) __attribute__((always_inline)) {
                     if constexpr (Dot::kTiles) return;  // they have been stored
                     lanes_store(scores + r * kScoreStride + column, sum);
                     largest[r] = lanes_max(sum, largest[r]);
                 });
}

// Takes out the keys that a row does not see.
template <class Dot>
__attribute__((noinline)) void mask(const Rows<Dot>& rows, int64_t first, int64_t last, float* scores) {
    const auto clear = [](float* from, float* to) {
        for (; to - from >= kLanes; from += kLanes) lanes_store(from, lanes_set(-__builtin_inff()));
        for (; from < to; ++from) *from = -__builtin_inff();
    };
    for (int r = 0; r < Blocks<Dot>::kRows; ++r) {
        float* const row = scores + r * Blocks<Dot>::kScoreStride;
        const int64_t begin = smaller(larger(rows.keys[r].begin, first), last) - first;
        const int64_t end = smaller(larger(rows.keys[r].end, first + begin), last) - first;
        clear(row, row + begin);
        clear(row + end, row + last - first);
    }
}

// The largest of each row's n scores.
template <class Dot>
VITOK_INLINE void find_largest(const float* scores, int64_t n, Lanes (&largest)[Blocks<Dot>::kRows]) {
    for (int r = 0; r < Blocks<Dot>::kRows; ++r) {
        const float* const row = scores + r * Blocks<Dot>::kScoreStride;
        Lanes even = lanes_set(kLowest), odd = even;
        for (int64_t j = 0; j < n; j += 2 * kLanes) {
            even = lanes_max(lanes_load(row + j), even);
            odd = lanes_max(lanes_load(row + j + kLanes), odd);
        }
        largest[r] = lanes_max(even, odd);
    }
}

// Scores to weights 2^(scale (score - largest so far)); `correction` brings what was summed so far to the new maximum.
template <class Dot>
VITOK_INLINE void soften(Rows<Dot>& rows, float scale, int64_t n, float* scores, const Lanes (&largest)[Blocks<Dot>::kRows],
                         float (&correction)[Blocks<Dot>::kNumbers]) {
    constexpr int kRows = Blocks<Dot>::kRows;
    const Lanes factor = lanes_set(scale);
    float top[Blocks<Dot>::kNumbers] = {};
    for (int r = 0; r < kRows; ++r) {
        const float found = largest_lane(largest[r]);
        top[r] = found > rows.top[r] ? found : rows.top[r];
    }
    for (int r = 0; r < kRows; r += kLanes) {
        lanes_store(correction + r, exp2_weight((lanes_load(rows.top + r) - lanes_load(top + r)) * factor));
        lanes_store(rows.top + r, lanes_load(top + r));
    }
    for (int r = 0; r < kRows; ++r) {
        const Lanes largest_score = lanes_set(top[r]);  // taken off first, so that its own weight is 1 to the last bit
        Lanes total = lanes_set(0.0f);
        float* const row = scores + r * Blocks<Dot>::kScoreStride;
#pragma GCC unroll 2
        for (int64_t j = 0; j < n; j += Dot::kElements * kLanes) {
            const Lanes low = exp2_weight((lanes_load(row + j) - largest_score) * factor);
            total += low;
            if constexpr (Dot::kElements == 1) {
                lanes_store(row + j, low);
            } else {
#if defined(VITOK_BF16_DOT)
                const Lanes high = exp2_weight((lanes_load(row + j + kLanes) - largest_score) * factor);
                total += high;
                _mm512_storeu_si512(row + j / 2, bf16_round(low, high));  // behind what is still to be read
#endif
            }
        }
        rows.total[r] = lanes_fma(rows.total[r], lanes_set(correction[r]), total);
    }
}

// Queries start .. start + kQueries - 1 of one head.
template <class Dot, class T>
void attend(const AttentionForward& g, const Transform& transform, const Interval* seen, const Head<Dot>& head, int64_t b,
            int64_t h, int64_t start) {
    using Unit = typename Dot::Unit;
    using B = Blocks<Dot>;
    constexpr int kRows = B::kRows;
    constexpr int64_t kQueries = B::kQueries, kKeys = B::kKeys;
    alignas(64) Unit queries[kQueries * kRowStride];
    alignas(64) float out[kQueries * kRowStride];
    alignas(64) float scores[kRows * B::kScoreStride];
    alignas(64) float wide[kRowStride];
    Rows<Dot> rows[kQueries / kRows];
    const int64_t tokens = g.tokens(), width = g.width(), stride = g.padded_width(), depth = depth_of<Dot>(width);
    const int64_t stop = smaller(start + kQueries, tokens);
    const int64_t tiles = ceil_div(stop - start, kRows);
    const float scale = kLog2e / __builtin_sqrtf(static_cast<float>(width));
    const auto target_row = [&](int64_t i) { return static_cast<T*>(g.out) + ((b * tokens + i) * g.heads() + h) * width; };
    for (int64_t i = start; i < stop; ++i)  // what will be written comes meanwhile
        for (int64_t e = 0; e < width; e += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(target_row(i) + e, 1);

    for (int64_t i = 0; i < tiles * kRows; ++i) {
        Rows<Dot>& tile = rows[i / kRows];
        if (i % kRows == 0)
            for (float& top : tile.top) top = kLowest;
        tile.total[i % kRows] = lanes_set(0.0f);
        tile.keys[i % kRows] = seen[smaller(start + i, stop - 1)];  // rows past the end repeat the last one's interval
        if (start + i < stop) {
            transform(next_head_row<T>(g, b, start + i, 0, h), start + i, wide);
        } else {
            zero_row(width, wide);
        }
        Dot::narrow_row(wide, stride, queries + i * kRowStride);
        for (int64_t unit = stride / Dot::kElements; unit < depth; ++unit) queries[i * kRowStride + unit] = 0;
        zero_row(width, out + i * kRowStride);
    }

    const int64_t end = seen[stop - 1].end;
    for (int64_t block = round_down(seen[start].begin, kPanel); block < end; block += kKeys) {
        for (int64_t t = 0; t < tiles; ++t) {
            Rows<Dot>& tile = rows[t];
            const int64_t first = larger(block, round_down(tile.keys[0].begin, kPanel));
            const int64_t last = smaller(block + kKeys, ceil_div(tile.keys[kRows - 1].end, kPanel) * kPanel);
            if (first >= last) continue;
            Lanes largest[kRows];
            float correction[B::kNumbers];
            score<Dot>(queries + t * kRows * kRowStride, head, depth, first, last, scores, largest);
            const bool masked = first < tile.keys[kRows - 1].begin || last > tile.keys[0].end;
            if (masked) mask(tile, first, last, scores);
            if (Dot::kTiles || masked) find_largest<Dot>(scores, last - first, largest);
            soften<Dot>(tile, scale, last - first, scores, largest, correction);
            accumulate<Dot>(reinterpret_cast<const Unit*>(scores), B::kScoreStride, 1,
                            head.values + first / Dot::kElements * stride, stride, (last - first) / Dot::kElements,
                            out + t * kRows * kRowStride, kRowStride,
                            [&](int r, Lanes sum) __attribute__((always_inline)) { return sum * lanes_set(correction[r]); });
        }
    }

    for (int64_t i = start; i < stop; ++i) {
        const Rows<Dot>& tile = rows[(i - start) / kRows];
        const float total = lanes_sum(tile.total[(i - start) % kRows]);
        const float top = tile.top[(i - start) % kRows];
        const Lanes inverse = lanes_set(total == 0.0f ? 0.0f : 1.0f / total);
        float* const row = out + (i - start) * kRowStride;
        for (int64_t e = 0; e < width; e += kLanes) lanes_store(row + e, lanes_load(row + e) * inverse);
        narrow_row(row, width, target_row(i));
        if (g.lse)
            static_cast<float*>(g.lse)[(b * g.heads() + h) * tokens + i] =
                total == 0.0f ? -__builtin_inff() : top * scale * kLn2 + __builtin_logf(total);
    }
}

template <class Dot, class T>
void forward(const AttentionForward& g) {
    using Unit = typename Dot::Unit;
    constexpr int64_t kQueries = Blocks<Dot>::kQueries;
    const Scratch scratch(g);
    const int64_t tokens = g.tokens(), heads = g.batch() * g.heads(), slots = smaller(g.slots, heads);
    const int64_t panels = ceil_div(tokens, kPanel), blocks = ceil_div(tokens, kQueries);
    fill_intervals(g, scratch.keys);
    // The work of a block of queries, in keys; the same for every head.
    const auto cost = [&](int64_t block) {
        const int64_t last = smaller((block + 1) * kQueries, tokens) - 1;
        return scratch.keys[last].end - scratch.keys[block * kQueries].begin + kPanel;
    };
    int64_t head_cost = 0;
    for (int64_t block = 0; block < blocks; ++block) head_cost += cost(block);
    [[maybe_unused]] const bool parallel =
        heads * blocks > 1 && heads * head_cost * g.width() >= kParallelProducts / kQueries;

#if defined(_OPENMP)
#pragma omp parallel if (parallel)
#endif
    {
        const Team team = Team::current();
        [[maybe_unused]] const Registers<Dot::kTiles> registers;
        const Transform transform_q(g, g.q_weight), transform_k(g, g.k_weight);
        const auto head_of = [&](int64_t slot) {
            return Head<Dot>{scratch.matrix<Unit>(g, 2 * slot), scratch.matrix<Unit>(g, 2 * slot + 1)};
        };
        for (int64_t wave = 0; wave < heads; wave += slots) {
            const int64_t count = smaller(slots, heads - wave);
            const Interval pieces = team.share(count * panels);
            for (int64_t piece = pieces.begin; piece < pieces.end; ++piece) {
                const int64_t slot = piece / panels, first = piece % panels * kPanel;
                const int64_t b = (wave + slot) / g.heads(), h = (wave + slot) % g.heads();
                const Head<Dot> head = head_of(slot);
                const int64_t depth = depth_of<Dot>(g.width());
                pack_panel<Dot>(first, tokens, g.width(), depth, head.keys + first * depth, nullptr, [&](int64_t token, float* to) {
                    transform_k(next_head_row<T>(g, b, token, 1, h), token, to);
                });
                pack_values<Dot, T>(g, b, h, first, head.values);
            }
            team.barrier();
            // Blocks in order of cost so far: a thread takes those that begin within its part of the sum.
            const int64_t total = count * head_cost;
            const int64_t from = total / team.threads * team.thread;
            const int64_t to = team.thread + 1 == team.threads ? total : total / team.threads * (team.thread + 1);
            for (int64_t slot = from / head_cost; slot < count && slot * head_cost < to; ++slot) {
                int64_t before = slot * head_cost;
                for (int64_t block = 0; block < blocks; before += cost(block++)) {
                    if (before < from || before >= to) continue;
                    attend<Dot, T>(g, transform_q, scratch.keys, head_of(slot), (wave + slot) / g.heads(),
                                   (wave + slot) % g.heads(), block * kQueries);
                }
            }
            team.barrier();
        }
    }
}

}  // namespace

void attention_forward(const AttentionForward& g) {
    switch (g.dtype) {
        case DType::float16: return forward<Singles, f16>(g);
        case DType::float32: return forward<Singles, float>(g);
        case DType::bfloat16: return forward<TiledBfloat16, bf16>(g);
        case DType::float64: return attention_forward_float64(g);
        case DType::uint8: return;
    }
}

}  // namespace VITOK_ISA
}  // namespace vitok
