// The entry points of the attention kernels, in plain C: no CUDA type, no torch type.
//
// Attention is causal over the paths of a trie of segments, with grouped queries and an optional
// window and soft cap, on bfloat16 (dtype 0) or float16 (dtype 1) and head_dim 64 or 128; see
// g2r_fast/ops.py for what is computed. All memory is dense and on the device. The tables are those
// of g2r_fast/device_tables.py, int32 and made for the tile sizes that g2r_tile_sizes tells for the
// same `products`.
//
// Every function that returns an int returns 0, a cudaError_t, or one of the errors below.
#pragma once

#include <stdint.h>

#define G2R_INTERFACE 2

#if defined(__GNUC__)
#define G2R_EXPORT __attribute__((visibility("default")))
#else
#define G2R_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum G2rError {
    G2R_BAD_DTYPE = 10001,
    G2R_BAD_HEAD_DIM,
    G2R_BAD_HEADS,    // heads is no multiple of kv_heads, or not positive
    G2R_BAD_SIZE,     // a negative size, or rows * heads beyond int32
    G2R_BAD_GRID,     // tiles * kv_heads beyond int32
    G2R_BAD_WINDOW,   // not positive
    G2R_BAD_SOFTCAP,  // negative, or not finite
    G2R_NULL_POINTER,
    G2R_BAD_ALIGNMENT,  // rows of 16-bit elements start at multiples of 16 bytes
    G2R_NO_SUCH_KERNEL,
    G2R_BAD_PRODUCTS,  // neither of the two, or wgmma on what is not compute capability 9.0
};

// How tiles are multiplied: by warps, on every GPU from sm_80 on, or by Hopper's warpgroups.
enum G2rProducts { G2R_MMA = 0, G2R_WGMMA = 1 };

// window: keys that a query sees, itself among them; INT32_MAX for all. softcap 0: none.
typedef struct G2rAttentionForward {
    const void* q;  // [queries, heads, head_dim], scaled and rotated
    const void* k;  // [keys, kv_heads, head_dim]
    const void* v;
    void* out;                 // [queries, heads, head_dim]
    float* lse;                // [queries, heads], natural logarithm
    const int32_t* segments;   // [., 4]
    const int32_t* positions;  // [queries]
    const int32_t* tiles;      // [tile_count, 4]
    int64_t queries, keys;
    int32_t tile_count;
    int32_t heads, kv_heads, head_dim;
    int32_t dtype;
    int32_t products;  // G2rProducts
    int32_t window;
    float softcap;
} G2rAttentionForward;

typedef struct G2rAttentionBackward {
    const void* q;
    const void* k;
    const void* v;
    const void* out;
    const float* lse;
    const void* grad_out;  // [rows, heads, head_dim]
    void* dq;              // [rows, heads, head_dim]
    float* dk;             // [key_rows, kv_heads, head_dim]
    float* dv;
    float* delta;  // [rows, heads], scratch: sums of grad_out * out over head_dim
    const int32_t* segments;
    const int32_t* positions;
    const int32_t* entries;      // [., 6]
    const int32_t* query_tiles;  // [query_tile_count, 2]
    const int32_t* key_runs;     // [., 7]
    const int32_t* key_tiles;    // [key_tile_count, 2]
    int64_t queries, keys, rows, key_rows;
    int32_t query_tile_count, key_tile_count;
    int32_t heads, kv_heads, head_dim;
    int32_t dtype;
    int32_t products;  // G2rProducts
    int32_t window;
    float softcap;
} G2rAttentionBackward;

// What the tables are made for.
typedef struct G2rTileSizes {
    int32_t forward_rows;   // packed rows of a forward tile
    int32_t backward_rows;  // packed rows of a query tile of the backward
    int32_t backward_keys;  // keys of a key tile of the backward
} G2rTileSizes;

typedef struct G2rKernel {
    const char* name;
    int32_t threads;
    int32_t shared_bytes;  // dynamic
    int32_t architecture;  // the only one that has code of it; 0: all from sm_80 on
} G2rKernel;

G2R_EXPORT int g2r_interface(void);
G2R_EXPORT const char* g2r_device(void);  // "cuda", or "cpu" where the kernels are emulated
// Whether the kernels load on the current device: an old driver has another opinion than nvcc.
G2R_EXPORT int g2r_probe(void);
G2R_EXPORT int g2r_tile_sizes(int32_t head_dim, int32_t products, G2rTileSizes* sizes);
G2R_EXPORT int g2r_attention_forward(const G2rAttentionForward* arguments, void* stream);
// dq first, then dk and dv, in one stream; neither where it has no tiles.
G2R_EXPORT int g2r_attention_backward(const G2rAttentionBackward* arguments, void* stream);
// Of kernel 0, 1, ...; G2R_NO_SUCH_KERNEL behind the last.
G2R_EXPORT int g2r_kernel(int32_t index, G2rKernel* kernel);
G2R_EXPORT const char* g2r_error(int error);

#ifdef __cplusplus
}
#endif
