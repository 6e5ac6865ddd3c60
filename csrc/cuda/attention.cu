// Entry points of the attention kernels: checks, launches, and what went wrong as text.
#include <initializer_list>

#include "attention.h"
#include "attention_backward_keys.cuh"
#include "attention_backward_queries.cuh"
#include "attention_forward.cuh"
#include "device.cuh"
#include "warpgroup_backward_keys.cuh"
#include "warpgroup_backward_queries.cuh"
#include "warpgroup_forward.cuh"

namespace {

using namespace g2r::gpu;

constexpr std::int64_t int32_max = 0x7fffffff;

// What a block may have on every GPU from sm_80 on, and on sm_90.
constexpr int shared_limit = 99 * 1024, hopper_shared_limit = 227 * 1024;
template <int dim, bool capped>
constexpr bool fits_everywhere() {
    return ForwardShape<dim, capped>::shared_bytes <= shared_limit &&
           BackwardQueriesShape<dim>::shared_bytes <= shared_limit &&
           BackwardKeysShape<dim, capped>::shared_bytes <= shared_limit;
}
template <int dim, bool capped>
constexpr bool fits_hopper() {
    using Forward = WarpgroupForwardShape<dim, capped>;
    using Queries = WarpgroupQueriesShape<dim>;
    using Keys = WarpgroupKeysShape<dim, capped>;
    return Forward::shared_bytes <= hopper_shared_limit &&
           Queries::shared_bytes <= hopper_shared_limit &&
           Keys::shared_bytes <= hopper_shared_limit &&
           // Tiles start where the swizzle does.
           Forward::q_bytes % 1024 == 0 && Forward::k_bytes % 1024 == 0 &&
           Queries::q_bytes % 1024 == 0 && Queries::k_bytes % 1024 == 0 &&
           Keys::q_bytes % 1024 == 0 && Keys::k_bytes % 1024 == 0;
}
static_assert(fits_everywhere<64, false>() && fits_everywhere<64, true>());
static_assert(fits_everywhere<128, false>() && fits_everywhere<128, true>());
static_assert(fits_hopper<64, false>() && fits_hopper<64, true>());
static_assert(fits_hopper<128, false>() && fits_hopper<128, true>());

template <int dim>
G2rTileSizes tile_sizes(int products) {
    // Tables are made without knowing of a cap.
    static_assert(ForwardShape<dim, false>::rows == ForwardShape<dim, true>::rows);
    static_assert(BackwardKeysShape<dim, false>::keys == BackwardKeysShape<dim, true>::keys);
    static_assert(WarpgroupForwardShape<dim, false>::rows ==
                  WarpgroupForwardShape<dim, true>::rows);
    static_assert(WarpgroupKeysShape<dim, false>::keys == WarpgroupKeysShape<dim, true>::keys);
    if (products == G2R_WGMMA) {
        return {WarpgroupForwardShape<dim, false>::rows, WarpgroupQueriesShape<dim>::rows,
                WarpgroupKeysShape<dim, false>::keys};
    }
    return {ForwardShape<dim, false>::rows, BackwardQueriesShape<dim>::rows,
            BackwardKeysShape<dim, false>::keys};
}

// Windows that cover every position, cut so that positions may be added.
constexpr std::int32_t widest_window = 1 << 30;

// Once here, not in the kernels' loops.
float inverse_of(float softcap) { return softcap != 0.0f ? 1.0f / softcap : 0.0f; }

template <typename T, int dim, bool capped>
int forward(const G2rAttentionForward& call, void* stream) {
    const Grid grid{call.tile_count * call.kv_heads};
    if (call.products == G2R_WGMMA) {
        return launch(warpgroup_forward<T, dim, capped>, grid, two_warpgroups,
                      WarpgroupForwardShape<dim, capped>::shared_bytes, stream, call,
                      inverse_of(call.softcap));
    }
    return launch(attention_forward<T, dim, capped>, grid, attention_threads,
                  ForwardShape<dim, capped>::shared_bytes, stream, call, inverse_of(call.softcap));
}

template <typename T, int dim, bool capped>
int backward(const G2rAttentionBackward& call, void* stream) {
    const Grid queries{call.query_tile_count * call.kv_heads};
    const Grid keys{call.key_tile_count * call.kv_heads};
    if (call.products == G2R_WGMMA) {
        const int error = launch(warpgroup_backward_queries<T, dim, capped>, queries,
                                 two_warpgroups, WarpgroupQueriesShape<dim>::shared_bytes, stream,
                                 call, inverse_of(call.softcap));
        if (error != 0) return error;
        return launch(warpgroup_backward_keys<T, dim, capped>, keys, two_warpgroups,
                      WarpgroupKeysShape<dim, capped>::shared_bytes, stream, call,
                      inverse_of(call.softcap));
    }
    const int error =
        launch(attention_backward_queries<T, dim, capped>, queries, attention_threads,
               BackwardQueriesShape<dim>::shared_bytes, stream, call, inverse_of(call.softcap));
    if (error != 0) return error;
    return launch(attention_backward_keys<T, dim, capped>, keys, attention_threads,
                  BackwardKeysShape<dim, capped>::shared_bytes, stream, call,
                  inverse_of(call.softcap));
}

template <typename T, int dim>
int forward(const G2rAttentionForward& call, void* stream) {
    return call.softcap != 0.0f ? forward<T, dim, true>(call, stream)
                                : forward<T, dim, false>(call, stream);
}

template <typename T, int dim>
int backward(const G2rAttentionBackward& call, void* stream) {
    return call.softcap != 0.0f ? backward<T, dim, true>(call, stream)
                                : backward<T, dim, false>(call, stream);
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

// Whether the current device has the code.
bool has(std::int32_t products) {
    if (products == G2R_MMA) return true;
    if (products != G2R_WGMMA) return false;
#ifdef G2R_EMULATE
    return true;
#else
    int device = 0, major = 0, minor = 0;
    const bool known =
        cudaGetDevice(&device) == cudaSuccess &&
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
    if (!known) (void)cudaGetLastError();  // the launch will tell
    return !known || (major == 9 && minor == 0);
#endif
}

bool fits(std::int64_t rows, std::int64_t heads) { return rows >= 0 && rows <= int32_max / heads; }

// What both directions share.
template <typename Call>
int check(const Call& call) {
    if (call.dtype != 0 && call.dtype != 1) return G2R_BAD_DTYPE;
    if (call.head_dim != 64 && call.head_dim != 128) return G2R_BAD_HEAD_DIM;
    if (!has(call.products)) return G2R_BAD_PRODUCTS;
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

int g2r_tile_sizes(int32_t head_dim, int32_t products, G2rTileSizes* sizes) {
    if (sizes == nullptr) return G2R_NULL_POINTER;
    if (products != G2R_MMA && products != G2R_WGMMA) return G2R_BAD_PRODUCTS;
    if (head_dim == 64) {
        *sizes = tile_sizes<64>(products);
    } else if (head_dim == 128) {
        *sizes = tile_sizes<128>(products);
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
        {"attention_forward<64, 0>", attention_threads, ForwardShape<64, false>::shared_bytes, 0},
        {"attention_forward<64, 1>", attention_threads, ForwardShape<64, true>::shared_bytes, 0},
        {"attention_forward<128, 0>", attention_threads, ForwardShape<128, false>::shared_bytes, 0},
        {"attention_forward<128, 1>", attention_threads, ForwardShape<128, true>::shared_bytes, 0},
        {"attention_backward_queries<64>", attention_threads,
         BackwardQueriesShape<64>::shared_bytes, 0},
        {"attention_backward_queries<128>", attention_threads,
         BackwardQueriesShape<128>::shared_bytes, 0},
        {"attention_backward_keys<64, 0>", attention_threads,
         BackwardKeysShape<64, false>::shared_bytes, 0},
        {"attention_backward_keys<64, 1>", attention_threads,
         BackwardKeysShape<64, true>::shared_bytes, 0},
        {"attention_backward_keys<128, 0>", attention_threads,
         BackwardKeysShape<128, false>::shared_bytes, 0},
        {"attention_backward_keys<128, 1>", attention_threads,
         BackwardKeysShape<128, true>::shared_bytes, 0},
        {"warpgroup_forward<64, 0>", two_warpgroups, WarpgroupForwardShape<64, false>::shared_bytes,
         90},
        {"warpgroup_forward<64, 1>", two_warpgroups, WarpgroupForwardShape<64, true>::shared_bytes,
         90},
        {"warpgroup_forward<128, 0>", two_warpgroups,
         WarpgroupForwardShape<128, false>::shared_bytes, 90},
        {"warpgroup_forward<128, 1>", two_warpgroups,
         WarpgroupForwardShape<128, true>::shared_bytes, 90},
        {"warpgroup_backward_queries<64>", two_warpgroups, WarpgroupQueriesShape<64>::shared_bytes,
         90},
        {"warpgroup_backward_queries<128>", two_warpgroups,
         WarpgroupQueriesShape<128>::shared_bytes, 90},
        {"warpgroup_backward_keys<64, 0>", two_warpgroups,
         WarpgroupKeysShape<64, false>::shared_bytes, 90},
        {"warpgroup_backward_keys<64, 1>", two_warpgroups,
         WarpgroupKeysShape<64, true>::shared_bytes, 90},
        {"warpgroup_backward_keys<128, 0>", two_warpgroups,
         WarpgroupKeysShape<128, false>::shared_bytes, 90},
        {"warpgroup_backward_keys<128, 1>", two_warpgroups,
         WarpgroupKeysShape<128, true>::shared_bytes, 90},
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
        case G2R_BAD_PRODUCTS:
            return "products is neither 0 (mma) nor 1 (wgmma, on compute capability 9.0 alone)";
        default:
            return error_text(error);
    }
}

}  // extern "C"
