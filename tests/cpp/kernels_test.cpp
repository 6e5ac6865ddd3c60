// Every kernel of one table over ragged shapes, in buffers of exactly the size that it is told:
// for the address and undefined-behaviour sanitizers. Where the answer is an integer it is compared
// with a loop that is written from the definition.
//
//   kernels_test TABLE [large]     0: passed, 1: failed, 77: this processor has no such table
#include "attention_test.h"
#include "linear_test.h"
#include "norms_test.h"
#include "residuals_test.h"
#include "stages_test.h"
#include "threads.h"

namespace {

using namespace kernels_test;
using Lengths = std::vector<int64_t>;

void test_embedding_scores(const g2r::Kernels& kernels, int64_t rows, int64_t lanes,
                           int64_t width) {
    const Buffer<float> values(rows * width), grads(rows * lanes * width);
    integers(values, 3);
    integers(grads, 3);
    for (int64_t readout = 0; readout < 3; ++readout) {
        const Buffer<float> scores(rows * lanes);
        kernels.embedding_scores({static_cast<g2r::Readout>(readout), rows, lanes, width,
                                  values.get(), grads.get(), scores.get()});
        bool equal = true;
        for (int64_t i = 0; i < rows * lanes; ++i) {
            float sum = 0.0f;
            for (int64_t k = 0; k < width; ++k) {
                const float value = values[i / lanes * width + k], grad = grads[i * width + k];
                sum += readout == 0 ? value * grad : readout == 1 ? std::fabs(grad) : grad * grad;
            }
            equal = equal && scores[i] == (readout == 2 ? std::sqrt(sum) : sum);
        }
        check(equal, "a score", "embedding_scores");
    }
}

// Scores are two numbers far apart, so that alpha is 0 and 1 / n with n a power of two.
void test_attribution_rewards(const g2r::Kernels& kernels, int64_t segments, bool standardise) {
    const Buffer<int64_t> offsets(segments + 1), starts(segments);
    const Buffer<double> weights(segments);
    int64_t rewarded = 0;
    offsets[0] = 0;
    for (int64_t j = 0; j < segments; ++j) {
        const int64_t length = draw(0, 3) == 0 ? 0 : int64_t(1) << draw(0, 7);
        offsets[j + 1] = offsets[j] + length;
        starts[j] = draw(0, 9);
        weights[j] = static_cast<double>(draw(-3, 3));
        rewarded = std::max(rewarded, starts[j] + length);
    }
    const Buffer<double> scores(offsets[segments]), alpha(offsets[segments]), rewards(rewarded);
    std::vector<double> shares, sums(static_cast<size_t>(rewarded));
    for (int64_t j = 0; j < segments; ++j) {
        const int64_t first = offsets[j], length = offsets[j + 1] - first;
        for (int64_t i = 0; i < length; ++i) {
            // Every other one, so that the mean is 0 and the standard deviation 1; 1 alone.
            scores[first + i] = i % 2 == 0 ? 1.0 : -1.0;
            shares.push_back(i % 2 == 0 ? 1.0 / static_cast<double>((length + 1) / 2) : 0.0);
            sums[static_cast<size_t>(starts[j] + i)] += weights[j] * shares.back();
        }
    }
    kernels.attribution_rewards({segments, rewarded, scores.get(), offsets.get(), 1.0 / 1024,
                                 standardise, weights.get(), starts.get(), alpha.get(),
                                 rewards.get()});
    bool equal = true;
    for (int64_t i = 0; i < alpha.size(); ++i)
        equal = equal && alpha[i] == shares[static_cast<size_t>(i)];
    check(equal, "an alpha", "attribution_rewards");
    equal = true;
    for (int64_t i = 0; i < rewarded; ++i)
        equal = equal && rewards[i] == sums[static_cast<size_t>(i)];
    check(equal, "a reward", "attribution_rewards");
}

void test_dense(const g2r::Kernels& kernels, Dtype dtype, int64_t rows, const Sizes& s,
                int64_t kept, bool norms, bool queries, bool keys) {
    test_qkv_forward(kernels, dtype, rows, s, norms, queries, draw(0, 1) ? kept : 0);
    for (bool shown : {false, true}) {
        test_qkv_backward(kernels, dtype, rows, s, norms, queries || !keys, keys, kept, shown);
        test_mlp_forward(kernels, dtype, rows, s, rows % 3, kept, shown);
        test_mlp_backward(kernels, dtype, rows, s, kept, shown);
    }
    test_linear(kernels, dtype, rows, s.hidden, draw(1, 150));
    test_linear_backward(kernels, dtype, rows, s.hidden, draw(1, 150));
}

// Beyond what a product takes at once of a sum (1024) and a stage of its width (512), and segments
// of several tiles of queries and of keys.
void test_large(const g2r::Kernels& kernels, Dtype dtype) {
    const Sizes wide{1040, 2, 1, 16, 1104};
    test_dense(kernels, dtype, 13, wide, 5, true, true, true);
    const Sizes heads{16, 72, 9, 16, 32};  // wider together than a sum
    test_qkv_backward(kernels, dtype, 7, heads, true, true, true, 4, true);
    test_mlp_forward(kernels, dtype, 7, heads, 0, 4, true);
    // So many rows that weights are packed once for all of them.
    test_dense(kernels, dtype, 3030, {16, 1, 1, 16, 16}, 300, true, true, true);
    const Sizes stripes{16, 1, 1, 16, 528};
    test_mlp_forward(kernels, dtype, 3030, stripes, 0, 300, true);
    test_mlp_backward(kernels, dtype, 3030, stripes, 300, false);
    test_linear(kernels, dtype, 7, wide.hidden, wide.width);
    test_linear_backward(kernels, dtype, 7, 16, wide.width);
    test_linear_backward(kernels, dtype, 3, 16, 0);
    for (int64_t window : {0, 1, 70})
        test_attention(kernels, dtype, {32, 2, 1, 16, 32}, window, 0.0f, 300);
    // More rows of Gram matrices than a task takes, and more terms of a gradient than a slice.
    test_squared_gradient_norms(kernels, dtype, 1280, 1280, {1100}, 3);
    test_squared_gradient_norms(kernels, dtype, 1031, 80, {600, 1025}, 3);
}

// With rows enough, every one of three threads takes rows of its own through a stage.
void test_threads(const g2r::Kernels& kernels, Dtype dtype) {
    const ThreePool three;
    const Sizes s{48, 2, 1, 32, 80};
    for (int64_t rows : {1, 7, 37, 260})
        test_dense(kernels, dtype, rows, s, rows, true, true, true);
    const Sizes narrow{16, 1, 1, 16, 16};
    test_dense(kernels, dtype, 800, narrow, 300, true, true, true);
    for (int64_t window : {0, 1, 5})
        test_attention(kernels, dtype, {48, 4, 2, 16, 80}, window, 0.0f, 40);
    test_embedding_scores(kernels, 37, 3, 48);
    test_attribution_rewards(kernels, 40, true);
    test_residual_sums(kernels, 37, 5003);
    test_residual_sums(kernels, 4000, 16);
    test_squared_gradient_norms(kernels, dtype, 97, 200, {70, 0, 5, 200}, 5);
    test_squared_row_sums(kernels, dtype, 80, {70, 0, 5, 200});
}

void test_all(const g2r::Kernels& kernels, Dtype dtype) {
    const Sizes sizes[] = {{16, 1, 1, 16, 16},  {48, 2, 1, 32, 80},  {80, 4, 1, 16, 112},
                           {112, 2, 2, 48, 48}, {64, 3, 1, 80, 208}, {32, 2, 2, 128, 32}};
    const int64_t rows[] = {1, 2, 5, 6, 7, 13, 17, 37};
    for (const Sizes& s : sizes) {
        for (int64_t n : rows) {
            const int64_t kept = draw(1, n);
            const bool norms = draw(0, 1) != 0, queries = draw(0, 3) != 0, keys = draw(0, 3) != 0;
            test_dense(kernels, dtype, n, s, kept, norms, queries, keys);
        }
        for (int64_t window : {0, 1, 3, 1000})
            for (int64_t longest : {1, 7, 40})
                test_attention(kernels, dtype, s, window, window == 3 ? 5.0f : 0.0f, longest);
    }
    for (int64_t width = 16; width <= 112; width += 16)
        test_embedding_scores(kernels, draw(1, 9), draw(1, 5), width);
    for (int64_t segments : {0, 1, 2, 9, 40})
        for (bool standardise : {false, true})
            test_attribution_rewards(kernels, segments, standardise);
    for (int64_t columns : {1, 2, 15, 16, 17, 63, 97, 1030, 2100})
        test_residual_sums(kernels, draw(1, 9), columns);
    test_residual_sums(kernels, 300, 33);
    for (const Lengths& lengths : {Lengths{}, {0}, {1}, {0, 3, 0, 64}, {65, 5, 6, 63, 130, 0}}) {
        for (int64_t in : {1, 16, 33, 80, 130})
            test_squared_gradient_norms(kernels, dtype, in, draw(1, 150), lengths, 4);
        test_squared_gradient_norms(kernels, dtype, 272, 128, lengths, 4);
        for (int64_t width : {16, 64, 80}) test_squared_row_sums(kernels, dtype, width, lengths);
    }
}

}  // namespace

int main(int argc, char** argv) {
    const bool large = argc == 3 && std::strcmp(argv[2], "large") == 0;
    if (argc != 2 && !large) return 2;
    const g2r::Kernels* kernels = g2r::find_kernels(argv[1]);
    if (kernels == nullptr) return 77;
    for (Dtype dtype : {Dtype::f32, Dtype::bf16}) {
        if (large) {
            test_large(*kernels, dtype);
        } else {
            test_all(*kernels, dtype);
            test_threads(*kernels, dtype);
        }
    }
    if (failures == 0) std::printf("%s: passed\n", argv[1]);
    return failures == 0 ? 0 : 1;
}
