// attention_forward.cuh by warpgroups: while the tensor cores make the scores of a tile of keys and
// the output of the tile before, the threads take the exponentials.
#pragma once

#include "attention.h"
#include "attention_forward.cuh"
#include "attention_rows.cuh"
#include "attention_scores.cuh"
#include "warpgroup_tile.cuh"

namespace g2r::gpu {

template <int dim, bool capped>
struct WarpgroupForwardShape {
    static constexpr int rows = 128;
    // With heads of 64 two blocks fit on a multiprocessor; the cap needs registers.
    static constexpr int keys = capped || dim == 64 ? 64 : 128;
    static constexpr int blocks = dim == 64 ? 2 : 1;
    static constexpr int q_bytes = rows * row_bytes<dim>;
    static constexpr int k_bytes = keys * row_bytes<dim>;
    static constexpr int slots = 4;  // of key_index
    static constexpr int shared_bytes = q_bytes + 4 * k_bytes + (3 * rows + slots * keys) * 4;
};

template <typename T, int dim, bool capped>
G2R_GLOBAL void G2R_LAUNCH_BOUNDS(two_warpgroups, (WarpgroupForwardShape<dim, capped>::blocks))
    warpgroup_forward(const G2rAttentionForward call, const float inverse_softcap) {
#if G2R_WARPGROUPS
    using Shape = WarpgroupForwardShape<dim, capped>;
    constexpr int rows = Shape::rows, keys = Shape::keys, k_bytes = Shape::k_bytes;
    constexpr int ring = Shape::slots * keys;
    char* const shared_q = shared_memory();
    char* const shared_k = shared_q + Shape::q_bytes;                     // [2]
    char* const shared_v = shared_k + 2 * k_bytes;                        // [2]
    int* const q_index = reinterpret_cast<int*>(shared_v + 2 * k_bytes);  // [rows]
    int* const position = q_index + rows;                                 // [rows]
    int* const out_index = position + rows;                               // [rows], -1 of none
    int* const key_index = out_index + rows;                              // [slots][keys]

    const std::int32_t* const tile =
        call.tiles + static_cast<std::int64_t>(block_index_x() / call.kv_heads) * 4;
    const QueryTile<rows, keys> at(call, tile[1], tile[2], tile[3]);
    const int thread = thread_index(), lane = lane_index(), warp = warp_index();
    const int last_key = at.last_key, first_key = at.first_key;

    const T* const k = static_cast<const T*>(call.k) + at.kv_head * dim;
    const T* const v = static_cast<const T*>(call.v) + at.kv_head * dim;
    const int kv_stride = call.kv_heads * row_bytes<dim>;

    PathWalk walk(tile[0]);
    at.template for_each_row<two_warpgroups>([&](int i, int token, int head) {
        q_index[i] = (at.first + token) * call.heads + head;
        out_index[i] = at.first_row + i > at.last_row ? -1 : q_index[i];
        position[i] = at.positions[token];
    });
    // Tile i of keys starts at last_key - i * keys; its indices lie in slot i % slots, k and v in
    // buffer i % 2.
    if (thread < keys) {
        G2R_UNROLL
        for (int i = 0; i < 3; ++i) {
            key_index[i * keys + thread] =
                walk.row(call.segments, min(last_key - i * keys + thread, at.last_position));
        }
    }
    sync_block();
    copy_to_panels<dim, rows>(shared_q, call.q, q_index, row_bytes<dim>);
    copy_to_panels<dim, keys>(shared_k, k, key_index, kv_stride);
    cp_async_commit();

    RunningSoftmax<1> softmax;
    float out[1][dim / 8][4], s[1][keys / 8][4];
    set_zero(out);
    set_zero(s);
    std::uint32_t p[keys / 16][4];
    const char* const group_q = shared_q + warp / 4 * 64 * 128;
    const int* const position_here = position + warp * 16 + lane / 4;
    const int* const group_position = position + warp / 4 * 64;
    float shrink[1][2];

    // Scores of tile `key` become p / exp(largest); whether sums are to shrink.
    const auto weigh = [&](int key) {
        if constexpr (capped) cap_scores(s, call.softcap, inverse_softcap);
        if (key + keys - 1 > group_position[0] || key <= group_position[63] - call.window) {
            hide_scores(s, position_here, key, call.window, -infinity());
        }
        return softmax.add(s, shrink);
    };

    copies_for_products();
    sync_block();
    wgmma_registers(s[0]);
    wgmma_fence();
    start_product_nt<T, dim, rows>(s[0], group_q, shared_k);
    wgmma_commit();
    if (last_key > first_key) {
        copy_to_panels<dim, keys>(shared_k + k_bytes, k, key_index + keys, kv_stride);
    }
    copy_to_panels<dim, keys>(shared_v, v, key_index, kv_stride);
    cp_async_commit();
    wgmma_wait<0>();
    wgmma_registers(s[0]);
    weigh(last_key);
    pack_left<T>(p, s[0]);

    int i = 0;
    G2R_NO_UNROLL
    for (int key = last_key - keys; key >= first_key; key -= keys, ++i) {
        copies_for_products();
        sync_block();  // K of this tile and V of the one before; nobody reads the others
        wgmma_registers(s[0], out[0], p);
        wgmma_fence();
        start_product_nt<T, dim, rows>(s[0], group_q, shared_k + (i + 1) % 2 * k_bytes);
        wgmma_commit();
        start_product_nn<T, dim>(out[0], p, shared_v + i % 2 * k_bytes);
        wgmma_commit();
        if (key > first_key) {
            copy_to_panels<dim, keys>(shared_k + i % 2 * k_bytes, k,
                                      key_index + (i + 2) * keys % ring, kv_stride);
        }
        copy_to_panels<dim, keys>(shared_v + (i + 1) % 2 * k_bytes, v,
                                  key_index + (i + 1) * keys % ring, kv_stride);
        cp_async_commit();
        if (thread < keys) {
            key_index[(i + 3) * keys % ring + thread] =
                walk.row(call.segments, key - 2 * keys + thread);
        }
        wgmma_wait<1>();
        wgmma_registers(s[0]);
        const bool shrinks = weigh(key);
        wgmma_wait<0>();
        wgmma_registers(out[0], s[0]);                      // p is written only now
        if (any_of_warp(shrinks)) scale_rows(out, shrink);  // seldom, after the first tiles
        pack_left<T>(p, s[0]);
    }
    copies_for_products();
    sync_block();
    wgmma_registers(out[0], p);
    wgmma_fence();
    start_product_nn<T, dim>(out[0], p, shared_v + i % 2 * k_bytes);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_registers(out[0]);

    const int own_row = warp * 16 + lane / 4;
    const int index[1][2] = {{out_index[own_row], out_index[own_row + 8]}};
    softmax.finish(out, index, call.lse);
    store_rows<T, dim, 1>(static_cast<T*>(call.out), index, out,
                          shared_q + warp * 16 * row_bytes<dim>);
#else
    without_warpgroups(call, inverse_softcap);
#endif
}

}  // namespace g2r::gpu
