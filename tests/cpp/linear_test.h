// A linear layer, there and back.
#pragma once

#include "exact_buffers.h"

namespace kernels_test {

inline void test_linear(const g2r::Kernels& kernels, Dtype dtype, int64_t rows, int64_t in,
                        int64_t out) {
    const Stored x(dtype, rows * in), weight(dtype, out * in), bias(dtype, out);
    const Buffer<float> y(rows * out);
    integers(x, 4);
    integers(weight, 4);
    integers(bias, 9);
    const bool with_bias = draw(0, 1) != 0;
    kernels.linear_forward(
        {dtype, rows, x.get(), linear_of(weight, with_bias ? &bias : nullptr, out, in), y.get()});
    bool equal = true;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t n = 0; n < out; ++n) {
            float sum = with_bias ? bias[n] : 0.0f;
            for (int64_t k = 0; k < in; ++k) sum += x[r * in + k] * weight[n * in + k];
            equal = equal && y[r * out + n] == sum;
        }
    check(equal, "a product", "linear_forward");
}

// Gradients have more digits than bfloat16, and sums fewer than float.
inline void test_linear_backward(const g2r::Kernels& kernels, Dtype dtype, int64_t rows, int64_t in,
                                 int64_t out) {
    const Stored weight(dtype, out * in);
    const Buffer<float> grad(rows * out), dx(rows * in);
    integers(grad, 999);
    integers(weight, 4);
    kernels.linear_backward(
        {dtype, rows, grad.get(), linear_of(weight, nullptr, out, in), dx.get()});
    bool equal = true;
    std::vector<float> sums(static_cast<size_t>(in));
    for (int64_t r = 0; r < rows; ++r) {
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t n = 0; n < out; ++n)
            for (int64_t k = 0; k < in; ++k)
                sums[static_cast<size_t>(k)] += grad[r * out + n] * weight[n * in + k];
        equal = equal && std::equal(sums.begin(), sums.end(), dx.get() + r * in);
    }
    check(equal, "a gradient", "linear_backward");
}

}  // namespace kernels_test
