// What Hopper's warpgroups add to device.cuh: matrix products of four warps together, which run
// while the threads go on (PTX: wgmma). Emulated by emulated_warpgroup.h.
//
// A descriptor tells of an operand in shared memory. It lies in rows of 128 bytes, 64 elements;
// chunk c of 16 bytes of row r lies at place c ^ (r % 8), by the bits of its address: tiles start
// at multiples of 1024 bytes. What is wider than 64 elements is several such panels.
//
//   by columns (PTX: K-major): the sum runs along the rows of memory, which are rows of a or
//   columns
//       of b. stride_bytes: from 8 rows to the next 8; leading_bytes is not read. The next 16 terms
//       are 32 bytes on in the first row.
//   by rows (PTX: MN-major): a row of memory is a row of b, and the sum runs over the rows.
//       stride_bytes: from 8 rows to the next 8; leading_bytes: from a panel to the next one. The
//       next 16 terms are 16 rows on.
//
// Fragments are those of mma_16x8x16: warp w of the warpgroup has rows [16 w, 16 w + 16) of d and
// a.
//
// There is code of it for sm_90a alone: elsewhere G2R_WARPGROUPS is 0 and kernels trap.
#pragma once

#include "device.cuh"

#if defined(G2R_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define G2R_WARPGROUPS 1
#else
#define G2R_WARPGROUPS 0
#endif

namespace g2r::gpu {

#ifndef G2R_EMULATE
constexpr int warpgroup_threads = 128;
#endif

#if G2R_WARPGROUPS && !defined(G2R_EMULATE)

// `shared` and the strides are multiples of 16 bytes.
G2R_DEVICE std::uint64_t matrix_descriptor(const void* shared, int leading_bytes,
                                           int stride_bytes) {
    constexpr std::uint64_t swizzle_of_128_bytes = 1;
    const auto field = [](std::uint32_t bytes) {
        return static_cast<std::uint64_t>((bytes & 0x3ffff) >> 4);
    };
    return field(shared_address(shared)) | field(static_cast<std::uint32_t>(leading_bytes)) << 16 |
           field(static_cast<std::uint32_t>(stride_bytes)) << 32 | swizzle_of_128_bytes << 62;
}

// In front of the first product, and where registers of a product were written since the last one.
G2R_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the group of this warpgroup's products since the last one.
G2R_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `pending` groups, the latest ones, are under way.
template <int pending>
G2R_DEVICE void wgmma_wait() {
    static_assert(pending >= 0 && pending <= 7);
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Behind it, products may read what this thread wrote to shared memory, its cp_async_16 that it has
// waited for among that: its own products at once, those of others behind a barrier.
G2R_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#define G2R_D4                                                                                    \
    "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]),     \
        "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), \
        "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3])
#define G2R_REGISTERS4 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define G2R_D8                                                                                    \
    "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]),     \
        "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), \
        "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), \
        "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), \
        "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]), \
        "+f"(d[7][2]), "+f"(d[7][3])
#define G2R_REGISTERS8                                                                 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
    "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define G2R_D16                                                                                   \
    "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]),     \
        "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), \
        "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), \
        "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), \
        "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]), \
        "+f"(d[7][2]), "+f"(d[7][3]), "+f"(d[8][0]), "+f"(d[8][1]), "+f"(d[8][2]), "+f"(d[8][3]), \
        "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3]), "+f"(d[10][0]),               \
        "+f"(d[10][1]), "+f"(d[10][2]), "+f"(d[10][3]), "+f"(d[11][0]), "+f"(d[11][1]),           \
        "+f"(d[11][2]), "+f"(d[11][3]), "+f"(d[12][0]), "+f"(d[12][1]), "+f"(d[12][2]),           \
        "+f"(d[12][3]), "+f"(d[13][0]), "+f"(d[13][1]), "+f"(d[13][2]), "+f"(d[13][3]),           \
        "+f"(d[14][0]), "+f"(d[14][1]), "+f"(d[14][2]), "+f"(d[14][3]), "+f"(d[15][0]),           \
        "+f"(d[15][1]), "+f"(d[15][2]), "+f"(d[15][3])
#define G2R_REGISTERS16                                                                \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
    "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, " \
    "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
    "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define G2R_WGMMA(tiles, columns, type, a_at, b_at, accumulate_at, major_at, ...)           \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " accumulate_at                             \
                 ", 0; "                                                                    \
                 "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type       \
                 " {" G2R_REGISTERS##tiles "}, " a_at ", " b_at ", p, 1, 1, " major_at ";}" \
                 : G2R_D##tiles                                                             \
                 : __VA_ARGS__, "l"(b), "r"(accumulate ? 1 : 0), "n"(b_by_rows ? 1 : 0))

template <int tiles>
G2R_DEVICE void keep_in_place(float (&d)[tiles][4]) {
    G2R_UNROLL
    for (int n = 0; n < tiles; ++n) {
        G2R_UNROLL
        for (int c = 0; c < 4; ++c) asm volatile("" : "+f"(d[n][c])::"memory");
    }
}
template <int tiles>
G2R_DEVICE void keep_in_place(std::uint32_t (&a)[tiles][4]) {
    G2R_UNROLL
    for (int n = 0; n < tiles; ++n) {
        G2R_UNROLL
        for (int c = 0; c < 4; ++c) asm volatile("" : "+r"(a[n][c])::"memory");
    }
}

// The compiler moves neither writes of these registers behind this place nor reads in front of it:
// for in front of a wgmma_fence, and for results behind a wgmma_wait.
template <typename... Registers>
G2R_DEVICE void wgmma_registers(Registers&... registers) {
    (keep_in_place(registers), ...);
}

// d (64 x 8 n_tiles) = a (64 x 16) b (16 x 8 n_tiles), + d where `accumulate`; sums in float32. All
// threads of a warpgroup must call it, with the same descriptors. The registers of d and a belong
// to it until the wait that covers it.
template <typename T, bool b_by_rows, int n_tiles>
G2R_DEVICE void wgmma(float (&d)[n_tiles][4], std::uint64_t a, std::uint64_t b, bool accumulate) {
    static_assert(n_tiles == 4 || n_tiles == 8 || n_tiles == 16);
    static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
    if constexpr (n_tiles == 4 && std::is_same_v<T, bf16>) {
        G2R_WGMMA(4, "32", "bf16", "%16", "%17", "%18", "0, %19", "l"(a));
    } else if constexpr (n_tiles == 4) {
        G2R_WGMMA(4, "32", "f16", "%16", "%17", "%18", "0, %19", "l"(a));
    } else if constexpr (n_tiles == 8 && std::is_same_v<T, bf16>) {
        G2R_WGMMA(8, "64", "bf16", "%32", "%33", "%34", "0, %35", "l"(a));
    } else if constexpr (n_tiles == 8) {
        G2R_WGMMA(8, "64", "f16", "%32", "%33", "%34", "0, %35", "l"(a));
    } else if constexpr (std::is_same_v<T, bf16>) {
        G2R_WGMMA(16, "128", "bf16", "%64", "%65", "%66", "0, %67", "l"(a));
    } else {
        G2R_WGMMA(16, "128", "f16", "%64", "%65", "%66", "0, %67", "l"(a));
    }
}

// The same with a in registers.
template <typename T, bool b_by_rows, int n_tiles>
G2R_DEVICE void wgmma(float (&d)[n_tiles][4], const std::uint32_t (&a)[4], std::uint64_t b,
                      bool accumulate) {
    static_assert(n_tiles == 8 || n_tiles == 16);
    static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
#define G2R_A "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
    if constexpr (n_tiles == 8 && std::is_same_v<T, bf16>) {
        G2R_WGMMA(8, "64", "bf16", "{%32, %33, %34, %35}", "%36", "%37", "%38", G2R_A);
    } else if constexpr (n_tiles == 8) {
        G2R_WGMMA(8, "64", "f16", "{%32, %33, %34, %35}", "%36", "%37", "%38", G2R_A);
    } else if constexpr (std::is_same_v<T, bf16>) {
        G2R_WGMMA(16, "128", "bf16", "{%64, %65, %66, %67}", "%68", "%69", "%70", G2R_A);
    } else {
        G2R_WGMMA(16, "128", "f16", "{%64, %65, %66, %67}", "%68", "%69", "%70", G2R_A);
    }
#undef G2R_A
}

#undef G2R_WGMMA
#undef G2R_REGISTERS16
#undef G2R_D16
#undef G2R_REGISTERS8
#undef G2R_D8
#undef G2R_REGISTERS4
#undef G2R_D4

#elif defined(G2R_EMULATE)

template <typename... Registers>
G2R_DEVICE void wgmma_registers(Registers&...) {}

#else

// Better no result than memory as it was.
template <typename... Arguments>
G2R_DEVICE void without_warpgroups(const Arguments&...) {
#ifdef __CUDA_ARCH__
    asm volatile("trap;");
#endif
}

#endif

}  // namespace g2r::gpu
