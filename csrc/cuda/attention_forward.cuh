// Attention of one tile of packed queries of one kv head: one pass over the keys of their path,
// from the last to the first, with a running softmax.
//
// A tile of keys is 32 or 64 positions, whichever segments they lie in: only the thread that looks
// up the row of a key knows. K and V have one buffer each: while one is used, the other one is
// filled.
#pragma once

#include "attention.h"
#include "attention_tile.cuh"

namespace g2r::gpu {

template <int dim, bool capped>
struct ForwardShape {
    static constexpr int m_tiles = 2;
    static constexpr int rows = 4 * 16 * m_tiles;
    static constexpr int keys = capped && dim > 64 ? 32 : 64;  // the cap needs registers
    static constexpr int q_bytes = rows * row_bytes<dim>;
    static constexpr int k_bytes = keys * row_bytes<dim>;
    static constexpr int shared_bytes = q_bytes + 2 * k_bytes + (3 * rows + 2 * keys) * 4;
};

template <typename T, int dim, bool capped>
G2R_GLOBAL void G2R_LAUNCH_BOUNDS(attention_threads, 2)
    attention_forward(const G2rAttentionForward call) {
    using Shape = ForwardShape<dim, capped>;
    constexpr int m_tiles = Shape::m_tiles, rows = Shape::rows, keys = Shape::keys;
    char* const shared_q = shared_memory();
    char* const shared_k = shared_q + Shape::q_bytes;
    char* const shared_v = shared_k + Shape::k_bytes;
    int* const q_index = reinterpret_cast<int*>(shared_v + Shape::k_bytes);  // [rows]
    int* const position = q_index + rows;                                    // [rows]
    int* const out_index = position + rows;                                  // [rows], -1 of none
    int* const key_index = out_index + rows;                                 // [2][keys]

    const int kv_head = block_index_x() % call.kv_heads;
    const std::int32_t* const tile =
        call.tiles + static_cast<std::int64_t>(block_index_x() / call.kv_heads) * 4;
    const int group = call.heads / call.kv_heads;
    const int first = tile[1], first_row = tile[3] * rows, last_row = tile[2] * group - 1;
    const int thread = thread_index(), lane = lane_index(), warp = warp_index();
    const std::int32_t* const positions = call.positions + first;
    const int last_position = positions[min(first_row + rows - 1, last_row) / group];
    const int first_position = positions[first_row / group];
    const int last_key = last_position / keys * keys;
    const int first_key = max(0, first_position - call.window + 1) / keys * keys;

    const T* const k = static_cast<const T*>(call.k) + kv_head * dim;
    const T* const v = static_cast<const T*>(call.v) + kv_head * dim;
    const int kv_stride = call.kv_heads * row_bytes<dim>;

    PathWalk walk(tile[0]);
    for (int i = thread; i < rows; i += attention_threads) {
        const int row = min(first_row + i, last_row), token = row / group;
        q_index[i] = (first + token) * call.heads + kv_head * group + row - token * group;
        out_index[i] = first_row + i > last_row ? -1 : q_index[i];
        position[i] = positions[token];
    }
    if (thread < keys) {
        (key_index + last_key % (2 * keys))[thread] =
            walk.row(call.segments, min(last_key + thread, last_position));
    }
    sync_block();
    copy_rows<dim, rows>(shared_q, call.q, q_index, row_bytes<dim>);
    copy_rows<dim, keys>(shared_k, k, key_index + last_key % (2 * keys), kv_stride);
    cp_async_commit();

    float largest[m_tiles][2], total[m_tiles][2];
    G2R_UNROLL
    for (int m = 0; m < m_tiles; ++m) {
        G2R_UNROLL
        for (int half = 0; half < 2; ++half) {
            largest[m][half] = -infinity();
            total[m][half] = 0.0f;
        }
    }
    float out[m_tiles][dim / 8][4];
    set_zero(out);
    char* const warp_q = shared_q + warp * m_tiles * 16 * row_bytes<dim>;
    const int thread_row = warp * m_tiles * 16 + lane / 4;

    const KeptLanes<dim> lanes;

    G2R_NO_UNROLL
    for (int key = last_key; key >= first_key; key -= keys) {
        cp_async_wait<0>();
        sync_block();  // this tile's K is there, and nobody reads the last one's V
        copy_rows<dim, keys>(shared_v, v, key_index + key % (2 * keys), kv_stride);
        cp_async_commit();
        const bool more = key > first_key;
        int* const next_index = key_index + (key + keys) % (2 * keys);
        if (more && thread < keys) {
            next_index[thread] = walk.row(call.segments, key - keys + thread);
        }
        float p[m_tiles][keys / 8][4];
        set_zero(p);
        product_nt<T, dim>(p, warp_q, shared_k, lanes);
        cp_async_wait<0>();
        sync_block();  // V is there, and nobody reads K
        if (more) copy_rows<dim, keys>(shared_k, k, next_index, kv_stride);
        cp_async_commit();

        if constexpr (capped) {
            const float scale = 1.0f / call.softcap;
            G2R_UNROLL
            for (int m = 0; m < m_tiles; ++m) {
                G2R_UNROLL
                for (int n = 0; n < keys / 8; ++n) {
                    G2R_UNROLL
                    for (int c = 0; c < 4; ++c)
                        p[m][n][c] = call.softcap * tanh(p[m][n][c] * scale);
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
                            if (at > from || at <= hidden) p[m][n][half * 2 + i] = -infinity();
                        }
                    }
                }
            }
        }
        float shrink[m_tiles][2];
        bool shrinks = false;
        G2R_UNROLL
        for (int m = 0; m < m_tiles; ++m) {
            G2R_UNROLL
            for (int half = 0; half < 2; ++half) {
                float here = largest[m][half];
                G2R_UNROLL
                for (int n = 0; n < keys / 8; ++n) {
                    here = max(here, max(p[m][n][half * 2], p[m][n][half * 2 + 1]));
                }
                here = quad_max(here);
                // A row may see no key of the tiles so far.
                const float shift = here == -infinity() ? 0.0f : here * log2_e;
                shrink[m][half] = exp2(largest[m][half] * log2_e - shift);
                shrinks |= here != largest[m][half];
                largest[m][half] = here;
                float sum = 0.0f;
                G2R_UNROLL
                for (int n = 0; n < keys / 8; ++n) {
                    G2R_UNROLL
                    for (int c = half * 2; c < half * 2 + 2; ++c) {
                        p[m][n][c] = exp2(p[m][n][c] * log2_e - shift);
                        sum += p[m][n][c];
                    }
                }
                total[m][half] = total[m][half] * shrink[m][half] + sum;
            }
        }
        if (any_of_warp(shrinks)) {  // seldom, after the first tiles
            G2R_UNROLL
            for (int m = 0; m < m_tiles; ++m) {
                G2R_UNROLL
                for (int n = 0; n < dim / 8; ++n) {
                    G2R_UNROLL
                    for (int c = 0; c < 4; ++c) out[m][n][c] *= shrink[m][c / 2];
                }
            }
        }
        product_nn<T, dim>(out, p, shared_v, lanes);
    }

    int index[m_tiles][2];
    const int own_row = row_of_thread<m_tiles>();
    G2R_UNROLL
    for (int m = 0; m < m_tiles; ++m) {
        G2R_UNROLL
        for (int half = 0; half < 2; ++half) {
            index[m][half] = out_index[own_row + m * 16 + half * 8];
            const float sum = quad_sum(total[m][half]);
            const float scale = 1.0f / sum;
            G2R_UNROLL
            for (int n = 0; n < dim / 8; ++n) {
                out[m][n][half * 2] *= scale;
                out[m][n][half * 2 + 1] *= scale;
            }
            if ((lane & 3) == 0 && index[m][half] >= 0) {
                call.lse[index[m][half]] = largest[m][half] + log(sum);
            }
        }
    }
    store_rows<T, dim, m_tiles>(static_cast<T*>(call.out), index, out, warp_q);
}

}  // namespace g2r::gpu
