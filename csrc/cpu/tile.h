// The one matrix product of this library: a tile of the result held in registers.
//
//   c[m][n] (+)= sum over k of a[m * row + k * step] * b[k * line + n]
//
// `a` is read one value at a time, by strides, so it may lie transposed; `b` a few vectors at a
// time. With bfloat16 products a "value" is a pair of neighbours along k: pairs lie next to each
// other in both operands, and k counts pairs.
#pragma once

#include "vec.h"

namespace g2r::G2R_NS {

constexpr int kRows = 6;                   // of a tile
constexpr int kVectors = G2R_VECTORS;      // of a tile's row
constexpr int kPanel = kVectors * kWidth;  // columns of a tile

// What products multiply: bf16 where the processor has products of pairs, else float.
template <class T>
struct Pair {
    static constexpr int size = 1;
};
template <>
struct Pair<bf16> {
    static constexpr int size = 2;
};

// In bfloat16 models: bfloat16 pairs are multiplied as such, or widened first.
#if G2R_BF16
using Narrow = bf16;
#else
using Narrow = float;
#endif

#define G2R_BY_DTYPE(name, in) \
    (in.dtype == Dtype::f32 ? name##_as<float, float>(in) : name##_as<bf16, Narrow>(in))

// Where a panel of kPanel columns has (k, column).
template <class T>
G2R_INLINE i64 packed_index(i64 k, i64 column) {
    constexpr int pair = Pair<T>::size;
    return (k / pair * kPanel + column) * pair + k % pair;
}

template <class T>
struct Operand {
    const T* data;
    i64 row;   // from one row of the result to the next
    i64 step;  // from one k to the next
};

template <class T>
struct Panel {
    const T* data;
    i64 line;  // from one k to the next
};

// One step of k.
template <int M, int N>
G2R_INLINE void step_of(vf (&c)[M][N], const float* a, i64 row, const float* b) {
    vf columns[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) columns[n] = load(b + n * kWidth);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
        const vf value = splat(a[m * row]);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) c[m][n] = multiply_add(value, columns[n], c[m][n]);
    }
}

#if G2R_BF16
template <int M, int N>
G2R_INLINE void step_of(vf (&c)[M][N], const bf16* a, i64 row, const bf16* b) {
    __m512bh columns[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) columns[n] = (__m512bh)_mm512_loadu_si512(b + n * 2 * kWidth);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
        int32_t pair;
        std::memcpy(&pair, a + m * row, sizeof(pair));
        const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) c[m][n] = _mm512_dpbf16_ps(c[m][n], value, columns[n]);
    }
}
#endif

// Where `a` lies row by row, the rows of the tile after the next come to the second-level cache
// meanwhile: the rows of a task are more than it holds. What lies behind the last row is asked for
// in vain. ahead(row of a tile) asks for more, a little at a time: what is asked for all at once
// would stand in the way of what is needed now.
template <class T, int M, int N, class Ahead>
G2R_INLINE void accumulate(vf (&c)[M][N], const T* a, i64 row, i64 step, const T* b, i64 line,
                           i64 k, const Ahead& ahead) {
    constexpr i64 of_line = 16;  // steps in a cache line of `a`
    const bool by_row = step == Pair<T>::size;
    for (int at = 0; k >= of_line; k -= of_line, at++) {
        if (by_row) {
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) __builtin_prefetch(a + (2 * M + m) * row, 0, 2);
        }
        if (at < M) ahead(at);
#pragma GCC unroll 1
        for (int i = 0; i < of_line; i++, a += step, b += line) step_of(c, a, row, b);
    }
    for (; k > 0; k--, a += step, b += line) step_of(c, a, row, b);
}

// Asks for N vectors of memory to be written, or read.
template <int N, bool written, class V>
G2R_INLINE void ask_for(const V* memory) {
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) __builtin_prefetch(memory + n * kWidth, written, 2);
}

// What becomes of a tile: finish(row, values) for its rows.
struct Store {
    float* out;
    i64 ld;
    template <int N>
    G2R_INLINE void operator()(i64 row, const vf (&values)[N]) const {
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) store(out + row * ld + n * kWidth, values[n]);
    }
    // Its memory comes to the caches meanwhile.
    template <int N>
    G2R_INLINE void expect(i64 row) const {
        ask_for<N, true>(out + row * ld);
    }
    template <int N>
    G2R_INLINE void start(i64, vf (&values)[N]) const {
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) values[n] = vf{};
    }
};

// The same, added to what is there.
struct Add : Store {
    template <int N>
    G2R_INLINE void start(i64 row, vf (&values)[N]) const {
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) values[n] = load(out + row * ld + n * kWidth);
    }
};

template <class T, int M, int N, class Finish>
G2R_INLINE void tile(Operand<T> a, i64 row, Panel<T> b, i64 k, const Finish& finish) {
    vf sums[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) finish.start(row + m, sums[m]);
    accumulate<T, M, N>(sums, a.data + row * a.row, a.row, a.step, b.data, b.line, k,
                        [&](int m) { finish.template expect<N>(row + M + m); });
    __asm__("" : "+r"(row));  // or the compiler keeps all addresses from above, in memory
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) finish(row + m, sums[m]);
}

template <class T, int N, class Finish>
void tile_rows(Operand<T> a, i64 rows, Panel<T> b, i64 k, Finish finish) {
    i64 row = 0;
    for (; row + kRows <= rows; row += kRows) tile<T, kRows, N>(a, row, b, k, finish);
    switch (rows - row) {
        case 5:
            return tile<T, 5, N>(a, row, b, k, finish);
        case 4:
            return tile<T, 4, N>(a, row, b, k, finish);
        case 3:
            return tile<T, 3, N>(a, row, b, k, finish);
        case 2:
            return tile<T, 2, N>(a, row, b, k, finish);
        case 1:
            return tile<T, 1, N>(a, row, b, k, finish);
        default:
            return;
    }
}

// `rows` rows and `vectors` vectors (at most kVectors) of the result. k counts values of T, a
// multiple of Pair<T>::size; strides count single numbers.
template <class T, class Finish>
void product(Operand<T> a, i64 rows, Panel<T> b, i64 vectors, i64 k, Finish finish) {
    k /= Pair<T>::size;
    switch (vectors) {
#if G2R_VECTORS >= 4
        case 4:
            return tile_rows<T, 4>(a, rows, b, k, finish);
        case 3:
            return tile_rows<T, 3>(a, rows, b, k, finish);
#endif
        case 2:
            return tile_rows<T, 2>(a, rows, b, k, finish);
        case 1:
            return tile_rows<T, 1>(a, rows, b, k, finish);
        default:
            return;
    }
}

// c (+)= the product.
template <class T>
void product(Operand<T> a, i64 rows, Panel<T> b, i64 vectors, i64 k, float* c, i64 ldc, bool add) {
    if (add)
        product<T>(a, rows, b, vectors, k, Add{{c, ldc}});
    else
        product<T>(a, rows, b, vectors, k, Store{c, ldc});
}

}  // namespace g2r::G2R_NS
