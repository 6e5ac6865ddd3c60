// Arguments of what comes after the backward: scores per token, and the rewards made of them.
#include <cmath>

#include "torch_ops.h"

namespace g2r_torch {

namespace {

constexpr auto kFloat = ScalarType::Float;
constexpr auto kDouble = ScalarType::Double;
constexpr auto kLong = ScalarType::Long;

// offsets[j] .. offsets[j + 1] are segment j of `total` numbers; all of them are in one.
void check_offsets(const Checks& checks, const int64_t* offsets, int64_t segments, int64_t total) {
    if (offsets[0] != 0) checks.refuse("offsets do not begin at 0", 0, offsets[0]);
    for (int64_t j = 0; j < segments; ++j) {
        if (offsets[j + 1] < offsets[j]) {
            checks.refuse("offsets descend", "at least " + std::to_string(offsets[j]),
                          offsets[j + 1], j + 1);
        }
    }
    if (offsets[segments] != total) {
        checks.refuse("offsets do not end where scores do", total, offsets[segments]);
    }
}

}  // namespace

void embedding_scores(const Tensor& values, const Tensor& grads, int64_t readout,
                      const Tensor& scores) {
    const Checks checks("embedding_scores");
    checks.between("readout", readout, 0, 2);
    g2r::EmbeddingScores op{};
    op.readout = static_cast<g2r::Readout>(readout);
    op.rows = checks.size(grads, "grads", 3, 0);
    op.lanes = checks.size(grads, "grads", 3, 1);
    op.width = checks.size(grads, "grads", 3, 2);
    checks.multiple("the width of grads", op.width, 16);
    op.values = checks.in<float>(values, "values", kFloat, {op.rows, op.width});
    op.grads = checks.in<float>(grads, "grads", kFloat, {op.rows, op.lanes, op.width});
    op.scores = checks.out<float>(scores, "scores", kFloat, {op.rows, op.lanes});
    if (op.rows > 0 && op.lanes > 0) kernels_in_use().embedding_scores(op);
}

void attribution_rewards(const Tensor& scores, const Tensor& offsets, double temperature,
                         bool standardise, const Tensor& weights, const Tensor& starts,
                         const Tensor& alpha, const Tensor& rewards) {
    const Checks checks("attribution_rewards");
    if (!(temperature > 0 && std::isfinite(temperature))) {
        checks.refuse("temperature is out of range", "a finite number above 0", temperature);
    }
    g2r::AttributionRewards op{};
    op.segments = checks.size(weights, "weights", 1, 0);
    op.rewarded = checks.size(rewards, "rewards", 1, 0);
    const int64_t total = checks.size(scores, "scores", 1, 0);
    op.scores = checks.in<double>(scores, "scores", kDouble, {total});
    op.offsets = checks.in<int64_t>(offsets, "offsets", kLong, {op.segments + 1});
    check_offsets(checks, op.offsets, op.segments, total);
    op.temperature = temperature;
    op.standardise = standardise;
    op.weights = checks.in<double>(weights, "weights", kDouble, {op.segments});
    op.starts = checks.in<int64_t>(starts, "starts", kLong, {op.segments});
    for (int64_t j = 0; j < op.segments; ++j) {
        checks.span("rewards of a segment", op.starts[j], op.offsets[j + 1] - op.offsets[j],
                    op.rewarded, j);
    }
    op.alpha = checks.out<double>(alpha, "alpha", kDouble, {total});
    op.rewards = checks.out<double>(rewards, "rewards", kDouble, {op.rewarded});
    kernels_in_use().attribution_rewards(op);
}

}  // namespace g2r_torch
