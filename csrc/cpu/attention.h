// What both directions of attention share: the keys and values of a path, laid out for products.
#pragma once

#include <math.h>

#include "pack.h"

namespace g2r::G2R_NS {

// Keys that one step of a product over keys takes: their values stay in the first-level cache.
constexpr i64 kKeyStep = 128;

// `count` numbers of storage as operands.
template <class T, class S>
G2R_INLINE void copy_row(T* out, const S* in, i64 count) {
    if constexpr (sizeof(T) == sizeof(S)) {
        std::memcpy(out, in, size_t(count) * sizeof(T));
    } else {
        for (i64 i = 0; i < count; i += kWidth) store(out + i, load(in + i));
    }
}

// Two rows, the second may be null for zeros, as pairs of neighbours along k.
template <class T, class S>
G2R_INLINE void pair_rows(T* out, const S* even, const S* odd, i64 count) {
    if constexpr (Pair<T>::size == 1) {
        copy_row(out, even, count);
    } else {
        for (i64 i = 0; i < count; i += kWidth)
            store_pairs(out + 2 * i, even + i, odd == nullptr ? nullptr : odd + i);
    }
}

// One head of a [rows][heads][head_dim] tensor.
template <class S>
struct Heads {
    const S* data;
    i64 heads, head_dim;
    const S* at(i64 row, i64 head) const { return data + (row * heads + head) * head_dim; }
    i64 stride() const { return heads * head_dim; }
};

// Rows for positions [start, stop), `stride` apart, as columns of products with queries:
// [position / kPanel][head_dim / pair][kPanel][pair].
template <class T, class S>
void load_columns(T* out, i64 start, i64 stop, const S* rows, i64 stride, i64 head_dim) {
    constexpr int pair = Pair<T>::size;
    for (i64 p = start; p < stop;) {
        T* at = out + p / kPanel * kPanel * head_dim + p % kPanel * pair;
        const S* row = rows + (p - start) * stride;
        if (p % kWidth == 0 && p + kWidth <= stop && head_dim % (kWidth * pair) == 0) {
            for (i64 d = 0; d < head_dim; d += kWidth * pair) {
                vu block[kWidth];
#pragma GCC unroll 16
                for (int i = 0; i < kWidth; i++)
                    block[i] = units<T>(row + i * stride + d, static_cast<const S*>(nullptr));
                transpose(block);
#pragma GCC unroll 16
                for (int i = 0; i < kWidth; i++)
                    std::memcpy(at + (d / pair + i) * kPanel * pair, &block[i], sizeof(vu));
            }
            p += kWidth;
        } else {
            for (i64 d = 0; d < head_dim; d += pair, at += kPanel * pair)
                for (int e = 0; e < pair; e++) at[e] = convert<T>(row[d + e]);
            p++;
        }
    }
}

// The same as rows of products with probabilities: [position / pair][head_dim][pair].
template <class T, class S>
void load_by_row(T* out, i64 start, i64 stop, const S* rows, i64 stride, i64 head_dim) {
    constexpr int pair = Pair<T>::size;
    for (i64 p = start; p < stop;) {
        const S* row = rows + (p - start) * stride;
        T* at = out + p / pair * head_dim * pair;
        if (p % pair == 0 && p + pair <= stop) {
            pair_rows(at, row, row + (pair - 1) * stride, head_dim);
            p += pair;
        } else {
            for (i64 d = 0; d < head_dim; d++) at[d * pair + p % pair] = convert<T>(row[d]);
            p++;
        }
    }
}

// The path to the current segment as a stack indexed by position. Depth-first order makes a segment
// overwrite only what lies behind its own start.
class PathStack {
 public:
    PathStack(const Segment* segments, i64 count)
        : segments_(segments), held_(count), wanted_(count) {}

    // write(start, stop, row) for the positions that are not there yet, then clear(position) up to
    // a whole panel: what lies behind the path is masked, but 0 * NaN is not 0.
    template <class Write, class Clear>
    void enter(i64 segment, const Write& write, const Clear& clear) {
        i64 depth = 0;
        for (i64 s = segment; s >= 0; s = segments_[s].parent) wanted_[depth++] = s;
        i64 same = 0;
        while (same < smaller(depth, depth_) && held_[same] == wanted_[depth - 1 - same]) same++;
        for (i64 i = same; i < depth; i++) {
            held_[i] = wanted_[depth - 1 - i];
            const Segment& at = segments_[held_[i]];
            write(at.start, at.stop, at.row);
        }
        if (same < depth || depth < depth_)
            for (i64 p = segments_[segment].stop; p % kPanel != 0; p++) clear(p);
        depth_ = depth;
    }

 private:
    const Segment* segments_;
    Array<i64> held_, wanted_;
    i64 depth_ = 0;
};

// Room for every position of any path, in whole panels.
inline i64 path_length(const Segment* segments, i64 count) {
    i64 longest = 0;
    for (i64 i = 0; i < count; i++) longest = larger(longest, segments[i].stop);
    return round_up(longest, kPanel);
}

// The keys that a stretch of queries looks at.
struct KeyRange {
    i64 low;    // whole panels
    i64 stop;   // behind the last query's own key
    i64 width;  // stop - low in whole vectors

    KeyRange(const int64_t* positions, i64 count, i64 window)
        : low(window > 0 ? larger<i64>(0, positions[0] - window + 1) / kPanel * kPanel : 0),
          stop(positions[count - 1] + 1),
          width(round_up(stop - low, kWidth)) {}
    // A stretch of one.
    KeyRange(i64 first, i64 end) : low(first), stop(end), width(round_up(end - first, kWidth)) {}
};

// body(row, rows, last) for every stretch of at most a product's tile of queries of which some see
// a key at `position` or behind it; `last` is the position of the stretch's last query.
template <class Body>
void seeing_rows(const int64_t* positions, i64 count, i64 position, const Body& body) {
    for (i64 row = 0; row < count; row += kRows) {
        const i64 rows = smaller<i64>(kRows, count - row);
        const i64 last = positions[row + rows - 1];
        if (last >= position) body(row, rows, last);
    }
}

// a[row] . key for the keys that a row sees, by panels of keys: finish_at(row, column) makes what
// becomes of the tile whose first row and column (key - low) these are. Of the last keys, tiles
// hold some that a row does not see; unseen(row, rows, column, vectors) is told of those that are
// in no tile.
template <class T, class FinishAt, class Unseen>
void score_panels(const T* a, const T* by_column, i64 head_dim, const int64_t* positions, i64 count,
                  KeyRange keys, const FinishAt& finish_at, const Unseen& unseen) {
    for (i64 p = keys.low; p < keys.stop; p += kPanel) {
        const Panel<T> right{by_column + p * head_dim, kPanel * Pair<T>::size};
        const i64 column = p - keys.low;
        const auto some = [&](i64 row, i64 rows, i64 vectors) {
            const Operand<T> left{a + row * head_dim, head_dim, Pair<T>::size};
            product<T>(left, rows, right, vectors, head_dim, finish_at(row, column));
        };
        if (p + kPanel <= positions[0] + 1) {
            some(0, count, kVectors);
            continue;
        }
        const i64 vectors = ceil_div(smaller<i64>(kPanel, keys.stop - p), kWidth);
        for (i64 row = 0; row < count; row += kRows) {
            const i64 rows = smaller<i64>(kRows, count - row);
            const i64 last = positions[row + rows - 1];
            const i64 seen = last < p ? 0 : smaller(vectors, ceil_div(last + 1 - p, kWidth));
            some(row, rows, seen);
            if (seen < vectors) unseen(row, rows, column + seen * kWidth, vectors - seen);
        }
    }
}

// out[row] = (or, with `add`, +=) the sum over keys of weights[row][key - low] * value; weights of
// unseen keys are zeros.
template <class T>
void mix_values(const T* weights, const T* by_row, i64 head_dim, const int64_t* positions,
                i64 count, KeyRange keys, float* out, bool add) {
    const i64 ld = keys.width;
    for (i64 p = keys.low; p < keys.stop; p += kKeyStep) {
        const auto some = [&](i64 row, i64 rows, i64 last) {
            const i64 depth = smaller(kKeyStep, round_up(last + 1 - p, kWidth));
            for (i64 d = 0; d < head_dim; d += kPanel) {
                const i64 vectors = smaller<i64>(kPanel, head_dim - d) / kWidth;
                const Operand<T> left{weights + row * ld + p - keys.low, ld, Pair<T>::size};
                const Panel<T> right{by_row + p * head_dim + d * Pair<T>::size,
                                     head_dim * Pair<T>::size};
                product<T>(left, rows, right, vectors, depth, out + row * head_dim + d, head_dim,
                           add || p > keys.low);
            }
        };
        if (p + kKeyStep <= positions[0] + 1)
            some(0, count, positions[count - 1]);
        else
            seeing_rows(positions, count, p, some);
    }
}

// `value` where a key lies behind its query, outside the window, or between the last key and the
// end of its vector.
G2R_INLINE void fill_hidden(float* row, i64 position, KeyRange keys, i64 window, float value) {
    const i64 first = window > 0 ? larger<i64>(0, position - window + 1) - keys.low : 0;
    for (i64 k = 0; k < smaller(first, keys.width); k++) row[k] = value;
    for (i64 k = larger<i64>(0, position + 1 - keys.low); k < keys.width; k++) row[k] = value;
}

}  // namespace g2r::G2R_NS
