// Gradients of one tile of keys and values of one kv head and lane, in one pass over the queries of
// that lane that see any of them: four products for each tile of packed queries.
//
// Products are transposed: rows are keys, columns are queries, so that both gradients stay in
// registers. The queries are one stream over the lane's entries, and a tile of them may hold
// several entries.
#pragma once

#include "attention.h"
#include "attention_scores.cuh"
#include "attention_tile.cuh"

namespace g2r::gpu {

template <int dim, bool capped>
struct BackwardKeysShape {
    static constexpr int m_tiles = dim <= 64 ? 2 : 1;
    static constexpr int keys = 4 * 16 * m_tiles;
    static constexpr int rows = (dim <= 64 ? 32 : 64) / (capped ? 2 : 1);  // of a step
    static constexpr int k_bytes = keys * row_bytes<dim>;
    static constexpr int q_bytes = rows * row_bytes<dim>;
    static constexpr int shared_bytes = 2 * k_bytes + 4 * q_bytes + (11 * rows + 2) * 4;
};

// What the steps need of their rows, besides q and grad_out: a step's indices are written two steps
// ahead and are read one step ahead, its sums are written one step ahead.
template <int rows>
struct QueryRows {
    int q_index[2][rows];
    int grad_index[2][rows];
    int position[3][rows];
    float lse2[2][rows];  // infinite behind the last row, which is repeated: then p is 0
    float delta[2][rows];
};

// The first token in [from, stop) whose position is not below `position`.
G2R_DEVICE int lower_bound(const std::int32_t* positions, int from, int stop, int position) {
    while (from < stop) {
        const int middle = from + (stop - from) / 2;
        if (positions[middle] < position) {
            from = middle + 1;
        } else {
            stop = middle;
        }
    }
    return from;
}

// From a lane's first query that sees a key to its last one.
class QueryWalk {
 public:
    // Of the entries [entry, stop), queries before position `low` and behind `high` are left out.
    G2R_DEVICE QueryWalk(const G2rAttentionBackward& call, int entry, int stop, int low, int high)
        : entry_(entry), base_(0), count_(0) {
        for (; entry < stop; ++entry) {
            const std::int32_t* const words = call.entries + static_cast<std::int64_t>(entry) * 6;
            const std::int32_t* const positions = call.positions + words[1];
            const int tokens = words[2];
            if (tokens == 0 || positions[tokens - 1] < low) continue;
            const int from = lower_bound(positions, 0, tokens, low);
            const int end = positions[tokens - 1] <= high
                                ? tokens
                                : lower_bound(positions, from, tokens, high + 1);
            if (count_ == 0) {
                entry_ = entry;
                base_ = -from;
            }
            count_ += end - from;
            if (end < tokens) break;
        }
    }

    // Tokens of the stream.
    G2R_DEVICE int count() const { return count_; }

    // Their rows of q and of grad_out; to be asked for ever higher tokens in [0, count()).
    G2R_DEVICE void find(const std::int32_t* entries, int token, int& q_row, int& grad_row) {
        const std::int32_t* words = entries + static_cast<std::int64_t>(entry_) * 6;
        while (token - base_ >= words[2]) {
            base_ += words[2];
            ++entry_;
            words += 6;
        }
        q_row = words[1] + token - base_;
        grad_row = words[3] + (token - base_) * words[4];
    }

 private:
    int entry_, base_, count_;  // base_: where in the stream the entry's first token lies
};

// One thread for each row of a step of the stream: where it lies.
template <int rows>
G2R_DEVICE void look_up(QueryRows<rows>& to, int step, QueryWalk& walk,
                        const G2rAttentionBackward& call, int kv_head, int group) {
    const int thread = thread_index();
    if (thread >= rows || walk.count() == 0) return;
    const int row = min(step * rows + thread, walk.count() * group - 1), token = row / group;
    int q_row, grad_row;
    walk.find(call.entries, token, q_row, grad_row);
    const int head = kv_head * group + row - token * group;
    to.q_index[step % 2][thread] = q_row * call.heads + head;
    to.grad_index[step % 2][thread] = grad_row * call.heads + head;
    to.position[step % 3][thread] = call.positions[q_row];
}

// The same thread, behind look_up: the sums of its row.
template <int rows>
G2R_DEVICE void fetch_sums(QueryRows<rows>& to, int step, int stream,
                           const G2rAttentionBackward& call) {
    const int thread = thread_index();
    if (thread >= rows || stream == 0) return;
    const float lse = call.lse[to.q_index[step % 2][thread]];
    to.lse2[step % 2][thread] = step * rows + thread < stream ? lse * log2_e : infinity();
    to.delta[step % 2][thread] = call.delta[to.grad_index[step % 2][thread]];
}

// A tile of keys of one kv head and lane, and the stream of packed queries that see any of them.
template <int keys>
struct KeyTile {
    const std::int32_t* run;
    int kv_head, group;
    int first_key, last_key;  // of the tile, in the run
    int start;                // position of the run's first key
    QueryWalk walk;
    int stream;  // rows

    // `tile`: of the table of tiles.
    G2R_DEVICE KeyTile(const G2rAttentionBackward& call, const std::int32_t* tile)
        : run(call.key_runs + static_cast<std::int64_t>(tile[0]) * 7),
          kv_head(block_index_x() % call.kv_heads),
          group(call.heads / call.kv_heads),
          first_key(tile[1] * keys),
          last_key(min(first_key + keys, run[2]) - 1),
          start(run[1]),
          walk(call, run[5], run[6], start + first_key, start + last_key + call.window - 1),
          stream(walk.count() * group) {}

    // What the steps need in front of the first one; `seen`: the positions of the first and the
    // last key.
    template <int rows>
    G2R_DEVICE void begin(QueryRows<rows>& table, int* seen, const G2rAttentionBackward& call) {
        if (thread_index() == 0) {
            seen[0] = start + first_key;
            seen[1] = start + last_key;
        }
        look_up<rows>(table, 0, walk, call, kv_head, group);
        look_up<rows>(table, 1, walk, call, kv_head, group);
        fetch_sums<rows>(table, 0, stream, call);
        sync_block();
    }
};

// Writes the gradients of a tile of keys. Where they lie is read only here.
template <int dim, int keys, int m_tiles>
G2R_DEVICE void store_key_gradients(const G2rAttentionBackward& call,
                                    const float (&dk)[m_tiles][dim / 8][4],
                                    const float (&dv)[m_tiles][dim / 8][4]) {
    const int block = computed_here(block_index_x()), own_row = row_of_thread<m_tiles>();
    const std::int32_t* const tile =
        call.key_tiles + static_cast<std::int64_t>(block / call.kv_heads) * 2;
    const std::int32_t* const to = call.key_runs + static_cast<std::int64_t>(tile[0]) * 7;
    const int column = block % call.kv_heads * dim + (computed_here(thread_index()) & 3) * 2;
    G2R_UNROLL
    for (int m = 0; m < m_tiles; ++m) {
        G2R_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int key = tile[1] * keys + own_row + m * 16 + half * 8;
            if (key >= to[2]) continue;
            const std::int64_t row = to[3] + static_cast<std::int64_t>(key) * to[4];
            float* const dk_row = call.dk + row * call.kv_heads * dim + column;
            float* const dv_row = call.dv + row * call.kv_heads * dim + column;
            G2R_UNROLL
            for (int n = 0; n < dim / 8; ++n) {
                store_8(dk_row + n * 8, dk[m][n][half * 2], dk[m][n][half * 2 + 1]);
                store_8(dv_row + n * 8, dv[m][n][half * 2], dv[m][n][half * 2 + 1]);
            }
        }
    }
}

template <typename T, int dim, bool capped>
G2R_GLOBAL void G2R_LAUNCH_BOUNDS(attention_threads, 2)
    attention_backward_keys(const G2rAttentionBackward call, const float inverse_softcap) {
    using Shape = BackwardKeysShape<dim, capped>;
    constexpr int m_tiles = Shape::m_tiles, rows = Shape::rows, keys = Shape::keys;
    constexpr int q_bytes = Shape::q_bytes;
    char* const shared_k = shared_memory();
    char* const shared_v = shared_k + Shape::k_bytes;
    char* const shared_q = shared_v + Shape::k_bytes;  // [2][q, grad_out]
    QueryRows<rows>& table = *reinterpret_cast<QueryRows<rows>*>(shared_q + 4 * q_bytes);
    int* const seen = reinterpret_cast<int*>(&table + 1);  // positions of the first and last key

    KeyTile<keys> at(
        call, call.key_tiles + static_cast<std::int64_t>(block_index_x() / call.kv_heads) * 2);
    const int lane = lane_index(), warp = warp_index(), stream = at.stream;
    const T* const k = static_cast<const T*>(call.k) + at.kv_head * dim;
    const T* const v = static_cast<const T*>(call.v) + at.kv_head * dim;
    const int kv_stride = call.kv_heads * row_bytes<dim>;

    const int first = at.run[0] + at.first_key, last = at.run[0] + at.last_key;
    at.template begin<rows>(table, seen, call);
    copy_run<dim, keys>(shared_k, k, first, last, kv_stride);
    copy_run<dim, keys>(shared_v, v, first, last, kv_stride);
    if (stream > 0) {
        copy_rows<dim, rows>(shared_q, call.q, table.q_index[0], row_bytes<dim>);
        copy_rows<dim, rows>(shared_q + q_bytes, call.grad_out, table.grad_index[0],
                             row_bytes<dim>);
    }
    cp_async_commit();

    float dk[m_tiles][dim / 8][4], dv[m_tiles][dim / 8][4];
    set_zero(dk);
    set_zero(dv);
    const char* const warp_k = shared_k + warp * m_tiles * 16 * row_bytes<dim>;
    const char* const warp_v = shared_v + warp * m_tiles * 16 * row_bytes<dim>;
    const int warp_key = at.start + at.first_key + warp * m_tiles * 16 + lane / 4;

    const KeptLanes<dim> lanes;

    G2R_NO_UNROLL
    for (int row = 0; row < stream; row += rows) {
        cp_async_wait<0>();
        sync_block();  // this step's rows are there, and nobody reads the last step's
        const int step = row / rows;
        if (row + rows < stream) {
            char* const to = shared_q + (step + 1) % 2 * 2 * q_bytes;
            copy_rows<dim, rows>(to, call.q, table.q_index[(step + 1) % 2], row_bytes<dim>);
            copy_rows<dim, rows>(to + q_bytes, call.grad_out, table.grad_index[(step + 1) % 2],
                                 row_bytes<dim>);
        }
        cp_async_commit();
        fetch_sums<rows>(table, step + 1, stream, call);
        look_up<rows>(table, step + 2, at.walk, call, at.kv_head, at.group);

        const int* const position = table.position[step % 3];
        const int column = (lane & 3) * 2;
        const char* const tile_q = shared_q + step % 2 * 2 * q_bytes;
        const char* const tile_grad = tile_q + q_bytes;

        const bool masked = position[0] < seen[1] ||  // positions ascend
                            position[rows - 1] - call.window >= seen[0];
        float ds[m_tiles][rows / 8][4];
        set_zero(ds);
        product_nt<T, dim>(ds, warp_k, tile_q, lanes);
        float p[m_tiles][rows / 8][4];
        probabilities_of_columns<capped>(p, ds, table.lse2[step % 2] + column, call.softcap,
                                         inverse_softcap);
        if (masked) hide_columns(p, position + column, warp_key, call.window);
        product_nn<T, dim>(dv, p, tile_grad, lanes);
        if constexpr (capped) times_slope(p, ds);
        set_zero(ds);
        product_nt<T, dim>(ds, warp_v, tile_grad, lanes);
        centre_columns(ds, p, table.delta[step % 2] + column);
        product_nn<T, dim>(dk, ds, tile_q, lanes);
    }

    store_key_gradients<dim, keys, m_tiles>(call, dk, dv);
}

}  // namespace g2r::gpu
