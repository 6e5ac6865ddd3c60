// Tiles of rows as warpgroups multiply them, and their products: attention_tile.cuh for wgmma.
//
// A block has two warpgroups, and each owns 64 rows of the block's tile, each warp 16 of them:
// fragments of results are those of attention_tile.cuh with m_tiles = 1. A tile in shared memory is
// a panel of 64 columns, or two behind each other, and starts at a multiple of 1024 bytes.
#pragma once

#include "attention_tile.cuh"
#include "device_warpgroup.cuh"

namespace g2r::gpu {

constexpr int two_warpgroups = 2 * warpgroup_threads;

#if G2R_WARPGROUPS

template <int rows>
constexpr int panel_bytes = rows * 128;

// Where chunk `chunk` of 16 bytes of a row of a tile of `rows` rows lies.
template <int rows>
G2R_DEVICE int panel_place(int row, int chunk) {
    return (chunk >> 3) * panel_bytes<rows> + row * 128 + (((chunk ^ row) & 7) << 4);
}

// Starts copying rows index[0..rows) of a matrix of `dim` columns whose rows lie `stride` bytes
// apart.
template <int dim, int rows>
G2R_DEVICE void copy_to_panels(char* to, const void* from, const int* index, int stride) {
    constexpr int chunks = dim / 8, step = two_warpgroups / chunks;
    static_assert(step % 8 == 0 && rows % step == 0);
    const int row = thread_index() / chunks, chunk = thread_index() % chunks;
    const char* const base = static_cast<const char*>(from) + chunk * 16;
    char* const target = to + panel_place<rows>(row, chunk);
    G2R_UNROLL
    for (int i = 0; i < rows; i += step) {
        const std::uint64_t offset =
            static_cast<std::uint64_t>(static_cast<std::uint32_t>(index[row + i])) *
            static_cast<std::uint32_t>(stride);
        cp_async_16(target + i * 128, base + offset, true);
    }
}

// The same for rows that follow each other, `first` up to `last`, which is repeated.
template <int dim, int rows>
G2R_DEVICE void copy_run_to_panels(char* to, const void* from, int first, int last, int stride) {
    constexpr int chunks = dim / 8, step = two_warpgroups / chunks;
    const int row = thread_index() / chunks, chunk = thread_index() % chunks;
    const char* const base = static_cast<const char*>(from) + chunk * 16;
    char* const target = to + panel_place<rows>(row, chunk);
    G2R_UNROLL
    for (int i = 0; i < rows; i += step) {
        const std::int64_t at = min(first + row + i, last);
        cp_async_16(target + i * 128, base + at * stride, true);
    }
}

// This thread's copies are there, and may be read by products behind a barrier.
G2R_DEVICE void copies_for_products() {
    cp_async_wait<0>();
    fence_async_proxy();
}

// What takes a descriptor of a tile of `rows` rows from its columns 0 to 15 to 16 k, 16 k + 15.
template <int rows>
G2R_DEVICE constexpr int columns_on(int k) {
    return (k / 4 * panel_bytes<rows> + k % 4 * 32) >> 4;
}

// Starts d = a bT: `a` the first of 64 rows of a tile of a_rows rows, `b` a tile of 8 n_tiles rows;
// sums over dim columns.
template <typename T, int dim, int a_rows, int n_tiles>
G2R_DEVICE void start_product_nt(float (&d)[n_tiles][4], const char* a, const char* b) {
    constexpr int b_rows = 8 * n_tiles;
    const std::uint64_t left = matrix_descriptor(a, 16, 8 * 128);
    const std::uint64_t right = matrix_descriptor(b, 16, 8 * 128);
    G2R_UNROLL
    for (int k = 0; k < dim / 16; ++k) {
        wgmma<T, false>(d, left + columns_on<a_rows>(k), right + columns_on<b_rows>(k), k > 0);
    }
}

// The fragments of a as a left factor, rounded to T.
template <typename T, int n_tiles>
G2R_DEVICE void pack_left(std::uint32_t (&packed)[n_tiles / 2][4], const float (&a)[n_tiles][4]) {
    G2R_UNROLL
    for (int k = 0; k < n_tiles / 2; ++k) {
        packed[k][0] = pack<T>(a[2 * k][0], a[2 * k][1]);
        packed[k][1] = pack<T>(a[2 * k][2], a[2 * k][3]);
        packed[k][2] = pack<T>(a[2 * k + 1][0], a[2 * k + 1][1]);
        packed[k][3] = pack<T>(a[2 * k + 1][2], a[2 * k + 1][3]);
    }
}

// Starts d += a b: `b` a tile of 16 k_tiles rows of dim columns, one row for each column of a.
template <typename T, int dim, int k_tiles>
G2R_DEVICE void start_product_nn(float (&d)[dim / 8][4], const std::uint32_t (&a)[k_tiles][4],
                                 const char* b) {
    const std::uint64_t right = matrix_descriptor(b, panel_bytes<16 * k_tiles>, 8 * 128);
    G2R_UNROLL
    for (int k = 0; k < k_tiles; ++k) {
        wgmma<T, true>(d, a[k], right + k * (16 * 128 >> 4), true);
    }
}

#endif  // G2R_WARPGROUPS

}  // namespace g2r::gpu
