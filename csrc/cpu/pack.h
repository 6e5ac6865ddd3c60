// Weights as products read them: a slice of a panel's depth at a time, in the order
//
//   [depth / pair][kPanel][pair], columns past the end zeros
//
// A slice is packed by the task that uses it, into its own cache, and never lies in memory: for few
// rows a weight is still read only once. For very many rows see PackedAhead in gemm.h.
#pragma once

#include "tile.h"

namespace g2r::G2R_NS {

template <int... index>
struct Indices {};
template <int n, int... index>
struct CountTo : CountTo<n - 1, n - 1, index...> {};
template <int... index>
struct CountTo<0, index...> {
    using type = Indices<index...>;
};

#if defined(__clang__)
#define G2R_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define G2R_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif

// Exchanges the lanes of a that have the bit `step` in their number with those of b that do not.
template <int step, int... lane>
G2R_INLINE void exchange(vu& a, vu& b, Indices<lane...>) {
    const vu first = G2R_SHUFFLE(a, b, ((lane & step) ? kWidth + lane - step : lane)...);
    b = G2R_SHUFFLE(a, b, ((lane & step) ? kWidth + lane : lane + step)...);
    a = first;
}

template <int step = 1>
G2R_INLINE void transpose(vu (&rows)[kWidth]) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; i++)
        if (!(i & step)) exchange<step>(rows[i], rows[i + step], typename CountTo<kWidth>::type());
    if constexpr (2 * step < kWidth) transpose<2 * step>(rows);
}

// kWidth values of storage, times `scale` where there is one.
template <class S>
G2R_INLINE vf scaled(const S* values, const S* scale) {
    return scale == nullptr ? load(values) : load(values) * load(scale);
}

// kWidth values, or twice as many as pairs, times `scale` where there is one.
template <class T, class S>
G2R_INLINE vu units(const S* values, const S* scale) {
#if G2R_BF16
    if constexpr (Pair<T>::size == 2) {
        if (scale == nullptr) return bit_cast<vu>(_mm512_loadu_si512(values));
        return bit_cast<vu>(
            _mm512_cvtne2ps_pbh(scaled(values + kWidth, scale + kWidth), scaled(values, scale)));
    }
#endif
    return bit_cast<vu>(scaled(values, scale));
}

// kWidth pairs of neighbours along k, times `scale` where there is one.
template <class S>
G2R_INLINE vu pairs(const S* even, const S* odd, const S* scale) {
    if (scale == nullptr) return halves_of(even) | halves_of(odd) << 16;
    bf16 scaled_even[kWidth], scaled_odd[kWidth];
    store(scaled_even, scaled(even, scale));
    store(scaled_odd, scaled(odd, scale));
    return halves_of(scaled_even) | halves_of(scaled_odd) << 16;
}

// Rows of up to three weights [out][in], one weight after the other, as one matrix.
template <class S>
struct Stack {
    static constexpr int kMost = 3;
    const S* weight[kMost] = {};
    i64 rows[kMost] = {};
    i64 width = 0, height = 0;
    int count = 0;

    void add(const Linear& linear) {
        if (linear.weight == nullptr) return;
        weight[count] = static_cast<const S*>(linear.weight);
        rows[count++] = linear.out;
        width = linear.in;
        height += linear.out;
    }
    // Null past the end.
    const S* row(i64 index) const {
        for (int i = 0; i < count; i++) {
            if (index < rows[i]) return weight[i] + index * width;
            index -= rows[i];
        }
        return nullptr;
    }
};

// A slice of a panel whose column j is the row that row_of(j) points at, null: zeros. `factors`, or
// null, multiplies along k.
template <class T, class S, class RowOf>
G2R_INLINE void pack_transposed(T* out, i64 count, const S* factors, const RowOf& row_of) {
    constexpr int pair = Pair<T>::size, step = kWidth * pair;
    for (i64 j = 0; j < kPanel; j += kWidth) {
        const S* rows[kWidth];
        for (int i = 0; i < kWidth; i++) rows[i] = row_of(j + i);
        i64 at = 0;
        for (; at + step <= count; at += step) {
            vu block[kWidth];
#pragma GCC unroll 16
            for (int i = 0; i < kWidth; i++)
                block[i] =
                    rows[i] == nullptr
                        ? vu{}
                        : units<T>(rows[i] + at, factors == nullptr ? nullptr : factors + at);
            transpose(block);
#pragma GCC unroll 16
            for (int i = 0; i < kWidth; i++)
                std::memcpy(out + ((at / pair + i) * kPanel + j) * pair, &block[i], sizeof(vu));
        }
        for (; at < count; at++)
            for (int i = 0; i < kWidth; i++) {
                const float value = rows[i] == nullptr ? 0.0f : widen(rows[i][at]);
                const float factor = factors == nullptr ? 1.0f : widen(factors[at]);
                out[packed_index<T>(at, j + i)] = narrow<T>(value * factor);
            }
    }
}

// For x W^T: a column is a row of W. `scale`, or null, multiplies W's columns.
template <class T, class S>
struct Transposed {
    Stack<S> weight;
    const S* scale = nullptr;
    i64 interleaved = 0;                    // not 0: see row()
    i64 skipped = 0, taken = weight.width;  // of the depth
    T* packed = nullptr;                    // see PackedAhead

    i64 columns() const {
        return interleaved == 0 ? weight.height : 2 * round_up(interleaved, kPanel / 2);
    }
    i64 depth() const { return taken; }

    // With interleaved = n, W is two weights of n rows, and every panel has kPanel / 2 columns of
    // the first and the same ones of the second.
    const S* row(i64 column) const {
        if (interleaved == 0) return weight.row(column);
        const i64 second = column % kPanel / (kPanel / 2);
        const i64 index = column / kPanel * (kPanel / 2) + column % (kPanel / 2);
        return index < interleaved ? weight.row(second * interleaved + index) : nullptr;
    }

    void pack(T* out, i64 panel, i64 k, i64 count) const {
        const S* factors = scale == nullptr ? nullptr : scale + skipped + k;
        pack_transposed<T, S>(out, count, factors, [&](i64 column) {
            const S* found = row(panel * kPanel + column);
            return found == nullptr ? nullptr : found + skipped + k;
        });
    }
};

// Rows of a weight that are asked for ahead of their packing: they lie far apart.
constexpr i64 kAhead = 24;

// For g W: a column is a column of W, of which there are a multiple of kWidth. `scale`, or null,
// multiplies them.
template <class T, class S>
struct Plain {
    Stack<S> weight;
    const S* scale = nullptr;
    i64 skipped = 0, taken = weight.width;  // of the columns
    T* packed = nullptr;                    // see PackedAhead

    i64 columns() const { return taken; }
    i64 depth() const { return weight.height; }

    void pack(T* out, i64 panel, i64 k, i64 count) const {
        constexpr int pair = Pair<T>::size;
        const i64 first = skipped + panel * kPanel;
        const i64 wide = smaller<i64>(kPanel, taken - panel * kPanel);
        for (i64 at = 0; at < count; at += pair, out += kPanel * pair) {
            const S* even = weight.row(k + at) + first;
            const S* odd = weight.row(k + at + pair - 1) + first;
            ask_for<kVectors, false>(even + kAhead * weight.width);
            if constexpr (pair > 1) ask_for<kVectors, false>(odd + kAhead * weight.width);
            for (i64 j = 0; j < kPanel; j += kWidth) {
                const S* factors = scale == nullptr ? nullptr : scale + first + j;
                vu unit{};
                if (j < wide) {
                    if constexpr (pair == 1)
                        unit = units<T>(even + j, factors);
                    else
                        unit = pairs(even + j, odd + j, factors);
                }
                std::memcpy(out + j * pair, &unit, sizeof(unit));
            }
        }
    }
};

}  // namespace g2r::G2R_NS
