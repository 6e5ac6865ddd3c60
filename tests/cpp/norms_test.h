// Squared norms of gradients, lane by lane.
#pragma once

#include <algorithm>

#include "exact_buffers.h"

namespace kernels_test {

// Rows for `count` entries: stretches at any distance, forwards and backwards, and rows again.
inline void any_rows(const Buffer<int32_t>& rows, int64_t of) {
    int64_t at = draw(0, of - 1), step = 0;
    for (int64_t e = 0; e < rows.size(); ++e) {
        rows[e] = static_cast<int32_t>(at);
        if (draw(0, 4) == 0) step = draw(-2, 2);
        at = draw(0, 9) == 0 ? draw(0, of - 1) : (at + step + of) % of;
    }
}

// At most `entries` entries of ±1 in every row that is named; the others keep their NaN.
inline void named_rows(const Stored& x, const Buffer<int32_t>& rows, int64_t width, int entries) {
    for (int64_t e = 0; e < rows.size(); ++e) {
        for (int64_t i = 0; i < width; ++i) x.set(rows[e] * width + i, 0.0f);
        for (int n = 0; n < entries; ++n)
            x.set(rows[e] * width + draw(0, width - 1), draw(0, 1) ? 1.0f : -1.0f);
    }
}

inline void offsets_of(const Buffer<int64_t>& offsets, const std::vector<int64_t>& lengths) {
    offsets[0] = 0;
    for (size_t j = 0; j < lengths.size(); ++j)
        offsets[static_cast<int64_t>(j) + 1] = offsets[static_cast<int64_t>(j)] + lengths[j];
}

inline void test_squared_gradient_norms(const g2r::Kernels& kernels, Dtype dtype, int64_t in,
                                        int64_t out, const std::vector<int64_t>& lengths,
                                        int entries) {
    const auto lanes = static_cast<int64_t>(lengths.size());
    const Buffer<int64_t> offsets(lanes + 1);
    offsets_of(offsets, lengths);
    const int64_t count = offsets[lanes], kept_rows = count / 2 + 1, grad_rows = count + 1;
    const Buffer<int32_t> kept(count), rows(count);
    any_rows(kept, kept_rows);
    any_rows(rows, grad_rows);
    const Stored inputs(dtype, kept_rows * in), grads(dtype, grad_rows * out);
    named_rows(inputs, kept, in, entries);
    named_rows(grads, rows, out, entries);
    const Buffer<double> found(lanes);
    kernels.squared_gradient_norms({dtype, in, out, count, lanes, inputs.get(), grads.get(),
                                    kept.get(), rows.get(), offsets.get(), found.get()});
    bool equal = true;
    for (int64_t j = 0; j < lanes; ++j) {
        std::vector<double> gradient(static_cast<size_t>(in * out));
        for (int64_t e = offsets[j]; e < offsets[j + 1]; ++e)
            for (int64_t i = 0; i < in; ++i) {
                const float input = inputs[kept[e] * in + i];
                if (input == 0.0f) continue;
                for (int64_t o = 0; o < out; ++o)
                    gradient[static_cast<size_t>(i * out + o)] += input * grads[rows[e] * out + o];
            }
        double squares = 0;
        for (double value : gradient) squares += value * value;
        equal = equal && found[j] == squares;
    }
    check(equal, "a norm", "squared_gradient_norms");
}

inline void test_squared_row_sums(const g2r::Kernels& kernels, Dtype dtype, int64_t width,
                                  const std::vector<int64_t>& lengths) {
    const auto lanes = static_cast<int64_t>(lengths.size());
    const Buffer<int64_t> offsets(lanes + 1);
    offsets_of(offsets, lengths);
    const int64_t count = offsets[lanes], x_rows = count + 1;
    const Buffer<int32_t> rows(count);
    any_rows(rows, x_rows);
    const Stored x(dtype, x_rows * width);
    named_rows(x, rows, width, 5);
    const Buffer<double> found(lanes);
    kernels.squared_row_sums(
        {dtype, width, count, lanes, x.get(), rows.get(), offsets.get(), found.get()});
    bool equal = true;
    for (int64_t j = 0; j < lanes; ++j) {
        double squares = 0;
        for (int64_t i = 0; i < width; ++i) {
            double sum = 0;
            for (int64_t e = offsets[j]; e < offsets[j + 1]; ++e) sum += x[rows[e] * width + i];
            squares += sum * sum;
        }
        equal = equal && found[j] == squares;
    }
    check(equal, "a norm", "squared_row_sums");
}

}  // namespace kernels_test
