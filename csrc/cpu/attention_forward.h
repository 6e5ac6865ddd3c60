// Causal attention over a trie of segments, forward.
#pragma once

#include "attention.h"

namespace g2r::G2R_NS {

// A stretch of one block's queries.
struct QueryItem {
    const ForwardBlock* block;
    i64 first, count;
};

constexpr i64 kQueryRows = 48;  // of a tile, at most
// Numbers of a tile of scores: with the path's keys and values it stays in the second-level cache.
constexpr i64 kScoreTile = 1 << 16;

inline i64 query_rows(const int64_t* positions, i64 left, i64 window) {
    i64 n = smaller(left, kQueryRows);
    while (n > kRows && n * KeyRange(positions, n, window).width > kScoreTile)
        n = round_up(n, kRows) - kRows;
    return n;
}

// s = cap * tanh(s / cap); with `slope` also its derivative.
inline void soft_cap(float* row, i64 count, float cap, float* slope) {
    for (i64 k = 0; k < count; k++) {
        const float t = tanhf(row[k] / cap);
        row[k] = cap * t;
        if (slope != nullptr) slope[k] = 1.0f - t * t;
    }
}

// exp(scores - their largest) as operands; returns the largest, their sum, and that of the
// operands. The weights of a mean add up to one: what all values have in common must not feel their
// rounding.
template <class T>
G2R_INLINE void exponentiate(const float* scores, T* out, i64 width, float& most, float& total,
                             float& rounded) {
    vf highs[4];  // in four chains
    for (int n = 0; n < 4; n++) highs[n] = load(scores);
    i64 at = 0;
    for (; at + 4 * kWidth <= width; at += 4 * kWidth)
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) highs[n] = maximum(load(scores + at + n * kWidth), highs[n]);
    for (; at < width; at += kWidth) highs[0] = maximum(load(scores + at), highs[0]);
    most = largest(maximum(maximum(highs[0], highs[1]), maximum(highs[2], highs[3])));
    const vf shift = splat(most);
    vf sums = {}, rounded_sums = {};
    for (i64 k = 0; k < width; k += kWidth) {
        const vf p = exp(load(scores + k) - shift);
        store(out + k, p);
        sums += p;
        if constexpr (Pair<T>::size > 1) rounded_sums += load(out + k);
    }
    total = sum(sums);
    rounded = Pair<T>::size > 1 ? sum(rounded_sums) : total;
}

template <class S, class T>
class ForwardTask {
 public:
    ForwardTask(const AttentionForward& in, i64 kv_head, i64 length)
        : in_(in),
          kv_head_(kv_head),
          q_{static_cast<const S*>(in.q), in.heads, in.head_dim},
          k_{static_cast<const S*>(in.k), in.kv_heads, in.head_dim},
          v_{static_cast<const S*>(in.v), in.kv_heads, in.head_dim},
          stack_(in.segments, in.segment_count),
          keys_(length * in.head_dim),
          values_(length * in.head_dim),
          queries_(kQueryRows * in.head_dim),
          scores_(larger(kScoreTile, kRows * length) + kPanel),
          narrow_(Pair<T>::size > 1 ? scores_.size() : 0),
          mixed_(kQueryRows * in.head_dim) {}

    void run(const QueryItem& item) {
        const i64 d = in_.head_dim;
        stack_.enter(
            item.block->segment,
            [&](i64 start, i64 stop, i64 row) {
                load_columns<T>(keys_, start, stop, k_.at(row, kv_head_), k_.stride(), d);
                load_by_row<T>(values_, start, stop, v_.at(row, kv_head_), v_.stride(), d);
            },
            [&](i64 position) {
                for (i64 i = 0; i < d; i++) {
                    const i64 pair = Pair<T>::size;
                    values_[position / pair * d * pair + i * pair + position % pair] = T{};
                }
            });
        const i64 end = item.first + item.count;
        const int64_t* positions = in_.positions + item.block->row;
        for (i64 t = item.first; t < end;) {
            const i64 n = query_rows(positions + t, end - t, in_.window);
            for (i64 h = 0; h < in_.heads / in_.kv_heads; h++)
                tile(item.block->row + t, n, kv_head_ * (in_.heads / in_.kv_heads) + h);
            t += n;
        }
    }

 private:
    void tile(i64 row, i64 n, i64 head) {
        const i64 d = in_.head_dim;
        const int64_t* positions = in_.positions + row;
        const KeyRange keys(positions, n, in_.window);
        const i64 ld = keys.width;
        for (i64 t = 0; t < n; t++) copy_row<T>(queries_ + t * d, q_.at(row + t, head), d);
        float* scores_at = scores_;
        score_panels<T>(
            queries_, keys_, d, positions, n, keys,
            [&](i64 first, i64 column) { return Store{scores_at + first * ld + column, ld}; },
            [](i64, i64, i64, i64) {});
        float rounded[kQueryRows];
        for (i64 t = 0; t < n; t++) {
            float* scores = scores_ + t * ld;
            if (in_.softcap > 0.0f)
                soft_cap(scores, positions[t] + 1 - keys.low, in_.softcap, nullptr);
            fill_hidden(scores, positions[t], keys, in_.window, -__builtin_inff());
            float most, total;
            exponentiate(scores, weights() + t * ld, ld, most, total, rounded[t]);
            in_.lse[(row + t) * in_.heads + head] = most + logf(total);
        }
        mix_values<T>(weights(), values_, d, positions, n, keys, mixed_, false);
        for (i64 t = 0; t < n; t++) {
            const vf scale = splat(1.0f / rounded[t]);
            for (i64 i = 0; i < d; i += kWidth)
                store(in_.out + ((row + t) * in_.heads + head) * d + i,
                      load(mixed_ + t * d + i) * scale);
        }
    }

    T* weights() {  // in place where they are floats
        if constexpr (Pair<T>::size == 1) {
            return scores_;
        } else {
            return narrow_;
        }
    }

    const AttentionForward& in_;
    const i64 kv_head_;
    const Heads<S> q_, k_, v_;
    PathStack stack_;
    Array<T> keys_, values_, queries_;
    Array<float> scores_;
    Array<T> narrow_;
    Array<float> mixed_;
};

// Tasks are stretches of the blocks in their depth-first order, of about equal cost, for one kv
// head; what a query gives does not depend on where they are cut.
template <class S, class T>
void attention_forward_as(const AttentionForward& in) {
    constexpr i64 kStretch = 4 * kQueryRows;
    i64 items = 0;
    for (i64 b = 0; b < in.block_count; b++) items += ceil_div(in.blocks[b].count, kStretch);
    if (items == 0) return;
    Array<QueryItem> item(items);
    Array<double> cost(items + 1);
    cost[0] = 0;
    i64 at = 0;
    for (i64 b = 0; b < in.block_count; b++) {
        const ForwardBlock& block = in.blocks[b];
        for (i64 t = 0; t < block.count; t += kStretch, at++) {
            const i64 count = smaller(kStretch, block.count - t);
            item[at] = {&block, t, count};
            const i64 keys = in.positions[block.row + t + count - 1] + 1;
            const bool all = in.window == 0 || in.window >= keys;
            const i64 seen = all ? keys : smaller(keys, in.window + count);
            cost[at + 1] = cost[at] + double(count) * double(seen) + double(keys);
        }
    }
    const i64 length = path_length(in.segments, in.segment_count);
    const i64 cuts = smaller(items, ceil_div(4 * pool().threads(), in.kv_heads));
    parallel(cuts * in.kv_heads, [&](i64 task) {
        const i64 cut = task / in.kv_heads;
        const double low = cost[items] * double(cut) / double(cuts);
        const double high = cost[items] * double(cut + 1) / double(cuts);
        ForwardTask<S, T> work(in, task % in.kv_heads, length);
        for (i64 i = 0; i < items; i++)
            if (cost[i] >= low && (cost[i] < high || cut + 1 == cuts)) work.run(item[i]);
    });
}

}  // namespace g2r::G2R_NS
