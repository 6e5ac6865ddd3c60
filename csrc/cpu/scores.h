// What is read at the input embeddings, one score per token, and the rewards made of it.
#pragma once

#include "rows.h"

namespace g2r::G2R_NS {

G2R_INLINE vf absolute(vf x) { return bit_cast<vf>(bit_cast<vi>(x) & 0x7fffffff); }

template <Readout readout>
void embedding_scores_of(const EmbeddingScores& in) {
    parallel(in.rows, [&](i64 row) {
        const float* values = in.values + row * in.width;
        for (i64 lane = 0; lane < in.lanes; lane++) {
            const float* grads = in.grads + (row * in.lanes + lane) * in.width;
            float& score = in.scores[row * in.lanes + lane];
            if constexpr (readout == Readout::dot)
                score =
                    sum_over(in.width, [&](i64 i) { return load(values + i) * load(grads + i); });
            else if constexpr (readout == Readout::l1)
                score = sum_over(in.width, [&](i64 i) { return absolute(load(grads + i)); });
            else
                score = __builtin_sqrtf(
                    sum_over(in.width, [&](i64 i) { return load(grads + i) * load(grads + i); }));
        }
    });
}

inline void embedding_scores(const EmbeddingScores& in) {
    switch (in.readout) {
        case Readout::dot:
            return embedding_scores_of<Readout::dot>(in);
        case Readout::l1:
            return embedding_scores_of<Readout::l1>(in);
        case Readout::l2:
            return embedding_scores_of<Readout::l2>(in);
    }
}

// Sum of f(i) for every i below `count`, in eight chains whatever the width of a vector.
template <class Terms>
G2R_INLINE double sum_of(i64 count, const Terms& terms) {
    double sums[8] = {};
    i64 i = 0;
    for (; i + 8 <= count; i += 8)
        for (int n = 0; n < 8; n++) sums[n] += terms(i + n);
    for (int n = 0; i < count; i++, n++) sums[n] += terms(i);
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) +
           ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// Scores whose spread is at most this share of the largest are all alike.
constexpr double kNoSpread = 1e-6;

// The population standard deviation, 0 where there is no spread to speak of; NaN stays NaN.
inline double spread_of(const double* scores, i64 count) {
    const double mean = sum_of(count, [&](i64 i) { return scores[i]; }) / double(count);
    const auto square = [&](i64 i) { return (scores[i] - mean) * (scores[i] - mean); };
    const double std = __builtin_sqrt(sum_of(count, square) / double(count));
    double most = 0;
    for (i64 i = 0; i < count; i++) most = larger(most, __builtin_fabs(scores[i]));
    return std <= kNoSpread * most ? 0 : std;
}

// alpha = softmax(scores / std / temperature), of zeros where std is 0.
inline void softmax_row(const double* scores, i64 count, double std, double temperature,
                        double* alpha) {
    double most = -__builtin_inf();
    for (i64 i = 0; i < count; i++) {
        alpha[i] = std == 0 ? 0 : scores[i] / std / temperature;
        most = larger(most, alpha[i]);
    }
    for (i64 i = 0; i < count; i++) alpha[i] = __builtin_exp(alpha[i] - most);
    const double total = sum_of(count, [&](i64 i) { return alpha[i]; });
    for (i64 i = 0; i < count; i++) alpha[i] /= total;
}

inline void attribution_rewards(const AttributionRewards& in) {
    parallel(in.segments, [&](i64 j) {
        const i64 first = in.offsets[j], count = in.offsets[j + 1] - first;
        const double* scores = in.scores + first;
        softmax_row(scores, count, in.standardise ? spread_of(scores, count) : 1, in.temperature,
                    in.alpha + first);
    });
    for (i64 i = 0; i < in.rewarded; i++) in.rewards[i] = 0;
    // Segments of one response overlap: in turn, so that sums are those of one order.
    for (i64 j = 0; j < in.segments; j++) {
        const i64 first = in.offsets[j], count = in.offsets[j + 1] - first;
        double* rewards = in.rewards + in.starts[j];
        for (i64 i = 0; i < count; i++) rewards[i] += in.weights[j] * in.alpha[first + i];
    }
}

}  // namespace g2r::G2R_NS
