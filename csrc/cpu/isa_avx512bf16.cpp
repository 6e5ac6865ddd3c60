// AVX-512 with products of bfloat16 pairs.
#include <math.h>

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(                                                     \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#endif
#define G2R_NS avx512bf16
#define G2R_WIDTH 16
#define G2R_VECTORS 4
#define G2R_BF16 1
#include "table.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
namespace g2r {
const Kernels& avx512bf16_kernels() { return avx512bf16::table("avx512bf16"); }
}  // namespace g2r

#endif
