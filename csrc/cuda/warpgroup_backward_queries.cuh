// attention_backward_queries.cuh by warpgroups: the product with the keys of one tile runs beside
// the scores of the next one.
#pragma once

#include "attention.h"
#include "attention_backward_queries.cuh"
#include "attention_rows.cuh"
#include "attention_scores.cuh"
#include "warpgroup_tile.cuh"

namespace g2r::gpu {

template <int dim>
struct WarpgroupQueriesShape {
    static constexpr int rows = 128;
    static constexpr int keys = 64;
    static constexpr int stages = 3;  // one is read by products still, one is read, one is filled
    static constexpr int q_bytes = rows * row_bytes<dim>;
    static constexpr int k_bytes = keys * row_bytes<dim>;
    static constexpr int slots = 4;  // of key_index; three are in use
    static constexpr int shared_bytes =
        2 * q_bytes + 2 * stages * k_bytes + (5 * rows + slots * keys) * 4;
};

template <typename T, int dim, bool capped>
G2R_GLOBAL void G2R_LAUNCH_BOUNDS(two_warpgroups, 1)
    warpgroup_backward_queries(const G2rAttentionBackward call, const float inverse_softcap) {
#if G2R_WARPGROUPS
    using Shape = WarpgroupQueriesShape<dim>;
    constexpr int rows = Shape::rows, keys = Shape::keys, k_bytes = Shape::k_bytes;
    constexpr int stages = Shape::stages, ring = Shape::slots * keys;
    char* const shared_q = shared_memory();
    char* const shared_grad = shared_q + Shape::q_bytes;
    char* const shared_kv = shared_grad + Shape::q_bytes;  // [stages][k, v]
    int* const q_index = reinterpret_cast<int*>(shared_kv + 2 * stages * k_bytes);  // [rows]
    int* const grad_index = q_index + rows;                                         // [rows]
    int* const position = grad_index + rows;                                        // [rows]
    float* const lse2 = reinterpret_cast<float*>(position + rows);                  // [rows]
    float* const delta = lse2 + rows;                                               // [rows]
    int* const key_index = reinterpret_cast<int*>(delta + rows);                    // [slots][keys]

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
    at.template for_each_row<two_warpgroups>([&](int i, int token, int head) {
        q_index[i] = (at.first + token) * call.heads + head;
        grad_index[i] = (entry[3] + token * entry[4]) * call.heads + head;
        position[i] = at.positions[token];
    });
    // Tile i of keys starts at last_key - i * keys; its indices lie in slot i % slots.
    if (thread < keys) {
        key_index[thread] = walk.row(call.segments, min(last_key + thread, at.last_position));
        key_index[keys + thread] = walk.row(call.segments, last_key - keys + thread);
    }
    sync_block();
    copy_to_panels<dim, rows>(shared_q, call.q, q_index, row_bytes<dim>);
    copy_to_panels<dim, rows>(shared_grad, call.grad_out, grad_index, row_bytes<dim>);
    copy_to_panels<dim, keys>(shared_kv, k, key_index, kv_stride);
    copy_to_panels<dim, keys>(shared_kv + k_bytes, v, key_index, kv_stride);
    cp_async_commit();

    const int thread_row = warp * 16 + lane / 4;
    sum_rows<T, dim, 1>(call, q_index, grad_index, thread_row, at.last_row - at.first_row, lse2,
                        delta);
    float dq[1][dim / 8][4], ds[1][keys / 8][4], dp[1][keys / 8][4];
    set_zero(dq);
    set_zero(ds);
    set_zero(dp);
    std::uint32_t left[keys / 16][4];
    const char* const group_q = shared_q + warp / 4 * 64 * 128;
    const char* const group_grad = shared_grad + warp / 4 * 64 * 128;
    const int* const group_position = position + warp / 4 * 64;

    int stage = 0, slot = 0;
    G2R_NO_UNROLL
    for (int key = last_key; key >= first_key; key -= keys) {
        copies_for_products();
        sync_block();  // this tile is there, and products have read the last but one
        const char* const tile_k = shared_kv + stage * 2 * k_bytes;
        stage = stage + 1 == stages ? 0 : stage + 1;
        wgmma_registers(ds[0], dp[0]);
        wgmma_fence();
        start_product_nt<T, dim, rows>(ds[0], group_q, tile_k);
        wgmma_commit();
        start_product_nt<T, dim, rows>(dp[0], group_grad, tile_k + k_bytes);
        wgmma_commit();
        if (key > first_key) {
            char* const next = shared_kv + stage * 2 * k_bytes;
            const int* const index = key_index + (slot + keys) % ring;
            copy_to_panels<dim, keys>(next, k, index, kv_stride);
            copy_to_panels<dim, keys>(next + k_bytes, v, index, kv_stride);
        }
        cp_async_commit();
        if (thread < keys) {
            key_index[(slot + 2 * keys) % ring + thread] =
                walk.row(call.segments, key - 2 * keys + thread);
        }
        slot = (slot + keys) % ring;

        wgmma_wait<1>();  // for the last tile's dq too
        wgmma_registers(ds[0]);
        slopes_of_scores<capped>(ds, lse2 + thread_row, call.softcap, inverse_softcap);
        if (key + keys - 1 > group_position[0] || key <= group_position[63] - call.window) {
            hide_scores(ds, position + thread_row, key, call.window, 0.0f);
        }
        wgmma_wait<0>();
        wgmma_registers(dp[0]);
        times_centred(ds, dp, delta + thread_row);
        pack_left<T>(left, ds[0]);
        wgmma_registers(dq[0], left);
        wgmma_fence();
        start_product_nn<T, dim>(dq[0], left, tile_k);
        wgmma_commit();
    }
    wgmma_wait<0>();
    wgmma_registers(dq[0]);
    sync_block();  // nobody reads q

    const int index[1][2] = {
        {at.first_row + thread_row > at.last_row ? -1 : grad_index[thread_row],
         at.first_row + thread_row + 8 > at.last_row ? -1 : grad_index[thread_row + 8]}};
    store_rows<T, dim, 1>(static_cast<T*>(call.dq), index, dq,
                          shared_q + warp * 16 * row_bytes<dim>);
#else
    without_warpgroups(call, inverse_softcap);
#endif
}

}  // namespace g2r::gpu
