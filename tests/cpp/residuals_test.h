// Residual sums where every share is 0 or one over a power of two.
#pragma once

#include "exact_buffers.h"

namespace kernels_test {

inline void test_residual_sums(const g2r::Kernels& kernels, int64_t rows, int64_t columns) {
    const int64_t count = 3;
    const Buffer<float> logits(rows * columns), weights(rows), sums(count * columns), logps(rows),
        entropies(rows);
    const Buffer<int64_t> targets(rows), owners(rows);
    integers(sums, 9);
    std::vector<float> expected(sums.get(), sums.get() + sums.size());
    for (int64_t i = 0; i < logits.size(); ++i) logits[i] = -1000.0f;
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t words = columns > 1 ? int64_t(1) << draw(0, 1) : 1,
                      first = draw(0, columns - words);
        for (int64_t n = 0; n < words; ++n) logits[r * columns + first + n] = 0.0f;
        targets[r] = draw(0, columns - 1);
        weights[r] = static_cast<float>(draw(0, 4));
        // A sequence's rows are neighbours, mostly.
        owners[r] = r == 0 || draw(0, 5) == 0 ? draw(0, count - 1) : owners[r - 1];
        float* of_owner = expected.data() + owners[r] * columns;
        for (int64_t n = 0; n < words; ++n)
            of_owner[first + n] -= weights[r] / static_cast<float>(words);
        of_owner[targets[r]] += weights[r];
    }
    kernels.residual_sums({rows, columns, logits.get(), targets.get(), weights.get(), owners.get(),
                           1.0, sums.get(), logps.get(), entropies.get()});
    check(std::equal(expected.begin(), expected.end(), sums.get()), "a sum", "residual_sums");
    bool finite = true;
    for (int64_t r = 0; r < rows; ++r)
        finite = finite && logps[r] <= 0.0f && entropies[r] >= 0.0f && entropies[r] < 1.0f;
    check(finite, "a log-probability or an entropy", "residual_sums");
}

}  // namespace kernels_test
