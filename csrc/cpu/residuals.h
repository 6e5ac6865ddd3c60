// What a softmax leaves of the words that were drawn, summed over the rows of a sequence.
#pragma once

#include "rows.h"

namespace g2r::G2R_NS {

// Columns whose sums stay in the first-level cache while rows pass by.
constexpr i64 kResidualColumns = 1024;
// Rows that are summed before they are added to what was there: chains of additions stay short.
constexpr i64 kResidualRows = 128;
// Logits that are summed in float before double takes over, and that one task takes at least.
constexpr i64 kSumColumns = 2048, kTaskLogits = 16384;
constexpr float kLargest = 3.402823466e38f;

// The first `count` floats, and `fill` behind them.
G2R_INLINE vf load_some(const float* p, i64 count, float fill) {
    vf v = splat(fill);
    std::memcpy(&v, p, size_t(count) * sizeof(float));
    return v;
}

struct ResidualRow {
    float most;       // the largest logit
    float factor;     // weight over the sum of all shares exp(z - most)
    float of_target;  // weight times 1 - p(target)
};

// 1 / temperature in two floats: the rounding of one alone would bend every share the same way.
struct Inverse {
    explicit Inverse(double value)
        : head(splat(float(value))), tail(splat(float(value - double(float(value))))) {}
    vf head, tail;
};

// How far below the largest logit, in units of the temperature; finite for finite logits.
G2R_INLINE vf gap_below(vf most, vf x, const Inverse& inverse) {
    const vf distance = most - x;
    const vf gap = multiply_add(distance, inverse.head, distance * inverse.tail);
    // Infinite, or NaN where the two parts are infinities of both signs: as far as there is.
    return choose(gap <= kLargest, gap, splat(kLargest));
}

// The largest logit; NaN where one is not finite.
inline float largest_logit(const float* logits, i64 columns) {
    const i64 whole = columns / kWidth * kWidth;
    vf most[4], odd[4] = {};
    for (vf& m : most) m = splat(logits[0]);
    const auto look = [&](int n, vf x) {
        most[n] = maximum(most[n], x);
        odd[n] = multiply_add(x, vf{}, odd[n]);  // NaN for infinity too
    };
    i64 i = 0;
    for (; i + 4 * kWidth <= whole; i += 4 * kWidth)
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) look(n, load(logits + i + n * kWidth));
    for (; i < whole; i += kWidth) look(0, load(logits + i));
    if (whole < columns) look(0, load_some(logits + whole, columns - whole, logits[0]));
    const float none = sum((odd[0] + odd[1]) + (odd[2] + odd[3]));
    return none + largest(maximum(maximum(most[0], most[1]), maximum(most[2], most[3])));
}

// Shares are exp(-gap), of a largest logit 1. All but one of those are in `rest`, which so keeps
// its digits where one word has nearly everything; `moment` is the sum of gap * share.
struct Shares {
    double rest, moment;
};

inline Shares sum_shares(const float* logits, i64 columns, float most, const Inverse& inverse) {
    const vf top = splat(most);
    double rest = 0, moment = 0;
    i64 tops = 0;
    for (i64 start = 0; start < columns; start += kSumColumns) {
        const i64 stop = smaller(columns, start + kSumColumns);
        vf rests[2] = {}, moments[2] = {};
        vi counts[2] = {};
        const auto take = [&](int n, vf x) {
            const vf gap = gap_below(top, x, inverse), share = exp(-gap);
            const vi is_top = gap == 0.0f;
            counts[n] -= is_top;
            rests[n] += choose(is_top, vf{}, share);
            moments[n] = multiply_add(gap, share, moments[n]);
        };
        i64 i = start;
        for (; i + 2 * kWidth <= stop; i += 2 * kWidth) {
            take(0, load(logits + i));
            take(1, load(logits + i + kWidth));
        }
        for (; i + kWidth <= stop; i += kWidth) take(0, load(logits + i));
        if (i < stop) {
            take(0, load_some(logits + i, stop - i, most));
            tops -= kWidth - (stop - i);
        }
        rest += double(sum(rests[0] + rests[1]));
        moment += double(sum(moments[0] + moments[1]));
        const vi count = counts[0] + counts[1];
        for (int n = 0; n < kWidth; n++) tops += count[n];
    }
    return {rest + double(tops - 1), moment};
}

inline ResidualRow residual_row(const ResidualSums& in, i64 row) {
    const float* logits = in.logits + row * in.columns;
    const float most = largest_logit(logits, in.columns);
    if (most != most) {
        in.logps[row] = in.entropies[row] = most;
        return {most, most, most};
    }
    const Shares shares = sum_shares(logits, in.columns, most, Inverse(in.inverse_temperature));
    // In double: a sum of all shares is never below 1, and what is small keeps its digits.
    const double total = 1 + shares.rest, log_total = __builtin_log1p(shares.rest);
    const double drawn = double(logits[in.targets[row]]);
    const double gap = (double(most) - drawn) * in.inverse_temperature;
    in.logps[row] = float(-(gap + log_total));
    in.entropies[row] = float(log_total + shares.moment / total);
    const double others = gap == 0 ? shares.rest : (1 - __builtin_exp(-gap)) + shares.rest;
    const double weight = double(in.weights[row]);
    return {most, float(weight / total), float(weight * others / total)};
}

// Of columns first, first + 1, ..., of which there are `count`; `added` has room for whole vectors.
inline void add_residuals(const ResidualSums& in, const ResidualRow* found, i64 start, i64 stop,
                          i64 first, i64 count, float* added) {
    const i64 whole = count / kWidth * kWidth;
    const Inverse inverse(in.inverse_temperature);
    std::memset(added, 0, size_t(round_up(count, kWidth)) * sizeof(float));
    for (i64 row = start; row < stop; row++) {
        const float* logits = in.logits + row * in.columns + first;
        const vf most = splat(found[row].most), factor = splat(-found[row].factor);
        const i64 target = in.targets[row] - first;
        const bool here = target >= 0 && target < count;
        const float before = here ? added[target] : 0.0f;
        const auto take = [&](i64 i, vf x) {
            const vf share = exp(-gap_below(most, x, inverse));
            store(added + i, multiply_add(factor, share, load(added + i)));
        };
        i64 i = 0;
        for (; i + 2 * kWidth <= whole; i += 2 * kWidth) {
            take(i, load(logits + i));
            take(i + kWidth, load(logits + i + kWidth));
        }
        for (; i < whole; i += kWidth) take(i, load(logits + i));
        if (i < count) take(i, load_some(logits + i, count - i, found[row].most));
        // What all other words have, and not 1 less what this one has.
        if (here) added[target] = before + found[row].of_target;
    }
}

inline void residual_sums(const ResidualSums& in) {
    const Array<ResidualRow> rows(in.rows);
    ResidualRow* found = rows;
    const i64 step = larger<i64>(1, kTaskLogits / in.columns);
    parallel(ceil_div(in.rows, step), [&](i64 task) {
        const i64 stop = smaller(in.rows, (task + 1) * step);
        for (i64 row = task * step; row < stop; row++) found[row] = residual_row(in, row);
    });
    parallel(ceil_div(in.columns, kResidualColumns), [&](i64 task) {
        const i64 first = task * kResidualColumns;
        const i64 count = smaller(kResidualColumns, in.columns - first);
        alignas(64) float added[kResidualColumns];
        for (i64 start = 0; start < in.rows;) {
            const i64 owner = in.owners[start], most = smaller(in.rows, start + kResidualRows);
            i64 stop = start + 1;
            while (stop < most && in.owners[stop] == owner) stop++;
            add_residuals(in, found, start, stop, first, count, added);
            float* sums = in.sums + owner * in.columns + first;
            for (i64 i = 0; i < count; i++) sums[i] += added[i];
            start = stop;
        }
    });
}

}  // namespace g2r::G2R_NS
