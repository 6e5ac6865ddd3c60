// Gradient of one tile of packed queries of one kv head and lane: three products for each tile of
// keys on their path, and the sums of grad_out * out that the gradients of the keys need too.
#pragma once

#include "attention.h"
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

// p of a score; lse2 is in units of log 2.
G2R_DEVICE float probability(float s, float lse2) { return exp2(s * log2_e - lse2); }

template <typename T, int dim, bool capped>
G2R_GLOBAL void G2R_LAUNCH_BOUNDS(attention_threads, BackwardQueriesShape<dim>::blocks)
    attention_backward_queries(const G2rAttentionBackward call) {
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

    const int kv_head = block_index_x() % call.kv_heads;
    const std::int32_t* const tile =
        call.query_tiles + static_cast<std::int64_t>(block_index_x() / call.kv_heads) * 2;
    const std::int32_t* const entry = call.entries + static_cast<std::int64_t>(tile[0]) * 6;
    const int group = call.heads / call.kv_heads;
    const int first = entry[1], first_row = tile[1] * rows, last_row = entry[2] * group - 1;
    const int thread = thread_index(), lane = lane_index(), warp = warp_index();
    const std::int32_t* const positions = call.positions + first;
    const int last_position = positions[min(first_row + rows - 1, last_row) / group];
    const int first_position = positions[first_row / group];
    const int last_key = last_position / keys * keys;
    const int first_key = max(0, first_position - call.window + 1) / keys * keys;

    const T* const k = static_cast<const T*>(call.k) + kv_head * dim;
    const T* const v = static_cast<const T*>(call.v) + kv_head * dim;
    const int kv_stride = call.kv_heads * row_bytes<dim>;

    PathWalk walk(entry[0]);
    for (int i = thread; i < rows; i += attention_threads) {
        const int row = min(first_row + i, last_row), token = row / group;
        const int head = kv_head * group + row - token * group;
        q_index[i] = (first + token) * call.heads + head;
        grad_index[i] = (entry[3] + token * entry[4]) * call.heads + head;
        position[i] = positions[token];
    }
    if (thread < keys) {
        key_index[last_key % ring + thread] =
            walk.row(call.segments, min(last_key + thread, last_position));
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
                if (first_row + row <= last_row) call.delta[grad_at] = sum;
            }
        }
    }
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
        G2R_UNROLL
        for (int m = 0; m < m_tiles; ++m) {
            G2R_UNROLL
            for (int half = 0; half < 2; ++half) {
                const float shift = lse2[thread_row + m * 16 + half * 8];
                G2R_UNROLL
                for (int n = 0; n < keys / 8; ++n) {
                    G2R_UNROLL
                    for (int c = half * 2; c < half * 2 + 2; ++c) {
                        if constexpr (capped) {
                            const float share = tanh(ds[m][n][c] * (1.0f / call.softcap));
                            ds[m][n][c] =
                                probability(call.softcap * share, shift) * (1.0f - share * share);
                        } else {
                            ds[m][n][c] = probability(ds[m][n][c], shift);
                        }
                    }
                }
            }
        }
        if (key + keys - 1 > position[0] || key <= position[rows - 1] - call.window) {
            G2R_UNROLL
            for (int m = 0; m < m_tiles; ++m) {
                G2R_UNROLL
                for (int half = 0; half < 2; ++half) {
                    // Of the keys of this thread, those in [0, from] and not in [0, from - window].
                    const int from =
                        position[thread_row + m * 16 + half * 8] - key - (lane & 3) * 2;
                    const int hidden = from - call.window;
                    G2R_UNROLL
                    for (int n = 0; n < keys / 8; ++n) {
                        G2R_UNROLL
                        for (int i = 0; i < 2; ++i) {
                            const int at = n * 8 + i;
                            if (at > from || at <= hidden) ds[m][n][half * 2 + i] = 0.0f;
                        }
                    }
                }
            }
        }
        float dp[m_tiles][keys / 8][4];
        set_zero(dp);
        product_nt<T, dim>(dp, warp_grad, tile_k + k_bytes, lanes);
        G2R_UNROLL
        for (int m = 0; m < m_tiles; ++m) {
            G2R_UNROLL
            for (int half = 0; half < 2; ++half) {
                const float sum = delta[thread_row + m * 16 + half * 8];
                G2R_UNROLL
                for (int n = 0; n < keys / 8; ++n) {
                    G2R_UNROLL
                    for (int c = half * 2; c < half * 2 + 2; ++c) ds[m][n][c] *= dp[m][n][c] - sum;
                }
            }
        }
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
