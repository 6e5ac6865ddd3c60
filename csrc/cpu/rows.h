// What happens row by row between the products: norms, rotary embeddings, activations.
// Widths are multiples of 16, and therefore of a vector.
#pragma once

#include "vec.h"

namespace g2r::G2R_NS {

constexpr i64 kMostHeadDim = 256;
// Rows that one task of a row pass takes.
constexpr i64 kPassRows = 32;

// body(row) for every row below `rows`.
template <class Body>
void each_row(i64 rows, const Body& body) {
    parallel(ceil_div(rows, kPassRows), [&](i64 task) {
        const i64 stop = smaller(rows, (task + 1) * kPassRows);
        for (i64 row = task * kPassRows; row < stop; row++) body(row);
    });
}

// S: how x is kept; a value that is not kept is seen as if it had been.
template <class S>
G2R_INLINE vf rounded(vf x);
template <>
G2R_INLINE vf rounded<float>(vf x) {
    return x;
}
template <>
G2R_INLINE vf rounded<bf16>(vf x) {
    bf16 kept[kWidth];
    store(kept, x);
    return load(kept);
}

template <class From, class To>
G2R_INLINE void convert_row(const From* from, i64 width, To* to) {
    for (i64 i = 0; i < width; i += kWidth) store(to + i, load(from + i));
}

// Sum of f(i) for i = 0, kWidth, ..., in four chains.
template <class Terms>
G2R_INLINE float sum_over(i64 width, const Terms& terms) {
    vf sums[4] = {};
    i64 i = 0;
    for (; i + 4 * kWidth <= width; i += 4 * kWidth)
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) sums[n] += terms(i + n * kWidth);
    for (; i < width; i += kWidth) sums[0] += terms(i);
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// rsqrt(mean(x^2) + eps)
G2R_INLINE float norm_rstd(const float* x, i64 width, float eps) {
    const float squares = sum_over(width, [&](i64 i) { return load(x + i) * load(x + i); });
    return 1.0f / __builtin_sqrtf(squares / float(width) + eps);
}

// `out` = x * rstd, rounded to S; and into `kept` unless that is null.
template <class S, class T>
G2R_INLINE void norm_row(const float* x, i64 width, float rstd, S* kept, T* out) {
    for (i64 i = 0; i < width; i += kWidth) {
        const vf normed = rounded<S>(load(x + i) * rstd);
        if (kept != nullptr) store(kept + i, normed);
        store(out + i, normed);
    }
}

// out = rstd * (g - normed * mean(g * normed)), or out += that; g may be out.
template <bool add, class S>
G2R_INLINE void norm_backward_row(const float* g, i64 width, const S* normed, float rstd,
                                  float* out) {
    const float dot = sum_over(width, [&](i64 i) { return load(g + i) * load(normed + i); });
    const float mean = dot / float(width);
    for (i64 i = 0; i < width; i += kWidth) {
        const vf grad = (load(g + i) - load(normed + i) * mean) * rstd;
        store(out + i, add ? load(out + i) + grad : grad);
    }
}

// out = (x1 cos - x2 sin, x2 cos + x1 sin) * scale, x1 and x2 the halves of x.
G2R_INLINE void rotate(const float* __restrict x, i64 half, const float* __restrict cos,
                       const float* __restrict sin, float scale, float* __restrict out) {
    for (i64 i = 0; i < half; i++) {
        const float first = x[i], second = x[half + i];
        out[i] = (first * cos[i] - second * sin[i]) * scale;
        out[half + i] = (second * cos[i] + first * sin[i]) * scale;
    }
}

// The transpose of `rotate`, which is the rotation backwards.
G2R_INLINE void rotate_back(const float* __restrict g, i64 half, const float* __restrict cos,
                            const float* __restrict sin, float scale, float* __restrict out) {
    for (i64 i = 0; i < half; i++) {
        const float first = g[i], second = g[half + i];
        out[i] = (first * cos[i] + second * sin[i]) * scale;
        out[half + i] = (second * cos[i] - first * sin[i]) * scale;
    }
}

G2R_INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

struct Activated {
    vf value, slope;
};

template <Activation activation>
struct Chosen {
    static constexpr Activation value = activation;
};

// body(a Chosen)
template <class Body>
void by_activation(Activation activation, const Body& body) {
    switch (activation) {
        case Activation::silu:
            return body(Chosen<Activation::silu>());
        case Activation::gelu:
            return body(Chosen<Activation::gelu>());
        case Activation::gelu_tanh:
            return body(Chosen<Activation::gelu_tanh>());
    }
}

template <Activation activation>
G2R_INLINE Activated activate(vf x) {
    if constexpr (activation == Activation::silu) {
        const vf s = sigmoid(x), value = x * s;
        return {value, s + value * (1.0f - s)};
    } else if constexpr (activation == Activation::gelu_tanh) {
        // x (1 + tanh(u)) / 2 = x sigmoid(2 u), which loses nothing where tanh is near -1.
        const vf twice_u = x * (1.5957691216057308f + 0.07135481627159953f * (x * x));
        const vf s = sigmoid(twice_u), value = x * s;
        const vf slope_u = 1.5957691216057308f + 0.21406444881479859f * (x * x);
        const vf flat = value * (1.0f - s);  // where 0, the square may be infinite
        return {value, s + choose(flat == 0.0f, vf{}, flat * slope_u)};
    } else {
        float half[kWidth];
        store(half, x * -0.70710678118654752f);
        for (int i = 0; i < kWidth; i++) half[i] = 0.5f * __builtin_erfcf(half[i]);
        const vf s = load(half);
        return {x * s, s + x * 0.39894228040143268f * exp(x * x * -0.5f)};
    }
}

}  // namespace g2r::G2R_NS
