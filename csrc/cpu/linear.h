// A linear layer on its own, there and back: the LM head.
#pragma once

#include "stages.h"

namespace g2r::G2R_NS {

// An epilogue; columns may be any number.
template <class S>
struct WithBias {
    float* out;  // [rows][columns]
    i64 columns;
    const S* bias;

    template <int N>
    G2R_INLINE void expect(i64 row, i64 column) const {
        ask_for<N, true>(out + row * columns + column);
    }
    template <int N>
    G2R_INLINE void operator()(i64 row, i64 column, const vf (&values)[N]) const {
        float tile[N * kWidth];
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) store(tile + n * kWidth, values[n]);
        float* to = out + row * columns + column;
        const i64 count = smaller<i64>(N * kWidth, columns - column);
        for (i64 c = 0; c < count; c++)
            to[c] = tile[c] + (bias == nullptr ? 0.0f : widen(bias[column + c]));
    }
};

template <class S, class T>
void linear_forward_as(const LinearForward& in) {
    const i64 columns = in.linear.out, depth = in.linear.in;
    const Transposed<T, S> weight{stacked<S>(in.linear)};
    const S* bias = static_cast<const S*>(in.linear.bias);
    each_chunk(in.rows, kTaskRows, [&](i64 start, i64 rows) {
        const Operands<S, T> operands(rows, depth);
        const S* x = static_cast<const S*>(in.x) + start * depth;
        multiply<T>({operands.of(x, rows), depth}, rows, weight,
                    WithBias<S>{in.out + start * columns, columns, bias});
    });
}

// In float products whatever the storage: a cotangent over a vocabulary spans many magnitudes.
template <class S>
void linear_backward_of(const LinearBackward& in) {
    const i64 columns = in.linear.in, depth = in.linear.out;
    const Plain<float, S> weight{stacked<S>(in.linear)};
    each_chunk(in.rows, kTaskRows, [&](i64 start, i64 rows) {
        const Rows<float> grad{in.grad + start * depth, depth};
        float* out = in.out + start * columns;
        if (depth == 0) std::memset(out, 0, size_t(rows * columns) * sizeof(float));
        multiply_into<float>(grad, rows, weight, out, false);
    });
}

inline void linear_forward(const LinearForward& in) { G2R_BY_DTYPE(linear_forward, in); }

inline void linear_backward(const LinearBackward& in) {
    in.dtype == Dtype::f32 ? linear_backward_of<float>(in) : linear_backward_of<bf16>(in);
}

}  // namespace g2r::G2R_NS
