// Gradient of one tile of packed queries of one kv head and lane: three products for each tile of
// keys on their path, and the sums of grad_out * out that the gradients of the keys need too.
#pragma once

#include "attention.h"
#include "attention_rows.cuh"
#include "attention_scores.cuh"
#include "attention_tile.cuh"

namespace g2r::gpu {

template <int dim>
struct BackwardQueriesShape {
    static constexpr int m_tiles = 2;
    static constexpr int rows = 4 * 16 * m_tiles;
    static constexpr int keys = 32;
    static constexpr int blocks = dim <= 64 ? 2 : 2;  // of a multiprocessor: bounds the registers
    static constexpr int q_bytes = rows * row_bytes<dim>;
    static constexpr int k_bytes = keys * row_bytes<dim>;
    static constexpr int slots = 4;  // of key_index; three are in use
    static constexpr int shared_bytes = 2 * q_bytes + 4 * k_bytes + (5 * rows + slots * keys) * 4;
};

// For the thread's rows of a tile: lse in units of log 2, and delta, the sum of grad_out * out,
// which goes to call.delta too where the row is not behind the last one.
template <typename T, int dim, int m_tiles>
G2R_DEVICE void sum_rows(const G2rAttentionBackward& call, const int* q_index,
                         const int* grad_index, int thread_row, int last, float* lse2,
                         float* delta) {
    const int lane = lane_index();
    G2R_UNROLL
    for (int m = 0; m < m_tiles; ++m) {
        G2R_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int row = thread_row + m * 16 + half * 8;
            const std::int64_t at = q_index[row], grad_at = grad_index[row];
            const T* const out_row = static_cast<const T*>(call.out) + at * dim;
            const T* const grad_row = static_cast<const T*>(call.grad_out) + grad_at * dim;
            float sum = 0.0f;
            G2R_UNROLL
            for (int chunk = 0; chunk < dim / 8; chunk += 4) {
                const Words left = load_16(out_row + (chunk + (lane & 3)) * 8);
                const Words right = load_16(grad_row + (chunk + (lane & 3)) * 8);
                G2R_UNROLL
                for (int i = 0; i < 4; ++i) {
                    float a, b, c, d;
                    unpack<T>(left.word[i], a, b);
                    unpack<T>(right.word[i], c, d);
                    sum += a * c;
                    sum += b * d;
                }
            }
            sum = quad_sum(sum);
            if ((lane & 3) == 0) {
                lse2[row] = call.lse[at] * log2_e;
                delta[row] = sum;
                if (row <= last) call.delta[grad_at] = sum;
            }
        }
    }
}

template <typename T, int dim, bool capped>
G2R_GLOBAL void G2R_LAUNCH_BOUNDS(attention_threads, BackwardQueriesShape<dim>::blocks)
    attention_backward_queries(const G2rAttentionBackward call, const float inverse_softcap) {
    using Shape = BackwardQueriesShape<dim>;
    constexpr int m_tiles = Shape::m_tiles, rows = Shape::rows, keys = Shape::keys;
    constexpr int k_bytes = Shape::k_bytes, ring = Shape::slots * keys;
    char* const shared_q = shared_memory();
    char* const shared_grad = shared_q + Shape::q_bytes;
    char* const shared_kv = shared_grad + Shape::q_bytes;                  // [2][k, v]
    int* const q_index = reinterpret_cast<int*>(shared_kv + 4 * k_bytes);  // [rows]
    int* const grad_index = q_index + rows;                                // [rows]
    int* const position = grad_index + rows;                               // [rows]
    float* const lse2 = reinterpret_cast<float*>(position + rows);         // [rows]
    float* const delta = lse2 + rows;                                      // [rows]
    int* const key_index = reinterpret_cast<int*>(delta + rows);           // [slots][keys]

    const std::int32_t* const tile =
        call.query_tiles + static_cast<std::int64_t>(block_index_x() / call.kv_heads) * 2;
    const std::int32_t* const entry = call.entries + static_cast<std::int64_t>(tile[0]) * 6;
    const QueryTile<rows, keys> at(call, entry[1], entry[2], tile[1]);
    const int thread = thread_index(), lane = lane_index(), warp = warp_index();
    const int last_key = at.last_key, first_key = at.first_key;

    const T* const k = static_cast<const T*>(call.k) + at.kv_head * dim;
    const T* const v = static_cast<const T*>(call.v) + at.kv_head * dim;
    const int kv_stride = call.kv_heads * row_bytes<dim>;

    PathWalk walk(entry[0]);
    at.template for_each_row<attention_threads>([&](int i, int token, int head) {
        q_index[i] = (at.first + token) * call.heads + head;
        grad_index[i] = (entry[3] + token * entry[4]) * call.heads + head;
        position[i] = at.positions[token];
    });
    if (thread < keys) {
        key_index[last_key % ring + thread] =
            walk.row(call.segments, min(last_key + thread, at.last_position));
        key_index[(last_key + 3 * keys) % ring + thread] =
            walk.row(call.segments, last_key - keys + thread);
    }
    sync_block();
    copy_rows<dim, rows>(shared_q, call.q, q_index, row_bytes<dim>);
    copy_rows<dim, rows>(shared_grad, call.grad_out, grad_index, row_bytes<dim>);
    char* const last_k = shared_kv + last_key / keys % 2 * 2 * k_bytes;
    copy_rows<dim, keys>(last_k, k, key_index + last_key % ring, kv_stride);
    copy_rows<dim, keys>(last_k + k_bytes, v, key_index + last_key % ring, kv_stride);
    cp_async_commit();

    const int thread_row = warp * m_tiles * 16 + lane / 4;
    sum_rows<T, dim, m_tiles>(call, q_index, grad_index, thread_row, at.last_row - at.first_row,
                              lse2, delta);
    float dq[m_tiles][dim / 8][4];
    set_zero(dq);
    char* const warp_q = shared_q + warp * m_tiles * 16 * row_bytes<dim>;
    const char* const warp_grad = shared_grad + warp * m_tiles * 16 * row_bytes<dim>;

    const ComputedLanes<dim> lanes;

    G2R_NO_UNROLL
    for (int key = last_key; key >= first_key; key -= keys) {
        cp_async_wait<0>();
        sync_block();  // this tile is there, and nobody reads the last one
        const char* const tile_k = shared_kv + key / keys % 2 * 2 * k_bytes;
        if (key > first_key) {
            char* const next = shared_kv + (key / keys + 1) % 2 * 2 * k_bytes;
            const int* const index = key_index + (key + 3 * keys) % ring;
            copy_rows<dim, keys>(next, k, index, kv_stride);
            copy_rows<dim, keys>(next + k_bytes, v, index, kv_stride);
        }
        cp_async_commit();
        if (thread < keys) {
            key_index[(key + 2 * keys) % ring + thread] =
                walk.row(call.segments, key - 2 * keys + thread);
        }

        float ds[m_tiles][keys / 8][4];
        set_zero(ds);
        product_nt<T, dim>(ds, warp_q, tile_k, lanes);
        slopes_of_scores<capped>(ds, lse2 + thread_row, call.softcap, inverse_softcap);
        if (key + keys - 1 > position[0] || key <= position[rows - 1] - call.window) {
            hide_scores(ds, position + thread_row, key, call.window, 0.0f);
        }
        float dp[m_tiles][keys / 8][4];
        set_zero(dp);
        product_nt<T, dim>(dp, warp_grad, tile_k + k_bytes, lanes);
        times_centred(ds, dp, delta + thread_row);
        product_nn<T, dim>(dq, ds, tile_k, lanes);
    }

    int index[m_tiles][2];
    const int own_row = row_of_thread<m_tiles>();
    // How many rows there are is read again only now.
    const std::int32_t* const here =
        call.query_tiles +
        static_cast<std::int64_t>(computed_here(block_index_x()) / call.kv_heads) * 2;
    const int tokens = call.entries[static_cast<std::int64_t>(here[0]) * 6 + 2];
    const int stop = tokens * (call.heads / call.kv_heads) - here[1] * rows;
    G2R_UNROLL
    for (int m = 0; m < m_tiles; ++m) {
        G2R_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int row = own_row + m * 16 + half * 8;
            index[m][half] = row < stop ? grad_index[row] : -1;
        }
    }
    store_rows<T, dim, m_tiles>(static_cast<T*>(call.dq), index, dq, warp_q);
}

}  // namespace g2r::gpu
