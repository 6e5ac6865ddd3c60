// attention_backward_keys.cuh by warpgroups: the products with the queries of one step run beside
// the scores of the next one.
#pragma once

#include "attention.h"
#include "attention_backward_keys.cuh"
#include "attention_scores.cuh"
#include "warpgroup_tile.cuh"

namespace g2r::gpu {

template <int dim, bool capped>
struct WarpgroupKeysShape {
    static constexpr int keys = 128;
    static constexpr int rows =
        capped && dim == 128 ? 32 : 64;  // of a step; the cap needs registers
    static constexpr int stages = 3;  // one is read by products still, one is read, one is filled
    static constexpr int k_bytes = keys * row_bytes<dim>;
    static constexpr int q_bytes = rows * row_bytes<dim>;
    static constexpr int shared_bytes =
        2 * k_bytes + 2 * stages * q_bytes + static_cast<int>(sizeof(QueryRows<rows>)) + 8;
};

template <typename T, int dim, bool capped>
G2R_GLOBAL void G2R_LAUNCH_BOUNDS(two_warpgroups, 1)
    warpgroup_backward_keys(const G2rAttentionBackward call, const float inverse_softcap) {
#if G2R_WARPGROUPS
    using Shape = WarpgroupKeysShape<dim, capped>;
    constexpr int rows = Shape::rows, keys = Shape::keys, q_bytes = Shape::q_bytes;
    constexpr int stages = Shape::stages;
    char* const shared_k = shared_memory();
    char* const shared_v = shared_k + Shape::k_bytes;
    char* const shared_q = shared_v + Shape::k_bytes;  // [stages][q, grad_out]
    QueryRows<rows>& table = *reinterpret_cast<QueryRows<rows>*>(shared_q + 2 * stages * q_bytes);
    int* const seen = reinterpret_cast<int*>(&table + 1);  // positions of the first and last key

    KeyTile<keys> at(
        call, call.key_tiles + static_cast<std::int64_t>(block_index_x() / call.kv_heads) * 2);
    const int lane = lane_index(), warp = warp_index(), stream = at.stream;
    const T* const k = static_cast<const T*>(call.k) + at.kv_head * dim;
    const T* const v = static_cast<const T*>(call.v) + at.kv_head * dim;
    const int kv_stride = call.kv_heads * row_bytes<dim>;

    const int first = at.run[0] + at.first_key, last = at.run[0] + at.last_key;
    at.template begin<rows>(table, seen, call);
    copy_run_to_panels<dim, keys>(shared_k, k, first, last, kv_stride);
    copy_run_to_panels<dim, keys>(shared_v, v, first, last, kv_stride);
    if (stream > 0) {
        copy_to_panels<dim, rows>(shared_q, call.q, table.q_index[0], row_bytes<dim>);
        copy_to_panels<dim, rows>(shared_q + q_bytes, call.grad_out, table.grad_index[0],
                                  row_bytes<dim>);
    }
    cp_async_commit();

    float dk[1][dim / 8][4], dv[1][dim / 8][4], s[1][rows / 8][4], ds[1][rows / 8][4];
    set_zero(dk);
    set_zero(dv);
    set_zero(s);
    set_zero(ds);
    std::uint32_t left[2][rows / 16][4];  // p, and gradients of scores
    const char* const group_k = shared_k + warp / 4 * 64 * 128;
    const char* const group_v = shared_v + warp / 4 * 64 * 128;
    const int warp_key = at.start + at.first_key + warp * 16 + lane / 4;
    const int column = (lane & 3) * 2;

    int stage = 0;
    G2R_NO_UNROLL
    for (int row = 0; row < stream; row += rows) {
        copies_for_products();
        sync_block();  // this step's rows are there, and products have read the last step but one
        const int step = row / rows;
        const char* const tile_q = shared_q + stage * 2 * q_bytes;
        const char* const tile_grad = tile_q + q_bytes;
        stage = stage + 1 == stages ? 0 : stage + 1;
        wgmma_registers(s[0], ds[0]);
        wgmma_fence();
        start_product_nt<T, dim, keys>(s[0], group_k, tile_q);
        wgmma_commit();
        start_product_nt<T, dim, keys>(ds[0], group_v, tile_grad);
        wgmma_commit();
        if (row + rows < stream) {
            char* const to = shared_q + stage * 2 * q_bytes;
            copy_to_panels<dim, rows>(to, call.q, table.q_index[(step + 1) % 2], row_bytes<dim>);
            copy_to_panels<dim, rows>(to + q_bytes, call.grad_out, table.grad_index[(step + 1) % 2],
                                      row_bytes<dim>);
        }
        cp_async_commit();
        fetch_sums<rows>(table, step + 1, stream, call);
        look_up<rows>(table, step + 2, at.walk, call, at.kv_head, at.group);
        const int* const position = table.position[step % 3];
        const bool masked = position[0] < seen[1] ||  // positions ascend
                            position[rows - 1] - call.window >= seen[0];

        wgmma_wait<1>();  // for the last step's dk and dv too
        wgmma_registers(s[0]);
        float p[1][rows / 8][4];
        probabilities_of_columns<capped>(p, s, table.lse2[step % 2] + column, call.softcap,
                                         inverse_softcap);
        if (masked) hide_columns(p, position + column, warp_key, call.window);
        pack_left<T>(left[0], p[0]);
        wgmma_registers(dv[0], left[0]);
        wgmma_fence();
        start_product_nn<T, dim>(dv[0], left[0], tile_grad);
        wgmma_commit();
        if constexpr (capped) times_slope(p, s);
        wgmma_wait<1>();
        wgmma_registers(ds[0]);
        centre_columns(ds, p, table.delta[step % 2] + column);
        pack_left<T>(left[1], ds[0]);
        wgmma_registers(dk[0], left[1]);
        wgmma_fence();
        start_product_nn<T, dim>(dk[0], left[1], tile_q);
        wgmma_commit();
    }
    wgmma_wait<0>();
    wgmma_registers(dk[0], dv[0]);
    store_key_gradients<dim, keys, 1>(call, dk, dv);
#else
    without_warpgroups(call, inverse_softcap);
#endif
}

}  // namespace g2r::gpu
