// Causal attention over a trie of segments, backward for many lanes.
//
// For a tile of queries of one head and some keys, P is computed once and serves the lanes one
// after the other: what lies between two products stays in the nearest caches. dS = P * (dP - the
// row's sum of P * dP), which is grad . out. Keys before the first run of the path get no gradient:
// they cost dQ only. The keys of a run get theirs from every block below it, in one task and in one
// order.
#pragma once

#include "attention_forward.h"
#include "attention_groups.h"

namespace g2r::G2R_NS {

// Queries of a tile, at most: every tile adds to the gradients of all its keys.
constexpr i64 kBackwardRows = 96;
// Lanes that go through a tile together, at most: their gradients are kept in the meantime.
constexpr i64 kLanesAtOnce = 32;

// dS = p * (dP - the row's sum), times the slope of the cap where there is one.
template <class T>
struct ScoreGrads {
    T* out;
    i64 ld;
    const float* p;
    const float* slope;  // or null
    const float* sums;   // [rows]
    template <int N>
    G2R_INLINE void expect(i64) const {}
    template <int N>
    G2R_INLINE void start(i64 row, vf (&values)[N]) const {
        const vf minus = splat(-sums[row]);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) values[n] = minus;
    }
    template <int N>
    G2R_INLINE void operator()(i64 row, const vf (&values)[N]) const {
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            const i64 at = row * ld + n * kWidth;
            vf x = values[n] * load(p + at);
            if (slope != nullptr) x *= load(slope + at);
            store(out + at, x);
        }
    }
};

// exp(values - the row's log-sum-exp) into a tile.
struct Probability : Store {
    const float* lse;  // [rows]
    template <int N>
    G2R_INLINE void operator()(i64 row, const vf (&values)[N]) const {
        const vf shift = splat(lse[row]);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) store(out + row * ld + n * kWidth, exp(values[n] - shift));
    }
};

template <class S, class T>
class BackwardTask {
    static constexpr int kPair = Pair<T>::size;

    // A run of the group that lies on the current path. Its keys' gradients gather in rows
    // [lane][token].
    struct LiveRun {
        i64 run, start, stop;
    };

 public:
    BackwardTask(const AttentionBackward& in, const BackwardGroups& groups, i64 kv_head, i64 length,
                 i64 task)
        : in_(in),
          groups_(groups),
          group_(groups.task(task)),
          kv_head_(kv_head),
          d_(in.head_dim),
          q_{static_cast<const S*>(in.q), in.heads, in.head_dim},
          k_{static_cast<const S*>(in.k), in.kv_heads, in.head_dim},
          v_{static_cast<const S*>(in.v), in.kv_heads, in.head_dim},
          out_{in.out, in.heads, in.head_dim},
          grad_{static_cast<const S*>(in.grad_out), in.heads, in.head_dim},
          stack_(in.segments, in.segment_count),
          live_(in.segment_count),
          mine_(group_.runs),
          gathered_at_(group_.runs),
          gathered_rows_(place_runs()),
          dk_(gathered_rows_ * d_),
          dv_(gathered_rows_ * d_),
          keys_by_column_(length * d_),
          values_by_column_(length * d_),
          keys_by_row_(length * d_),
          values_by_row_(in.out == nullptr ? length * d_ : 0),
          lanes_at_once_(smaller(most_lanes(), kLanesAtOnce)),
          queries_(kBackwardRows * d_),
          grads_(lanes_at_once_ * kBackwardRows * d_),
          attended_(in.out == nullptr ? kBackwardRows * d_ : 0),
          row_sums_(lanes_at_once_ * kBackwardRows),
          dq_(lanes_at_once_ * kBackwardRows * d_),
          p_(kBackwardRows * kKeyStep),
          slope_(in.softcap > 0.0f ? kBackwardRows * kKeyStep : 0),
          ds_(kBackwardRows * kKeyStep),
          query_pairs_(kPair > 1 ? kBackwardRows * d_ : 0),
          grad_pairs_(kPair > 1 ? grads_.size() : 0),
          p_pairs_(kPair > 1 ? kBackwardRows * kKeyStep : 0),
          ds_pairs_(kPair > 1 ? kBackwardRows * kKeyStep : 0) {}

    void run() {
        for (i64 i = 0; i < gathered_rows_ * d_; i++) dk_[i] = dv_[i] = 0.0f;
        for (i64 b = group_.first; b < group_.stop; b++) {
            const BackwardBlock& block = in_.blocks[b];
            const LaneRange lanes = lanes_of(block);
            if (lanes.count == 0 || block.count == 0) continue;
            enter(block, lanes);
            const int64_t* positions = in_.positions + block.row;
            // Tiles of even length, in whole tiles of a product.
            const i64 most = ceil_div(block.count, ceil_div(block.count, kBackwardRows));
            const i64 rows = round_up(most, kRows);
            for (i64 c = 0; c < lanes.count; c += lanes_at_once_) {
                const LaneRange some{lanes.first + c, smaller(lanes_at_once_, lanes.count - c)};
                for (i64 t = 0; t < block.count; t += rows)
                    tile(block, some, t, smaller(rows, block.count - t), positions + t);
            }
        }
        write_keys();
    }

 private:
    // The rows that the gradients of this task's keys take, all runs together.
    i64 place_runs() {
        i64 rows = 0;
        for (i64 i = 0; i < group_.runs; i++) {
            const Run& run = groups_.run(group_, i);
            mine_[i] = lanes_in_part(group_, in_, in_.run_lanes + run.lane_at, run.lanes);
            gathered_at_[i] = rows;
            rows += run.tokens * mine_[i].count;
        }
        return rows;
    }

    LaneRange lanes_of(const BackwardBlock& block) const {
        return lanes_in_part(group_, in_, in_.block_lanes + block.lane_at, block.lanes);
    }

    i64 most_lanes() const {
        i64 most = 0;
        for (i64 b = group_.first; b < group_.stop; b++)
            most = larger(most, lanes_of(in_.blocks[b]).count);
        return most;
    }

    void enter(const BackwardBlock& block, LaneRange lanes) {
        stack_.enter(
            block.segment,
            [&](i64 start, i64 stop, i64 row) {
                const S *k = k_.at(row, kv_head_), *v = v_.at(row, kv_head_);
                load_columns<T>(keys_by_column_, start, stop, k, k_.stride(), d_);
                load_columns<T>(values_by_column_, start, stop, v, v_.stride(), d_);
                load_by_row<T>(keys_by_row_, start, stop, k, k_.stride(), d_);
                if (in_.out == nullptr)
                    load_by_row<T>(values_by_row_, start, stop, v, v_.stride(), d_);
            },
            [&](i64 position) {
                T* panel = values_by_column_ + position / kPanel * kPanel * d_;
                for (i64 i = 0; i < d_; i++) {
                    const i64 at = (position / kPair * d_ + i) * kPair + position % kPair;
                    keys_by_row_[at] = T{};
                    if (in_.out == nullptr) values_by_row_[at] = T{};
                    panel[packed_index<T>(i, position % kPanel)] = T{};
                }
            });
        live_count_ = 0;
        first_ = in_.segments[block.segment].stop;
        for (i64 s = block.segment; s >= 0; s = in_.segments[s].parent) {
            const i64 run = groups_.place_of_run(s);
            if (run < 0) continue;
            bool meets = false;
            for (i64 c = 0; c < lanes.count && !meets; c++)
                meets = place_in(run, in_.block_lanes[block.lane_at + lanes.first + c]) >= 0;
            if (!meets) continue;
            live_[live_count_++] = {run, in_.segments[s].start, in_.segments[s].stop};
            first_ = in_.segments[s].start;
        }
    }

    // Place of a lane among those of the group's run number `run` that are this task's, -1: none.
    i64 place_in(i64 run, i64 lane) const {
        const int64_t* lanes = in_.run_lanes + groups_.run(group_, run).lane_at;
        return place_of(lanes + mine_[run].first, mine_[run].count, lane);
    }

    // n queries of the block from t on, all heads of the group, some lanes.
    void tile(const BackwardBlock& block, LaneRange lanes, i64 t, i64 n, const int64_t* positions) {
        const KeyRange all(positions, n, in_.window);
        const i64 heads = in_.heads / in_.kv_heads, stride = in_.heads * d_;
        const i64 row = block.row + t, lane_rows = kBackwardRows * d_;
        const i64 backward_row = block.backward_row + t * block.lanes + lanes.first;
        for (i64 head = kv_head_ * heads; head < (kv_head_ + 1) * heads; head++) {
            load_rows(queries_, query_pairs_, q_.at(row, head), n, stride);
            if (in_.out == nullptr) attend(row, n, head, positions, all);
            for (i64 c = 0; c < lanes.count; c++) {
                const S* grad = grad_.at(backward_row + c, head);
                load_rows(grads_ + c * lane_rows, grad_pairs_ + c * lane_rows, grad, n,
                          stride * block.lanes);
                for (i64 i = 0; i < n; i++)
                    row_sums_[c * kBackwardRows + i] =
                        dot(grad + i * stride * block.lanes,
                            in_.out == nullptr ? attended_ + i * d_ : out_.at(row + i, head));
            }
            for (i64 low = all.low; low < all.stop; low += kKeyStep) {
                const KeyRange keys(low, smaller(all.stop, low + kKeyStep));
                const bool has_grads = keys.stop > first_;
                probabilities(row, n, head, positions, keys);
                if constexpr (kPair > 1)
                    if (has_grads) pair_tokens(p_pairs_, p_.data(), n, keys.width);
                for (i64 c = 0; c < lanes.count; c++) {
                    score_grads(c, n, positions, keys);
                    mix_values<T>(ds_, keys_by_row_, d_, positions, n, keys, dq_ + c * lane_rows,
                                  low > all.low);
                    if (!has_grads) continue;
                    if constexpr (kPair > 1) pair_tokens(ds_pairs_, ds_.data(), n, keys.width);
                    to_keys(c, in_.block_lanes[block.lane_at + lanes.first + c], positions, n,
                            keys);
                }
            }
            S* dq = static_cast<S*>(in_.dq) + (backward_row * in_.heads + head) * d_;
            for (i64 i = 0; i < n; i++)
                for (i64 c = 0; c < lanes.count; c++)
                    for (i64 d = 0; d < d_; d += kWidth)
                        store(dq + (i * block.lanes + c) * stride + d,
                              load(dq_ + c * lane_rows + i * d_ + d));
        }
    }

    // What the forward gave for a tile, where it was not kept.
    void attend(i64 row, i64 n, i64 head, const int64_t* positions, KeyRange all) {
        for (i64 low = all.low; low < all.stop; low += kKeyStep) {
            const KeyRange keys(low, smaller(all.stop, low + kKeyStep));
            probabilities(row, n, head, positions, keys);
            if constexpr (kPair == 1)  // all models that come without are float32
                mix_values<T>(p_, values_by_row_, d_, positions, n, keys, attended_, low > all.low);
        }
    }

    float dot(const S* a, const float* b) const {
        vf total = {};
        for (i64 d = 0; d < d_; d += kWidth) total = multiply_add(load(a + d), load(b + d), total);
        return sum(total);
    }

    // Rows as operands, and as pairs of tokens where products take pairs.
    void load_rows(T* rows, T* pairs, const S* from, i64 n, i64 stride) {
        for (i64 i = 0; i < n; i++) copy_row<T>(rows + i * d_, from + i * stride, d_);
        if constexpr (kPair > 1)
            for (i64 i = 0; i < n; i += kPair)
                pair_rows(pairs + i * d_, from + i * stride,
                          i + 1 < n ? from + (i + 1) * stride : nullptr, d_);
    }

    template <class Row>
    void pair_tokens(T* pairs, const Row* rows, i64 n, i64 width) {
        for (i64 i = 0; i < n; i += kPair)
            pair_rows(pairs + i * width, rows + i * width,
                      i + 1 < n ? rows + (i + 1) * width : nullptr, width);
    }

    void probabilities(i64 row, i64 n, i64 head, const int64_t* positions, KeyRange keys) {
        const i64 ld = keys.width;
        float* p = p_;
        float lse[kBackwardRows];
        for (i64 i = 0; i < n; i++) lse[i] = in_.lse[(row + i) * in_.heads + head];
        const auto scores = [&](const auto& finish_at) {
            score_panels<T>(queries_, keys_by_column_, d_, positions, n, keys, finish_at,
                            [](i64, i64, i64, i64) {});
        };
        if (in_.softcap > 0.0f) {
            scores([&](i64 first, i64 column) { return Store{p + first * ld + column, ld}; });
            for (i64 i = 0; i < n; i++)
                capped(p + i * ld, slope_ + i * ld, positions[i], keys, lse[i]);
        } else {
            scores([&](i64 first, i64 column) {
                return Probability{{p + first * ld + column, ld}, lse + first};
            });
        }
        for (i64 i = 0; i < n; i++) fill_hidden(p + i * ld, positions[i], keys, in_.window, 0.0f);
    }

    // Scores to probabilities of capped ones, and the slopes of the cap.
    void capped(float* p, float* slope, i64 position, KeyRange keys, float lse) const {
        for (i64 k = 0; k < keys.width; k++) slope[k] = 0.0f;
        const i64 seen = smaller(position + 1, keys.stop) - keys.low;
        soft_cap(p, seen, in_.softcap, slope);
        for (i64 k = 0; k < keys.width; k += kWidth) store(p + k, exp(load(p + k) - splat(lse)));
    }

    void score_grads(i64 lane, i64 n, const int64_t* positions, KeyRange keys) {
        const i64 ld = keys.width;
        T* const ds = ds_;
        const float *const p = p_, *const sums = row_sums_ + lane * kBackwardRows;
        const float* const slope = in_.softcap > 0.0f ? slope_.data() : nullptr;
        score_panels<T>(
            grads_ + lane * kBackwardRows * d_, values_by_column_, d_, positions, n, keys,
            [&](i64 first, i64 column) {
                const i64 at = first * ld + column;
                return ScoreGrads<T>{ds + at, ld, p + at, slope == nullptr ? nullptr : slope + at,
                                     sums + first};
            },
            [&](i64 first, i64 rows, i64 column, i64 vectors) {
                for (i64 i = first; i < first + rows; i++)
                    for (i64 v = 0; v < vectors; v++)
                        store(ds + i * ld + column + v * kWidth, vf{});
            });
    }

    // dK and dV of one lane in every run on the path.
    void to_keys(i64 c, i64 lane, const int64_t* positions, i64 n, KeyRange keys) {
        for (i64 l = 0; l < live_count_; l++) {
            const LiveRun& live = live_[l];
            const i64 low = larger(live.start, keys.low), high = smaller(live.stop, keys.stop);
            const i64 place = low < high ? place_in(live.run, lane) : -1;
            if (place < 0) continue;
            const i64 row =
                gathered_at_[live.run] + place * groups_.run(group_, live.run).tokens - live.start;
            const i64 grads = c * kBackwardRows * d_;
            const auto some = [&](i64 key, i64 count, i64 first) {
                add_keys(dk_ + (row + key) * d_, ds_.data(), ds_pairs_, queries_, query_pairs_, key,
                         count, first, n, keys);
                add_keys(dv_ + (row + key) * d_, p_.data(), p_pairs_, grads_ + grads,
                         grad_pairs_ + grads, key, count, first, n, keys);
            };
            const i64 seen_by_all = smaller(high, larger(low, positions[0] + 1));
            some(low, seen_by_all - low, 0);
            i64 first = 0;
            for (i64 key = seen_by_all; key < high; key += kRows) {
                while (first < n && positions[first] < key) first++;
                some(key, smaller<i64>(kRows, high - key), first / kPair * kPair);
            }
        }
    }

    // out[key] += sum over the queries from `first` on of weights[query][key] * rows[query].
    template <class Weight>
    void add_keys(float* out, const Weight* weights, const T* weight_pairs, const T* rows,
                  const T* row_pairs, i64 key, i64 count, i64 first, i64 n, KeyRange keys) {
        for (i64 d = 0; d < d_; d += kPanel) {
            const i64 vectors = smaller<i64>(kPanel, d_ - d) / kWidth;
            const i64 at = first * keys.width + (key - keys.low) * kPair;
            if constexpr (kPair > 1) {
                const Operand<T> left{weight_pairs + at, kPair, keys.width * kPair};
                const Panel<T> right{row_pairs + first * d_ + d * kPair, d_ * kPair};
                product<T>(left, count, right, vectors, round_up(n, kPair) - first, out + d, d_,
                           true);
            } else {
                const Operand<T> left{weights + at, 1, keys.width};
                const Panel<T> right{rows + first * d_ + d, d_};
                product<T>(left, count, right, vectors, n - first, out + d, d_, true);
            }
        }
    }

    void write_keys() {
        for (i64 i = 0; i < group_.runs; i++) {
            const Run& run = groups_.run(group_, i);
            for (i64 c = 0; c < mine_[i].count; c++)
                for (i64 t = 0; t < run.tokens; t++) {
                    const i64 from = gathered_at_[i] + c * run.tokens + t;
                    const i64 row = run.backward_row + t * run.lanes + mine_[i].first + c;
                    const i64 to = (row * in_.kv_heads + kv_head_) * d_;
                    copy_row<float>(in_.dk + to, dk_ + from * d_, d_);
                    copy_row<float>(in_.dv + to, dv_ + from * d_, d_);
                }
        }
    }

    const AttentionBackward& in_;
    const BackwardGroups& groups_;
    const BackwardGroup& group_;
    const i64 kv_head_, d_;
    const Heads<S> q_, k_, v_;
    const Heads<float> out_;
    const Heads<S> grad_;
    PathStack stack_;
    Array<LiveRun> live_;
    Array<LaneRange> mine_;
    Array<i64> gathered_at_;
    const i64 gathered_rows_;
    Array<float> dk_, dv_;
    Array<T> keys_by_column_, values_by_column_, keys_by_row_, values_by_row_;
    i64 live_count_ = 0, first_ = 0;
    const i64 lanes_at_once_;
    Array<T> queries_;       // of a tile
    Array<T> grads_;         // [lane][row][head_dim], as are dq_ and grad_pairs_
    Array<float> attended_;  // [row][head_dim]
    Array<float> row_sums_;  // [lane][row]
    Array<float> dq_;
    Array<float> p_, slope_;  // [row][key], of a step
    Array<T> ds_;
    Array<T> query_pairs_, grad_pairs_, p_pairs_, ds_pairs_;
};

template <class S, class T>
void attention_backward_as(const AttentionBackward& in) {
    // Runs that no block comes by get nothing.
    const i64 row = in.kv_heads * in.head_dim;
    constexpr i64 kZeroRows = 256;
    parallel(ceil_div(in.key_rows, kZeroRows), [&](i64 task) {
        const i64 first = task * kZeroRows, stop = smaller(in.key_rows, first + kZeroRows);
        for (i64 i = first * row; i < stop * row; i++) in.dk[i] = in.dv[i] = 0.0f;
    });
    const BackwardGroups groups(in);
    const i64 length = path_length(in.segments, in.segment_count);
    parallel(groups.tasks() * in.kv_heads, [&](i64 index) {
        BackwardTask<S, T>(in, groups, index % in.kv_heads, length, index / in.kv_heads).run();
    });
}

}  // namespace g2r::G2R_NS
