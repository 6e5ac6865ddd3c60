// What a kernel takes from the GPU beyond plain C++, so that the same kernel also runs on a CPU.
//
// Compiled by nvcc, every function here is one PTX instruction or one call of the CUDA headers.
// Compiled by a C++17 compiler with -DG2R_EMULATE, the same names come from emulated.h: blocks run
// one after the other, the threads of a block as fibers, and reads of what is not yet there find
// NaN. Both forms need an architecture of sm_80 or newer.
//
// Fragments of mma_16x8x16, for lane l, row = l / 4, pair = 2 * (l % 4), as in the PTX manual; a
// register holds two elements, the one of the lower column (a) or row (b) in its low half:
//   a[0]: A[row][pair, pair + 1]      a[1]: A[row + 8][pair, pair + 1]
//   a[2]: A[row][pair + 8, + 9]       a[3]: A[row + 8][pair + 8, + 9]         A is 16 x 16
//   b0:   B[pair, pair + 1][row]      b1:   B[pair + 8, + 9][row]             B is 16 x 8
//   d[0], d[1]: D[row][pair, + 1]     d[2], d[3]: D[row + 8][pair, + 1]       D is 16 x 8
// So d of one product, packed in pairs, is a of the next: a[0] = pack(d[0], d[1]), a[1] =
// pack(d[2], d[3]) of columns 0 to 7, a[2] and a[3] likewise of columns 8 to 15.
//
// Kernels stand inside g2r::gpu, where exp2, tanh, max and the like are those below: CUDA puts
// others of the same names into the global namespace.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef G2R_EMULATE
#include "emulated.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#define G2R_GLOBAL __global__
#define G2R_DEVICE __device__ __forceinline__
#define G2R_HOST_DEVICE __host__ __device__ __forceinline__
// Behind G2R_GLOBAL: threads of a block, blocks that must fit on a multiprocessor at once.
#define G2R_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define G2R_UNROLL _Pragma("unroll")
#define G2R_NO_UNROLL _Pragma("unroll 1")

namespace g2r::gpu {

using bf16 = __nv_bfloat16;
using f16 = __half;

// ---------------------------------------------------------------------------------- the threads

G2R_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
G2R_DEVICE int lane_index() { return static_cast<int>(threadIdx.x) & 31; }
// The same for all lanes, and the compiler knows it.
G2R_DEVICE int warp_index() {
    return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) >> 5, 0);
}
G2R_DEVICE int block_index_x() { return static_cast<int>(blockIdx.x); }
G2R_DEVICE int block_index_y() { return static_cast<int>(blockIdx.y); }
G2R_DEVICE int block_index_z() { return static_cast<int>(blockIdx.z); }

// The block's dynamic shared memory, aligned to 1024 bytes.
G2R_DEVICE char* shared_memory() {
    extern __shared__ __align__(1024) char g2r_dynamic_shared_memory[];
    return g2r_dynamic_shared_memory;
}

G2R_DEVICE void sync_block() { __syncthreads(); }
G2R_DEVICE void sync_warp() { __syncwarp(); }

G2R_DEVICE std::uint32_t shared_address(const void* shared) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
}

// ------------------------------------------------------------------- copies from global to shared

// 16 bytes, both addresses aligned to 16. Where !valid, 16 zero bytes, and nothing is read.
// Visible to this thread after the cp_async_wait that covers it, to the others after a sync_block
// behind that.
G2R_DEVICE void cp_async_16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
                 : "memory");
}

// Closes the group of this thread's copies since the last one.
G2R_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` groups of this thread, the latest ones, are under way.
template <int pending>
G2R_DEVICE void cp_async_wait() {
    static_assert(pending >= 0);
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ------------------------------------------------------------------------------ matrix products

// Lane l names a row of 16 bytes: row l % 8 of matrix l / 8 (four matrices of 8 x 8 elements of 16
// bits). r[i] gets from matrix i elements [l / 4][2 * (l % 4), + 1]. All 32 lanes must call it.
G2R_DEVICE void ldmatrix_x4(std::uint32_t (&r)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}

// The same of the transposed matrices: r[i] gets elements [2 * (l % 4), + 1][l / 4] of matrix i.
G2R_DEVICE void ldmatrix_x4_transposed(std::uint32_t (&r)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}

// d += a b, sums in float32. All 32 lanes must call it.
template <typename T>
G2R_DEVICE void mma_16x8x16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                            std::uint32_t b1) {
    static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
    if constexpr (std::is_same_v<T, bf16>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// ------------------------------------------------------------------------ exchange between lanes

// All 32 lanes must call these.
G2R_DEVICE float shuffle_xor(float value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
G2R_DEVICE std::uint32_t shuffle_xor(std::uint32_t value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
G2R_DEVICE int shuffle(int value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
G2R_DEVICE float shuffle(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

// Over the four lanes that share a row of a fragment (l / 4 equal); all four get the result.
G2R_DEVICE float quad_max(float value) {
    value = fmaxf(value, shuffle_xor(value, 1));
    return fmaxf(value, shuffle_xor(value, 2));
}
G2R_DEVICE float quad_sum(float value) {
    value += shuffle_xor(value, 1);
    return value + shuffle_xor(value, 2);
}
// Whether it holds for any lane of the warp; whether for any thread of the block (a barrier too).
G2R_DEVICE bool any_of_warp(bool value) { return __any_sync(0xffffffffu, value) != 0; }
G2R_DEVICE bool any_of_block(bool value) { return __syncthreads_or(value) != 0; }

// ------------------------------------------------------------------------------------- functions

// 2 ** x to 2 units in the last place; 0 for -inf; results below 2 ** -126 become 0.
G2R_DEVICE float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
G2R_DEVICE float log2(float x) { return ::log2f(x); }
G2R_DEVICE float log(float x) { return ::logf(x); }
G2R_DEVICE float tanh(float x) { return ::tanhf(x); }
G2R_DEVICE float max(float a, float b) { return ::fmaxf(a, b); }
G2R_DEVICE float min(float a, float b) { return ::fminf(a, b); }
G2R_DEVICE int max(int a, int b) { return a > b ? a : b; }
G2R_DEVICE int min(int a, int b) { return a < b ? a : b; }
G2R_DEVICE float infinity() { return __int_as_float(0x7f800000); }

// ------------------------------------------------------------------------------------ conversion

G2R_DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
G2R_DEVICE float to_float(f16 x) { return __half2float(x); }
G2R_DEVICE float to_float(float x) { return x; }

// To the nearest, ties to even.
template <typename T>
G2R_DEVICE T from_float(float x) {
    if constexpr (std::is_same_v<T, bf16>) {
        return __float2bfloat16_rn(x);
    } else if constexpr (std::is_same_v<T, f16>) {
        return __float2half_rn(x);
    } else {
        static_assert(std::is_same_v<T, float>);
        return x;
    }
}

// Two rounded numbers in a register, `low` in its low half: in memory `low` comes first.
template <typename T>
G2R_DEVICE std::uint32_t pack(float low, float high) {
    static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
    std::uint32_t both;
    if constexpr (std::is_same_v<T, bf16>) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    }
    return both;
}

// The two numbers of such a register.
template <typename T>
G2R_DEVICE void unpack(std::uint32_t both, float& low, float& high) {
    static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
    if constexpr (std::is_same_v<T, bf16>) {
        low = __uint_as_float(both << 16);
        high = __uint_as_float(both & 0xffff0000u);
    } else {
        low = __half2float(__ushort_as_half(static_cast<unsigned short>(both & 0xffffu)));
        high = __half2float(__ushort_as_half(static_cast<unsigned short>(both >> 16)));
    }
}

// ----------------------------------------------------------------------------------- 16 bytes

// For plain loads and stores of 16 bytes, at addresses aligned to 16.
struct alignas(16) Words {
    std::uint32_t word[4];
};
G2R_DEVICE Words load_16(const void* from) {
    const uint4 words = *static_cast<const uint4*>(from);
    return {{words.x, words.y, words.z, words.w}};
}
G2R_DEVICE void store_16(void* to, const Words& words) {
    *static_cast<uint4*>(to) =
        make_uint4(words.word[0], words.word[1], words.word[2], words.word[3]);
}

// ------------------------------------------------------------------------------------ the launch

struct Grid {
    int x = 1, y = 1, z = 1;
};

template <typename T>
struct Same {
    using type = T;
};

// Runs kernel(arguments...) on every block of the grid, on a cudaStream_t. Returns a cudaError_t; a
// grid without blocks is no launch and no error.
template <typename... Parameters>
int launch(void (*kernel)(Parameters...), Grid grid, int threads, int shared_bytes, void* stream,
           typename Same<Parameters>::type... arguments) {
    if (grid.x <= 0 || grid.y <= 0 || grid.z <= 0) return 0;
    if (shared_bytes > 48 * 1024) {
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
        if (error != cudaSuccess) {
            (void)cudaGetLastError();  // told to the caller, not to the next one who asks
            return static_cast<int>(error);
        }
    }
    const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                      static_cast<unsigned>(grid.z));
    void* pointers[] = {static_cast<void*>(&arguments)..., nullptr};
    const cudaError_t error =
        cudaLaunchKernel(kernel, blocks, dim3(static_cast<unsigned>(threads)), pointers,
                         static_cast<std::size_t>(shared_bytes), static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) (void)cudaGetLastError();
    return static_cast<int>(error);
}

inline const char* error_text(int error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace g2r::gpu

#endif  // G2R_EMULATE
