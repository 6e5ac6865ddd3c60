// AVX2 and FMA: x86-64 since 2013.
#include <math.h>

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define G2R_NS avx2
#define G2R_WIDTH 8
#define G2R_VECTORS 2
#define G2R_BF16 0
#include "table.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
namespace g2r {
const Kernels& avx2_kernels() { return avx2::table("avx2"); }
}  // namespace g2r

#endif
