// The backward of common/attention.h on the CPU. With the weights p recomputed from lse, and delta[i] = grad[i] . out[i]:
//
//   dv[j] = sum_i p[i, j] grad[i]        ds[i, j] = p[i, j] (grad[i] . v[j] - delta[i]) / sqrt(D)
//   dq[i] = sum_j ds[i, j] k[j]          dk[j]    = sum_i ds[i, j] q[i]
//
// then back through rotation and norm. Blocks of p and ds stay in the second-level cache and feed three products each way.
// With bf16 dot products all five sum over pairs: of channels towards p and ds, of keys towards dq, of queries towards dk and
// dv. Where the pairs are of tokens, their two rows are joined to one row of units.
//
// Enough heads for all threads: a thread takes whole heads, and a pair of blocks gives dq, dk and dv at once. Else threads
// share the blocks of keys for dk and dv, then the blocks of queries for dq, and p and ds are computed twice. Sums run in
// the same order either way, so the bits do not depend on the number of threads.
#include "attention_rows.h"
#include "attention_work.h"

namespace vitok {
namespace VITOK_ISA {
namespace {

constexpr int64_t kQueries = 96, kKeys = 192;  // of a pair of blocks
constexpr int64_t kBlockStride = kKeys + 16;
constexpr float kHighest = 0x1.fffffep127f;

constexpr int64_t common_multiple(int64_t a, int64_t b) {
    int64_t multiple = a;
    while (multiple % b != 0) multiple += a;
    return multiple;
}
static_assert(kTokenPadding % kKeys == 0 && kTokenPadding % kQueries == 0, "blocks divide evenly");

// A head's matrices in the scratch.
template <class Dot>
struct Head {
    using Unit = typename Dot::Unit;
    Unit *key_panels, *value_panels;          // [panel][width / kElements][kPanel]
    Unit *q, *grad;                           // [token][padded width / kElements]
    Unit *k_joined, *q_joined, *grad_joined;  // [token / kElements][padded width]
    float *dq, *dk, *dv;                      // [token][padded width]
    float *lse, *delta;                       // [padded tokens]; lse to base 2
};

// What a pair of blocks broadcasts: copies of q and grad, and p and ds with kElements queries joined. p and ds arise in
// fp32, a tile of kRows queries at a time: in their place where units are fp32, else in `tiles`.
template <class Dot>
struct Blocks {
    using Unit = typename Dot::Unit;
    static constexpr int kRows = kRowsOf<Dot>;
    // Ranges of keys end at multiples of this: whole panels, and whole rows of sums.
    static constexpr int64_t kStep = common_multiple(kPanel, kRows);
    static_assert(kKeys % kStep == 0 && kQueries % kRows == 0, "tiles divide blocks evenly");
    static_assert(kRows % Dot::kElements == 0, "no pair of queries lies in two tiles");
    alignas(64) Unit q[kQueries * kRowStride];
    alignas(64) Unit grad[kQueries * kRowStride];
    alignas(64) Unit weights[kQueries / Dot::kElements * kBlockStride];  // p
    alignas(64) Unit scores[kQueries / Dot::kElements * kBlockStride];   // ds
    alignas(64) float tiles[2][Dot::kElements == 1 ? 1 : kRows * kBlockStride];
};

// out[kRows][width] += a . b. a lies in a block of p or ds, whose columns are its rows when Turned.
template <class Dot, bool Turned>
__attribute__((noinline)) void add_product(const typename Dot::Unit* a, const typename Dot::Unit* b, int64_t depth,
                                           int64_t stride, float* out) {
    const auto add = [&](const typename Dot::Unit* rows, int64_t row, int64_t step) __attribute__((always_inline)) {
        accumulate<Dot>(rows, row, step, b, stride, depth, out, stride, [](int, Lanes sum) { return sum; });
    };
    if constexpr (!Turned) {
        add(a, kBlockStride, 1);
    } else if constexpr (!Dot::kTiles) {
        add(a, 1, kBlockStride);
    } else {  // AMX reads rows
        constexpr int64_t between = kQueries / Dot::kElements + 16;
        alignas(64) typename Dot::Unit rows[kRowsOf<Dot> * between];
        for (int64_t k = 0; k < depth; k += kLanes)
            for (int64_t r = 0; r < kRowsOf<Dot>; r += kLanes) {
                Lanes x[kLanes];
                for (int i = 0; i < kLanes; ++i)
                    x[i] = lanes_load(reinterpret_cast<const float*>(a + (k + i) * kBlockStride + r));
                turn(x);
                for (int i = 0; i < kLanes; ++i) lanes_store(reinterpret_cast<float*>(rows + (r + i) * between + k), x[i]);
            }
        add(rows, between, 1);
    }
}

// Queries start .. start + kQueries - 1 with keys block .. block + kKeys - 1: adds to dq, or to dk and dv, or to all three.
template <class Dot>
void pair(const AttentionBackward& g, const Interval* seen, const Head<Dot>& head, int64_t start, int64_t block, bool want_q,
          bool want_kv, Blocks<Dot>& local) {
    using Unit = typename Dot::Unit;
    constexpr int64_t each = Dot::kElements, kRows = Blocks<Dot>::kRows, kStep = Blocks<Dot>::kStep;
    const int64_t depth = depth_of<Dot>(g.width()), stride = g.padded_width(), units = stride / each;
    const int64_t stop = smaller(start + kQueries, g.tokens()), tiles = ceil_div(stop - start, kRows);
    const int64_t first = larger(block, round_down(seen[start].begin, kStep));
    const int64_t last = smaller(block + kKeys, ceil_div(seen[stop - 1].end, kStep) * kStep);
    if (first >= last) return;
    const float root = 1.0f / __builtin_sqrtf(static_cast<float>(g.width()));
    const Lanes scale = lanes_set(root), scale_log2 = lanes_set(root * kLog2e);
    for (int64_t i = 0; i < tiles * kRows; ++i) {
        memcpy(local.q + i * kRowStride, head.q + (start + i) * units, static_cast<size_t>(units) * sizeof(Unit));
        memcpy(local.grad + i * kRowStride, head.grad + (start + i) * units, static_cast<size_t>(units) * sizeof(Unit));
        for (int64_t unit = units; unit < depth; ++unit) local.q[i * kRowStride + unit] = local.grad[i * kRowStride + unit] = 0;
    }
    for (int64_t t = 0; t < tiles * kRows; t += kRows) {
        float *weights = local.tiles[0], *scores = local.tiles[1];
        if constexpr (each == 1) {
            weights = local.weights + t * kBlockStride;
            scores = local.scores + t * kBlockStride;
        }
        const float* const lse = head.lse + start + t;
        const float* const delta = head.delta + start + t;
        product<Dot>(local.q + t * kRowStride, head.key_panels + first * depth, depth, last - first, weights, kBlockStride,
                     [&](int r, int64_t column, Lanes sum) __attribute__((always_inline)) {
                         const Lanes weight = exp2_weight(lanes_fma(sum, scale_log2, lanes_set(-lse[r])));
                         lanes_store(weights + r * kBlockStride + column, weight);
                     });
        product<Dot>(local.grad + t * kRowStride, head.value_panels + first * depth, depth, last - first, scores, kBlockStride,
                     [&](int r, int64_t column, Lanes sum) __attribute__((always_inline)) {
                         const int64_t at = r * kBlockStride + column;
                         lanes_store(scores + at, (sum - lanes_set(delta[r])) * scale * lanes_load(weights + at));
                     });
        const int64_t final = smaller(start + t + kRows, stop) - 1;
        if (first < seen[final].begin || last > seen[start + t].end) {
            for (int64_t r = 0; r < kRows; ++r) {
                const Interval keys = seen[smaller(start + t + r, final)];
                const int64_t begin = smaller(larger(keys.begin, first), last) - first;
                const int64_t end = smaller(larger(keys.end, first + begin), last) - first;
                const auto clear = [&](int64_t j) { weights[r * kBlockStride + j] = scores[r * kBlockStride + j] = 0.0f; };
                for (int64_t j = 0; j < begin; ++j) clear(j);
                for (int64_t j = end; j < last - first; ++j) clear(j);
            }
        }
        if constexpr (each > 1) {
            for (int64_t r = 0; r < kRows; ++r) {
                const int64_t row = (t + r) / each * kBlockStride;
                float* const score = scores + r * kBlockStride;
                Dot::join_row(weights + r * kBlockStride, last - first, r, local.weights + row);
                Dot::join_row(score, last - first, r, local.scores + row);
                Dot::narrow_row(score, last - first, reinterpret_cast<Unit*>(score));  // behind what is still to be read
            }
        }
        if (want_q)
            add_product<Dot, false>(reinterpret_cast<const Unit*>(scores), head.k_joined + first / each * stride,
                                    (last - first) / each, stride, head.dq + (start + t) * stride);
    }
    if (!want_kv) return;
    const int64_t queries = Dot::kTiles ? tiles * kRows / each : ceil_div(stop - start, each), from = start / each * stride;
    for (int64_t j = first; j < last; j += kRows) {
        add_product<Dot, true>(local.weights + j - first, head.grad_joined + from, queries, stride, head.dv + j * stride);
        add_product<Dot, true>(local.scores + j - first, head.q_joined + from, queries, stride, head.dk + j * stride);
    }
}

// a . b of kLanes rows of `depth` units. Summed in the order of the micro-kernel, so that a query which sees one key has a
// score gradient of 0 to the last bit: out is v then, and delta the product of grad and v.
template <class Dot>
VITOK_INLINE Lanes row_products(const typename Dot::Unit* a, const typename Dot::Unit* b, int64_t depth) {
    Lanes sum = lanes_set(0.0f);
    if constexpr (Dot::kTiles) {
#if defined(VITOK_AMX)
        alignas(64) typename Dot::Unit columns[kMaxHead / Dot::kElements * kLanes];
        alignas(64) float products[kTileRows * kLanes];
        turn_rows(b, depth, columns, kLanes);
        multiply_tiles<Dot, 1, 1>(a, kRowStride, columns, kLanes, depth / kTileUnits, false, products, kLanes, [] {});
        for (int r = 0; r < kLanes; ++r) sum[r] = products[r * kLanes + r];
        return sum;
#endif
    }
    for (int64_t e = 0; e < depth; e += kLanes) {
        Lanes x[kLanes], y[kLanes];
        for (int r = 0; r < kLanes; ++r) {
            x[r] = lanes_load(reinterpret_cast<const float*>(a + r * kRowStride + e));
            y[r] = lanes_load(reinterpret_cast<const float*>(b + r * kRowStride + e));
        }
        turn(x);
        turn(y);
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j)
            if (e + j < depth) sum = Dot::add(Dot::vector(x[j]), Dot::vector(y[j]), sum);
    }
    return sum;
}

// kTokenPadding tokens of a head, from `first` on: what the products read, and zeros where they add up.
template <class Dot, class T>
void pack(const AttentionBackward& g, const Transform& transform_q, const Transform& transform_k, const Head<Dot>& head,
          int64_t b, int64_t h, int64_t first) {
    using Unit = typename Dot::Unit;
    const int64_t tokens = g.tokens(), width = g.width(), stride = g.padded_width();
    const int64_t depth = depth_of<Dot>(width), units = stride / Dot::kElements;
    for (int64_t j = first; j < first + kTokenPadding; j += kPanel) {
        pack_panel<Dot>(j, tokens, width, depth, head.key_panels + j * depth, head.k_joined, [&](int64_t token, float* to) {
            transform_k(next_head_row<T>(g, b, token, 1, h), token, to);
        });
        pack_panel<Dot>(j, tokens, width, depth, head.value_panels + j * depth, nullptr, [&](int64_t token, float* to) {
            widen_row(next_head_row<T>(g, b, token, 2, h), width, to);
        });
    }
    alignas(64) float q[kRowStride], grad[kRowStride], out[kRowStride];
    alignas(64) Unit grads[kLanes * kRowStride], outs[kLanes * kRowStride];
    for (int64_t i = first; i < first + kTokenPadding; ++i) {
        zero_row(width, head.dq + i * stride);
        zero_row(width, head.dk + i * stride);
        zero_row(width, head.dv + i * stride);
        head.lse[i] = kHighest;  // of a row that sees no key: its weights are 0
        if (i < tokens) {
            transform_q(next_head_row<T>(g, b, i, 0, h), i, q);
            const T* const from = static_cast<const T*>(g.grad);
            widen_row(from + b * g.grad_strides[0] + i * g.grad_strides[1] + h * g.grad_strides[2], width, grad);
            widen_row(static_cast<const T*>(g.out) + ((b * tokens + i) * g.heads() + h) * width, width, out);
            const float lse = static_cast<const float*>(g.lse)[(b * g.heads() + h) * tokens + i];
            if (lse != -__builtin_inff()) head.lse[i] = lse * kLog2e;
        } else {
            zero_row(width, q);
            zero_row(width, grad);
            zero_row(width, out);
        }
        const int64_t place = (i - first) % kLanes * kRowStride, joined = i / Dot::kElements * stride;
        Dot::narrow_row(q, stride, head.q + i * units);
        Dot::narrow_row(grad, stride, head.grad + i * units);
        if constexpr (Dot::kElements > 1) {
            Dot::join_row(q, stride, i, head.q_joined + joined);
            Dot::join_row(grad, stride, i, head.grad_joined + joined);
        }
        Dot::narrow_row(grad, stride, grads + place);
        Dot::narrow_row(out, stride, outs + place);
        for (int64_t unit = units; unit < depth; ++unit) grads[place + unit] = outs[place + unit] = 0;
        if ((i + 1) % kLanes == 0) lanes_store(head.delta + i + 1 - kLanes, row_products<Dot>(grads, outs, depth));
    }
}

// The gradient of one row of q or k, back through rotation and norm; adds the row's part of the weight's gradient.
template <class T>
void untransform(const Transform& transform, const T* from, int64_t token, float* grad, float* partial, T* to) {
    const int64_t width = transform.width;
    if (transform.table) transform.rotate(grad, token, -1.0f);
    if (transform.norm) {
        alignas(64) float x[kRowStride];
        widen_row(from, width, x);
        const float rstd = transform.rstd(x);
        const Lanes scale = lanes_set(rstd);
        Lanes products = lanes_set(0.0f);
        for (int64_t e = 0; e < padded(width); e += kLanes) {
            const Lanes unit = lanes_load(x + e) * scale, part = lanes_load(grad + e) * unit;
            lanes_store(partial + e, lanes_load(partial + e) + part);
            lanes_store(x + e, unit);
            products = lanes_fma(part, lanes_load(transform.weight + e), products);
        }
        const Lanes mean = lanes_set(lanes_sum(products) / static_cast<float>(width));
        for (int64_t e = 0; e < padded(width); e += kLanes) {
            const Lanes weighted = lanes_load(grad + e) * lanes_load(transform.weight + e);
            lanes_store(grad + e, (weighted - lanes_load(x + e) * mean) * scale);
        }
    }
    narrow_row(grad, width, to);
}

// The tokens of one stretch: their gradients, and their part of the weights' gradients in `partial` [2][padded width].
template <class Dot, class T>
void finish(const AttentionBackward& g, const Transform& transform_q, const Transform& transform_k, const Head<Dot>& head,
            int64_t b, int64_t h, int64_t first, float* partial) {
    const int64_t width = g.width(), stride = g.padded_width(), between = g.heads() * width;
    if (partial) zero_row(stride, partial), zero_row(stride, partial + stride);
    for (int64_t i = first; i < smaller(first + kTokenPadding, g.tokens()); ++i) {
        T* const to = static_cast<T*>(g.dqkv) + ((b * g.tokens() + i) * 3 * g.heads() + h) * width;
        untransform(transform_q, head_row<T>(g, b, i, 0, h), i, head.dq + i * stride, partial, to);
        untransform(transform_k, head_row<T>(g, b, i, 1, h), i, head.dk + i * stride, partial ? partial + stride : nullptr,
                    to + between);
        narrow_row(head.dv + i * stride, width, to + 2 * between);
    }
}

// A weight's gradient: its partial sums in the order of heads and stretches.
void sum_partials(const AttentionBackward& g, const float* partials, void* to) {
    const int64_t count = g.batch() * g.heads() * g.stretches(), stride = g.padded_width();
    with_float(g.weight_dtype, [&](auto zero) {
        using W = decltype(zero);
        for (int64_t e = 0; e < g.width(); ++e) {
            float sum = 0.0f;
            for (int64_t part = 0; part < count; ++part) sum += partials[part * 2 * stride + e];
            narrow(static_cast<compute_t<W>>(sum), static_cast<W*>(to)[e]);
        }
    });
}

template <class Dot, class T>
void backward(const AttentionBackward& g) {
    const Scratch scratch(g);
    const int64_t tokens = g.tokens(), heads = g.batch() * g.heads(), slots = smaller(g.slots, heads);
    const int64_t stretches = g.stretches(), padding = g.padded_tokens(), stride = g.padded_width();
    float* const statistics = scratch.matrix<float>(g, AttentionBackward::kMatrices * g.slots);
    float* const partials = g.q_weight ? statistics + g.slots * 2 * padding : nullptr;
    fill_intervals(g, scratch.keys);
    [[maybe_unused]] const bool parallel = heads * tokens * g.width() >= kParallelProducts / larger(tokens, 1);

#if defined(_OPENMP)
#pragma omp parallel if (parallel)
#endif
    {
        const Team team = Team::current();
        [[maybe_unused]] const Registers<Dot::kTiles> registers;
        const Transform transform_q(g, g.q_weight), transform_k(g, g.k_weight);
        Blocks<Dot> local;
        const auto head_of = [&](int64_t slot) {
            const int64_t first = AttentionBackward::kMatrices * slot;
            const auto units = [&](int64_t i) { return scratch.matrix<typename Dot::Unit>(g, first + i); };
            const auto sums = [&](int64_t i) { return scratch.matrix<float>(g, first + i); };
            // q and grad in pairs leave half of a matrix, where they stand joined. Single numbers are joined as they are.
            const int64_t rest = Dot::kElements == 1 ? 0 : padding * stride / Dot::kElements;
            return Head<Dot>{units(0), units(1), units(2), units(3), units(4), units(2) + rest, units(3) + rest,
                             sums(5), sums(6), sums(7),
                             statistics + 2 * slot * padding, statistics + (2 * slot + 1) * padding};
        };
        for (int64_t wave = 0; wave < heads; wave += slots) {
            const int64_t count = smaller(slots, heads - wave);
            const Interval pieces = team.share(count * stretches);
            for (int64_t piece = pieces.begin; piece < pieces.end; ++piece) {
                const int64_t head = wave + piece / stretches;
                pack<Dot, T>(g, transform_q, transform_k, head_of(piece / stretches), head / g.heads(), head % g.heads(),
                        piece % stretches * kTokenPadding);
            }
            team.barrier();
            if (count >= team.threads) {
                const Interval mine = team.share(count);
                for (int64_t slot = mine.begin; slot < mine.end; ++slot)
                    for (int64_t key = 0; key < tokens; key += kKeys)
                        for (int64_t query = 0; query < tokens; query += kQueries)
                            pair(g, scratch.keys, head_of(slot), query, key, true, true, local);
            } else {
                // Round robin, because under a causal mask the blocks of a head have less and less, or more and more, to do.
                const int64_t key_blocks = ceil_div(tokens, kKeys), query_blocks = ceil_div(tokens, kQueries);
                for (int64_t item = team.thread; item < count * key_blocks; item += team.threads) {
                    const int64_t slot = item / key_blocks, key = item % key_blocks * kKeys;
                    for (int64_t query = 0; query < tokens; query += kQueries)
                        pair(g, scratch.keys, head_of(slot), query, key, false, true, local);
                }
                for (int64_t item = team.thread; item < count * query_blocks; item += team.threads) {
                    const int64_t slot = item / query_blocks, query = item % query_blocks * kQueries;
                    for (int64_t key = 0; key < tokens; key += kKeys)
                        pair(g, scratch.keys, head_of(slot), query, key, true, false, local);
                }
            }
            team.barrier();
            for (int64_t piece = pieces.begin; piece < pieces.end; ++piece) {
                const int64_t head = wave + piece / stretches, stretch = piece % stretches;
                float* const partial = partials ? partials + (head * stretches + stretch) * 2 * stride : nullptr;
                finish<Dot, T>(g, transform_q, transform_k, head_of(piece / stretches), head / g.heads(), head % g.heads(),
                          stretch * kTokenPadding, partial);
            }
            team.barrier();
        }
    }
    if (partials) {
        sum_partials(g, partials, g.dq_weight);
        sum_partials(g, partials + stride, g.dk_weight);
    }
}

}  // namespace

void attention_backward(const AttentionBackward& g) {
    switch (g.dtype) {
        case DType::float16: return backward<Singles, f16>(g);
        case DType::float32: return backward<Singles, float>(g);
        case DType::bfloat16: return backward<TiledBfloat16, bf16>(g);
        case DType::float64: return attention_backward_float64(g);
        case DType::uint8: return;
    }
}

}  // namespace VITOK_ISA
}  // namespace vitok
