// Attention of one tile of packed queries of one kv head: one pass over the keys of their path,
// from the last to the first, with a running softmax.
//
// A tile of keys is 32 or 64 positions, whichever segments they lie in: only the thread that looks
// up the row of a key knows. K and V have one buffer each: while one is used, the other one is
// filled.
#pragma once

#include "attention.h"
#include "attention_rows.cuh"
#include "attention_scores.cuh"
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
    attention_forward(const G2rAttentionForward call, const float inverse_softcap) {
    using Shape = ForwardShape<dim, capped>;
    constexpr int m_tiles = Shape::m_tiles, rows = Shape::rows, keys = Shape::keys;
    char* const shared_q = shared_memory();
    char* const shared_k = shared_q + Shape::q_bytes;
    char* const shared_v = shared_k + Shape::k_bytes;
    int* const q_index = reinterpret_cast<int*>(shared_v + Shape::k_bytes);  // [rows]
    int* const position = q_index + rows;                                    // [rows]
    int* const out_index = position + rows;                                  // [rows], -1 of none
    int* const key_index = out_index + rows;                                 // [2][keys]

    const std::int32_t* const tile =
        call.tiles + static_cast<std::int64_t>(block_index_x() / call.kv_heads) * 4;
    const QueryTile<rows, keys> at(call, tile[1], tile[2], tile[3]);
    const int thread = thread_index(), lane = lane_index(), warp = warp_index();
    const int last_key = at.last_key, first_key = at.first_key;

    const T* const k = static_cast<const T*>(call.k) + at.kv_head * dim;
    const T* const v = static_cast<const T*>(call.v) + at.kv_head * dim;
    const int kv_stride = call.kv_heads * row_bytes<dim>;

    PathWalk walk(tile[0]);
    at.template for_each_row<attention_threads>([&](int i, int token, int head) {
        q_index[i] = (at.first + token) * call.heads + head;
        out_index[i] = at.first_row + i > at.last_row ? -1 : q_index[i];
        position[i] = at.positions[token];
    });
    if (thread < keys) {
        (key_index + last_key % (2 * keys))[thread] =
            walk.row(call.segments, min(last_key + thread, at.last_position));
    }
    sync_block();
    copy_rows<dim, rows>(shared_q, call.q, q_index, row_bytes<dim>);
    copy_rows<dim, keys>(shared_k, k, key_index + last_key % (2 * keys), kv_stride);
    cp_async_commit();

    RunningSoftmax<m_tiles> softmax;
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

        if constexpr (capped) cap_scores(p, call.softcap, inverse_softcap);
        if (key + keys - 1 > position[0] || key <= position[rows - 1] - call.window) {
            hide_scores(p, position + thread_row, key, call.window, -infinity());
        }
        float shrink[m_tiles][2];
        const bool shrinks = softmax.add(p, shrink);
        if (any_of_warp(shrinks)) scale_rows(out, shrink);  // seldom, after the first tiles
        product_nn<T, dim>(out, p, shared_v, lanes);
    }

    int index[m_tiles][2];
    const int own_row = row_of_thread<m_tiles>();
    G2R_UNROLL
    for (int m = 0; m < m_tiles; ++m) {
        G2R_UNROLL
        for (int half = 0; half < 2; ++half) {
            index[m][half] = out_index[own_row + m * 16 + half * 8];
        }
    }
    softmax.finish(out, index, call.lse);
    store_rows<T, dim, m_tiles>(static_cast<T*>(call.out), index, out, warp_q);
}

}  // namespace g2r::gpu
