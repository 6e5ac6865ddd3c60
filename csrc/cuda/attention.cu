// Entry points of the attention kernels: checks, launches, and what went wrong as text.
#include <initializer_list>

#include "attention.h"
#include "attention_backward_keys.cuh"
#include "attention_backward_queries.cuh"
#include "attention_forward.cuh"
#include "device.cuh"

namespace {

using namespace g2r::gpu;

constexpr std::int64_t int32_max = 0x7fffffff;

// What a block may have on every GPU from sm_80 on.
constexpr int shared_limit = 99 * 1024;
static_assert(ForwardShape<128, false>::shared_bytes <= shared_limit);
static_assert(BackwardQueriesShape<128>::shared_bytes <= shared_limit);
static_assert(BackwardKeysShape<128, false>::shared_bytes <= shared_limit);

template <int dim>
void tile_sizes(G2rTileSizes& sizes) {
    sizes = {ForwardShape<dim, false>::rows, BackwardQueriesShape<dim>::rows,
             BackwardKeysShape<dim, false>::keys};
}

// Windows that cover every position, cut so that positions may be added.
constexpr std::int32_t widest_window = 1 << 30;

template <typename T, int dim>
int forward(const G2rAttentionForward& call, void* stream) {
    const bool capped = call.softcap != 0.0f;
    return launch(
        capped ? attention_forward<T, dim, true> : attention_forward<T, dim, false>,
        Grid{call.tile_count * call.kv_heads}, attention_threads,
        capped ? ForwardShape<dim, true>::shared_bytes : ForwardShape<dim, false>::shared_bytes,
        stream, call);
}

template <typename T, int dim>
int backward(const G2rAttentionBackward& call, void* stream) {
    const bool capped = call.softcap != 0.0f;
    const auto queries = capped ? attention_backward_queries<T, dim, true>
                                : attention_backward_queries<T, dim, false>;
    const auto keys =
        capped ? attention_backward_keys<T, dim, true> : attention_backward_keys<T, dim, false>;
    const int error =
        launch(queries, Grid{call.query_tile_count * call.kv_heads}, attention_threads,
               BackwardQueriesShape<dim>::shared_bytes, stream, call);
    if (error != 0) return error;
    return launch(keys, Grid{call.key_tile_count * call.kv_heads}, attention_threads,
                  capped ? BackwardKeysShape<dim, true>::shared_bytes
                         : BackwardKeysShape<dim, false>::shared_bytes,
                  stream, call);
}

bool aligned(std::initializer_list<const void*> pointers) {
    for (const void* pointer : pointers) {
        if (reinterpret_cast<std::uintptr_t>(pointer) % 16 != 0) return false;
    }
    return true;
}

bool any_null(std::initializer_list<const void*> pointers) {
    for (const void* pointer : pointers) {
        if (pointer == nullptr) return true;
    }
    return false;
}

bool fits(std::int64_t rows, std::int64_t heads) { return rows >= 0 && rows <= int32_max / heads; }

// What both directions share.
template <typename Call>
int check(const Call& call) {
    if (call.dtype != 0 && call.dtype != 1) return G2R_BAD_DTYPE;
    if (call.head_dim != 64 && call.head_dim != 128) return G2R_BAD_HEAD_DIM;
    if (call.kv_heads <= 0 || call.heads <= 0 || call.heads % call.kv_heads != 0) {
        return G2R_BAD_HEADS;
    }
    if (!fits(call.queries, call.heads) || !fits(call.keys, call.kv_heads)) return G2R_BAD_SIZE;
    if (call.window <= 0) return G2R_BAD_WINDOW;
    if (!(call.softcap >= 0.0f && call.softcap <= 3.0e38f)) return G2R_BAD_SOFTCAP;
    return 0;
}

int check_grid(std::int64_t tiles, std::int64_t kv_heads) {
    if (tiles < 0) return G2R_BAD_SIZE;
    return tiles > int32_max / kv_heads ? G2R_BAD_GRID : 0;
}

}  // namespace

extern "C" {

int g2r_interface(void) { return G2R_INTERFACE; }

const char* g2r_device(void) {
#ifdef G2R_EMULATE
    return "cpu";
#else
    return "cuda";
#endif
}

int g2r_probe(void) {
#ifdef G2R_EMULATE
    return 0;
#else
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(
        &attributes, reinterpret_cast<const void*>(&attention_forward<bf16, 64, false>));
    if (error != cudaSuccess) (void)cudaGetLastError();  // told here, not to the next one who asks
    return static_cast<int>(error);
#endif
}

int g2r_tile_sizes(int32_t head_dim, G2rTileSizes* sizes) {
    if (sizes == nullptr) return G2R_NULL_POINTER;
    if (head_dim == 64) {
        tile_sizes<64>(*sizes);
    } else if (head_dim == 128) {
        tile_sizes<128>(*sizes);
    } else {
        return G2R_BAD_HEAD_DIM;
    }
    return 0;
}

int g2r_attention_forward(const G2rAttentionForward* arguments, void* stream) {
    if (arguments == nullptr) return G2R_NULL_POINTER;
    G2rAttentionForward call = *arguments;
    int error = check(call);
    if (error == 0) error = check_grid(call.tile_count, call.kv_heads);
    if (error != 0 || call.tile_count == 0) return error;
    if (any_null({call.q, call.k, call.v, call.out, call.lse, call.segments, call.positions,
                  call.tiles})) {
        return G2R_NULL_POINTER;
    }
    if (!aligned({call.q, call.k, call.v, call.out, call.segments})) return G2R_BAD_ALIGNMENT;
    if (call.window > widest_window) call.window = widest_window;
    if (call.head_dim == 64) {
        return call.dtype == 0 ? forward<bf16, 64>(call, stream) : forward<f16, 64>(call, stream);
    }
    return call.dtype == 0 ? forward<bf16, 128>(call, stream) : forward<f16, 128>(call, stream);
}

int g2r_attention_backward(const G2rAttentionBackward* arguments, void* stream) {
    if (arguments == nullptr) return G2R_NULL_POINTER;
    G2rAttentionBackward call = *arguments;
    int error = check(call);
    if (error == 0 && !fits(call.rows, call.heads)) error = G2R_BAD_SIZE;
    if (error == 0 && !fits(call.key_rows, call.kv_heads)) error = G2R_BAD_SIZE;
    if (error == 0) error = check_grid(call.query_tile_count, call.kv_heads);
    if (error == 0) error = check_grid(call.key_tile_count, call.kv_heads);
    if (error != 0) return error;
    if (call.query_tile_count > 0 || call.key_tile_count > 0) {
        // Keys that no query sees have gradients too, zeros: then there are no rows to point to.
        if (any_null({call.k, call.v, call.segments})) return G2R_NULL_POINTER;
        if (!aligned({call.k, call.v, call.segments})) return G2R_BAD_ALIGNMENT;
    }
    if (call.query_tile_count > 0) {
        if (any_null({call.q, call.out, call.lse, call.grad_out, call.dq, call.delta,
                      call.positions, call.entries, call.query_tiles})) {
            return G2R_NULL_POINTER;
        }
        if (!aligned({call.q, call.out, call.grad_out, call.dq})) return G2R_BAD_ALIGNMENT;
    }
    if (call.key_tile_count > 0) {
        if (any_null({call.dk, call.dv, call.key_runs, call.key_tiles})) return G2R_NULL_POINTER;
        if (!aligned({call.dk, call.dv})) return G2R_BAD_ALIGNMENT;
    }
    if (call.window > widest_window) call.window = widest_window;
    if (call.head_dim == 64) {
        return call.dtype == 0 ? backward<bf16, 64>(call, stream) : backward<f16, 64>(call, stream);
    }
    return call.dtype == 0 ? backward<bf16, 128>(call, stream) : backward<f16, 128>(call, stream);
}

int g2r_kernel(int32_t index, G2rKernel* kernel) {
    // By head_dim, and whether scores are capped.
    static const G2rKernel kernels[] = {
        {"attention_forward<64, 0>", attention_threads, ForwardShape<64, false>::shared_bytes},
        {"attention_forward<64, 1>", attention_threads, ForwardShape<64, true>::shared_bytes},
        {"attention_forward<128, 0>", attention_threads, ForwardShape<128, false>::shared_bytes},
        {"attention_forward<128, 1>", attention_threads, ForwardShape<128, true>::shared_bytes},
        {"attention_backward_queries<64>", attention_threads,
         BackwardQueriesShape<64>::shared_bytes},
        {"attention_backward_queries<128>", attention_threads,
         BackwardQueriesShape<128>::shared_bytes},
        {"attention_backward_keys<64, 0>", attention_threads,
         BackwardKeysShape<64, false>::shared_bytes},
        {"attention_backward_keys<64, 1>", attention_threads,
         BackwardKeysShape<64, true>::shared_bytes},
        {"attention_backward_keys<128, 0>", attention_threads,
         BackwardKeysShape<128, false>::shared_bytes},
        {"attention_backward_keys<128, 1>", attention_threads,
         BackwardKeysShape<128, true>::shared_bytes},
    };
    if (kernel == nullptr) return G2R_NULL_POINTER;
    if (index < 0 || index >= static_cast<int32_t>(sizeof(kernels) / sizeof(kernels[0]))) {
        return G2R_NO_SUCH_KERNEL;
    }
    *kernel = kernels[index];
    return 0;
}

const char* g2r_error(int error) {
    switch (error) {
        case 0:
            return "no error";
        case G2R_BAD_DTYPE:
            return "dtype is neither 0 (bfloat16) nor 1 (float16)";
        case G2R_BAD_HEAD_DIM:
            return "head_dim is neither 64 nor 128";
        case G2R_BAD_HEADS:
            return "heads is no positive multiple of kv_heads";
        case G2R_BAD_SIZE:
            return "a size is negative, or rows * heads is beyond int32";
        case G2R_BAD_GRID:
            return "tiles * kv_heads is beyond int32";
        case G2R_BAD_WINDOW:
            return "window is not positive";
        case G2R_BAD_SOFTCAP:
            return "softcap is negative or not finite";
        case G2R_NULL_POINTER:
            return "a pointer is null";
        case G2R_BAD_ALIGNMENT:
            return "a tensor does not start at a multiple of 16 bytes";
        case G2R_NO_SUCH_KERNEL:
            return "there is no such kernel";
        default:
            return error_text(error);
    }
}

}  // extern "C"
