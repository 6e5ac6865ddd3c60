// Every kernel of one table over ragged shapes, in buffers of exactly the size that it is told:
// for the address and undefined-behaviour sanitizers. Where the answer is an integer it is compared
// with a loop that is written from the definition.
//
//   kernels_test TABLE [large]     0: passed, 1: failed, 77: this processor has no such table
#include "attention_test.h"
#include "linear_test.h"
#include "residuals_test.h"
#include "threads.h"

namespace {

using namespace kernels_test;

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

// Rows of ±1 have a norm of exactly 1: values are the integers of the plain product.
void test_qkv_forward(const g2r::Kernels& kernels, Dtype dtype, int64_t rows, const Sizes& s,
                      bool norms, bool queries, int64_t kept) {
    const int64_t q_width = s.heads * s.head_dim, kv_width = s.kv_heads * s.head_dim;
    const Buffer<float> x(rows * s.hidden), cos(rows * s.head_dim / 2), sin(rows * s.head_dim / 2);
    for (int64_t i = 0; i < x.size(); ++i) x[i] = draw(0, 1) ? 1.0f : -1.0f;
    constant(cos, 0.0f);
    constant(sin, 1.0f);
    const Stored input_norm(dtype, s.hidden), q_norm(dtype, s.head_dim), k_norm(dtype, s.head_dim);
    constant(input_norm, 1.0f);
    constant(q_norm, 2.0f);
    constant(k_norm, 2.0f);
    const Stored wq(dtype, q_width * s.hidden), wk(dtype, kv_width * s.hidden),
        wv(dtype, kv_width * s.hidden), bv(dtype, kv_width);
    sparse(wq, q_width, s.hidden, 1);
    sparse(wk, kv_width, s.hidden, 1);
    sparse(wv, kv_width, s.hidden, 4);
    integers(bv, 3);
    const Buffer<int32_t> keep(rows);
    for (int64_t r = 0; r < rows; ++r) keep[r] = r < kept ? static_cast<int32_t>(kept - 1 - r) : -1;
    const Stored normed(dtype, kept * s.hidden), q_normed(dtype, kept * q_width),
        k_normed(dtype, kept * kv_width);
    const Buffer<float> rstd(kept), q_rstd(kept * s.heads), k_rstd(kept * s.kv_heads);
    const Stored q(dtype, rows * q_width), k(dtype, rows * kv_width), v(dtype, rows * kv_width);

    g2r::QkvForward op{};
    op.dtype = dtype;
    op.rows = rows, op.hidden = s.hidden;
    op.heads = queries ? s.heads : 0, op.kv_heads = s.kv_heads, op.head_dim = s.head_dim;
    op.x = x.get(), op.input_norm = input_norm.get();
    op.k = linear_of(wk, nullptr, kv_width, s.hidden);
    op.v = linear_of(wv, &bv, kv_width, s.hidden);
    op.cos = cos.get(), op.sin = sin.get(), op.keep = keep.get();
    op.norm = {normed.get(), rstd.get()};
    op.k_out = k.get(), op.v_out = v.get();
    op.eps = 0.0f, op.scaling = 0.5f;
    if (queries) {
        op.q = linear_of(wq, nullptr, q_width, s.hidden);
        op.q_out = q.get();
    }
    if (norms) {
        op.k_norm = k_norm.get();
        op.k_kept = {k_normed.get(), k_rstd.get()};
        if (queries) {
            op.q_norm = q_norm.get();
            op.q_kept = {q_normed.get(), q_rstd.get()};
        }
    }
    kernels.qkv_forward(op);
    bool equal = true;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t n = 0; n < kv_width; ++n) {
            float value = bv[n], key = 0.0f;
            // A quarter turn: the first half is minus the second, the second half is the first.
            const int64_t i = n % s.head_dim, half = s.head_dim / 2;
            const int64_t from = i < half ? n + half : n - half;
            for (int64_t h = 0; h < s.hidden; ++h) {
                value += x[r * s.hidden + h] * wv[n * s.hidden + h];
                key += x[r * s.hidden + h] * wk[from * s.hidden + h];
            }
            key *= (i < half ? -1.0f : 1.0f) * (norms ? 2.0f : 1.0f);
            equal = equal && v[r * kv_width + n] == value && k[r * kv_width + n] == key;
        }
    check(equal, "keys or values", "qkv_forward");
    check(!queries || finite(q), "queries", "qkv_forward");
    check(finite(normed) && finite(rstd), "what is kept", "qkv_forward");
    check(!norms || (finite(k_normed) && finite(k_rstd)), "kept heads", "qkv_forward");
}

void test_mlp_forward(const g2r::Kernels& kernels, Dtype dtype, int64_t rows, const Sizes& s,
                      int64_t activation, int64_t kept) {
    const int64_t mixed = s.heads * s.head_dim;
    const Buffer<float> x(rows * s.hidden);
    integers(x, 3);
    const Stored attended(dtype, rows * mixed), wo(dtype, s.hidden * mixed),
        gate(dtype, s.width * s.hidden), up(dtype, s.width * s.hidden),
        down(dtype, s.hidden * s.width), post_norm(dtype, s.hidden), bias(dtype, s.hidden),
        wide_bias(dtype, s.width);
    integers(attended, 2);
    sparse(wo, s.hidden, mixed, 3);
    sparse(gate, s.width, s.hidden, 3);
    sparse(up, s.width, s.hidden, 3);
    sparse(down, s.hidden, s.width, 3);
    constant(post_norm, 1.0f);
    integers(bias, 2);
    integers(wide_bias, 2);
    const Buffer<int32_t> keep(rows);
    for (int64_t r = 0; r < rows; ++r) keep[r] = r < kept ? static_cast<int32_t>(kept - 1 - r) : -1;
    const Stored normed(dtype, kept * s.hidden), d_gate(dtype, kept * s.width),
        d_up(dtype, kept * s.width);
    const Buffer<float> rstd(kept);
    g2r::MlpForward op{};
    op.dtype = dtype, op.activation = static_cast<g2r::Activation>(activation);
    op.rows = rows, op.hidden = s.hidden, op.width = s.width, op.attended_width = mixed;
    op.x = x.get(), op.attended = attended.get();
    op.o = linear_of(wo, &bias, s.hidden, mixed);
    op.gate = linear_of(gate, &wide_bias, s.width, s.hidden);
    op.up = linear_of(up, nullptr, s.width, s.hidden);
    op.down = linear_of(down, &bias, s.hidden, s.width);
    op.post_norm = post_norm.get(), op.keep = keep.get();
    op.norm = {normed.get(), rstd.get()};
    op.d_gate = d_gate.get(), op.d_up = d_up.get();
    op.eps = 1e-5f;
    kernels.mlp_forward(op);
    check(finite(x) && finite(normed) && finite(rstd) && finite(d_gate) && finite(d_up),
          "an output", "mlp_forward");
}

// Saved rows of zero: the norm's gradient is its rstd, and everything an integer.
void test_mlp_backward(const g2r::Kernels& kernels, Dtype dtype, int64_t rows, const Sizes& s,
                       int64_t kept) {
    const int64_t mixed = s.heads * s.head_dim;
    const Buffer<float> dx(rows * s.hidden), rstd(kept);
    const Buffer<int32_t> saved(rows);
    integers(dx, 1);
    constant(rstd, 1.0f);
    for (int64_t r = 0; r < rows; ++r) saved[r] = static_cast<int32_t>(draw(0, kept - 1));
    const Stored wo(dtype, s.hidden * mixed), gate(dtype, s.width * s.hidden),
        up(dtype, s.width * s.hidden), down(dtype, s.hidden * s.width), post_norm(dtype, s.hidden),
        normed(dtype, kept * s.hidden), d_gate(dtype, kept * s.width), d_up(dtype, kept * s.width),
        grad(dtype, rows * mixed);
    sparse(wo, s.hidden, mixed, 1);
    sparse(gate, s.width, s.hidden, 1);
    sparse(up, s.width, s.hidden, 1);
    sparse(down, s.hidden, s.width, 1);
    constant(post_norm, 1.0f);
    constant(normed, 0.0f);
    integers(d_gate, 1);
    integers(d_up, 1);
    std::vector<float> before(dx.get(), dx.get() + dx.size());
    g2r::MlpBackward op{};
    op.dtype = dtype;
    op.rows = rows, op.hidden = s.hidden, op.width = s.width, op.attended_width = mixed;
    op.dx = dx.get(), op.saved = saved.get();
    op.o = linear_of(wo, nullptr, s.hidden, mixed);
    op.gate = linear_of(gate, nullptr, s.width, s.hidden);
    op.up = linear_of(up, nullptr, s.width, s.hidden);
    op.down = linear_of(down, nullptr, s.hidden, s.width);
    op.post_norm = post_norm.get(), op.normed = normed.get(), op.rstd = rstd.get();
    op.d_gate = d_gate.get(), op.d_up = d_up.get(), op.grad_attended = grad.get();
    kernels.mlp_backward(op);
    bool equal = true;
    for (int64_t r = 0; r < rows; ++r) {
        std::vector<float> row(before.begin() + r * s.hidden, before.begin() + (r + 1) * s.hidden);
        std::vector<float> out = row;
        for (int64_t i = 0; i < s.width; ++i) {
            float act = 0.0f;
            for (int64_t h = 0; h < s.hidden; ++h)
                act += row[static_cast<size_t>(h)] * down[h * s.width + i];
            const float to_gate = act * d_gate[saved[r] * s.width + i];
            const float to_up = act * d_up[saved[r] * s.width + i];
            for (int64_t h = 0; h < s.hidden; ++h)
                out[static_cast<size_t>(h)] +=
                    to_gate * gate[i * s.hidden + h] + to_up * up[i * s.hidden + h];
        }
        for (int64_t h = 0; h < s.hidden; ++h)
            equal = equal && dx[r * s.hidden + h] == out[static_cast<size_t>(h)];
        for (int64_t i = 0; i < mixed; ++i) {
            float sum = 0.0f;
            for (int64_t h = 0; h < s.hidden; ++h)
                sum += out[static_cast<size_t>(h)] * wo[h * mixed + i];
            // Sums beyond 256 are no longer exact in bfloat16.
            equal = equal && (std::fabs(sum) > 256.0f || grad[r * mixed + i] == sum);
        }
    }
    check(equal, "a gradient", "mlp_backward");
}

void test_qkv_backward(const g2r::Kernels& kernels, Dtype dtype, int64_t rows, const Sizes& s,
                       bool norms, bool queries, bool keys, int64_t kept) {
    const int64_t q_width = s.heads * s.head_dim, kv_width = s.kv_heads * s.head_dim;
    const Buffer<float> dx(rows * s.hidden), rstd(kept), cos(kept * s.head_dim / 2),
        sin(kept * s.head_dim / 2), dk(rows * kv_width), dv(rows * kv_width),
        q_rstd(kept * s.heads), k_rstd(kept * s.kv_heads);
    const Buffer<int32_t> saved(rows);
    for (int64_t r = 0; r < rows; ++r) saved[r] = static_cast<int32_t>(draw(0, kept - 1));
    integers(dx, 2);
    integers(dk, 2);
    integers(dv, 2);
    constant(cos, 1.0f);
    constant(sin, 0.0f);
    constant(rstd, 1.0f);
    constant(q_rstd, 1.0f);
    constant(k_rstd, 1.0f);
    const Stored input_norm(dtype, s.hidden), q_norm(dtype, s.head_dim), k_norm(dtype, s.head_dim),
        wq(dtype, q_width * s.hidden), wk(dtype, kv_width * s.hidden),
        wv(dtype, kv_width * s.hidden), dq(dtype, rows * q_width), normed(dtype, kept * s.hidden),
        q_normed(dtype, kept * q_width), k_normed(dtype, kept * kv_width);
    integers(dq, 2);
    constant(input_norm, 1.0f);
    constant(q_norm, 1.0f);
    constant(k_norm, 1.0f);
    constant(normed, 0.0f);
    constant(q_normed, 0.0f);
    constant(k_normed, 0.0f);
    sparse(wq, q_width, s.hidden, 2);
    sparse(wk, kv_width, s.hidden, 2);
    sparse(wv, kv_width, s.hidden, 2);
    std::vector<float> expected(dx.get(), dx.get() + dx.size());
    const auto add = [&](const auto& grads, const Stored& weight, int64_t width, float scale) {
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t n = 0; n < width; ++n)
                for (int64_t h = 0; h < s.hidden; ++h)
                    expected[static_cast<size_t>(r * s.hidden + h)] +=
                        scale * grads[r * width + n] * weight[n * s.hidden + h];
    };
    g2r::QkvBackward op{};
    op.dtype = dtype;
    op.rows = rows, op.hidden = s.hidden, op.head_dim = s.head_dim;
    op.heads = queries ? s.heads : 0, op.kv_heads = keys ? s.kv_heads : 0;
    op.dx = dx.get(), op.saved = saved.get(), op.input_norm = input_norm.get();
    op.cos = cos.get(), op.sin = sin.get(), op.normed = normed.get(), op.rstd = rstd.get();
    op.scaling = 2.0f;
    if (queries) {
        op.dq = dq.get();
        op.q = linear_of(wq, nullptr, q_width, s.hidden);
        if (norms) op.q_norm = q_norm.get(), op.q_kept = {q_normed.get(), q_rstd.get()};
        add(dq, wq, q_width, 2.0f);
    }
    if (keys) {
        op.dk = dk.get(), op.dv = dv.get();
        op.k = linear_of(wk, nullptr, kv_width, s.hidden);
        op.v = linear_of(wv, nullptr, kv_width, s.hidden);
        if (norms) op.k_norm = k_norm.get(), op.k_kept = {k_normed.get(), k_rstd.get()};
        add(dk, wk, kv_width, 1.0f);
        add(dv, wv, kv_width, 1.0f);
    }
    kernels.qkv_backward(op);
    bool equal = true;
    for (int64_t i = 0; i < dx.size(); ++i)
        equal = equal && dx[i] == expected[static_cast<size_t>(i)];
    check(equal, "a gradient", "qkv_backward");
}

void test_dense(const g2r::Kernels& kernels, Dtype dtype, int64_t rows, const Sizes& s,
                int64_t kept, bool norms, bool queries, bool keys) {
    test_qkv_forward(kernels, dtype, rows, s, norms, queries, draw(0, 1) ? kept : 0);
    test_qkv_backward(kernels, dtype, rows, s, norms, queries || !keys, keys, kept);
    test_mlp_forward(kernels, dtype, rows, s, rows % 3, kept);
    test_mlp_backward(kernels, dtype, rows, s, kept);
    test_linear(kernels, dtype, rows, s.hidden, draw(1, 150));
    test_linear_backward(kernels, dtype, rows, s.hidden, draw(1, 150));
}

// Beyond what a product takes at once of a sum (512) and a stage of its width (1024), and segments
// of several tiles of queries and of keys.
void test_large(const g2r::Kernels& kernels, Dtype dtype) {
    const Sizes wide{528, 2, 1, 16, 1104};
    test_dense(kernels, dtype, 13, wide, 5, true, true, true);
    const Sizes heads{16, 40, 5, 16, 32};  // wider together than a sum
    test_qkv_backward(kernels, dtype, 7, heads, true, true, true, 4);
    test_mlp_forward(kernels, dtype, 7, heads, 0, 4);
    test_linear(kernels, dtype, 7, wide.hidden, wide.width);
    test_linear_backward(kernels, dtype, 7, 16, wide.width);
    test_linear_backward(kernels, dtype, 3, 16, 0);
    for (int64_t window : {0, 1, 70})
        test_attention(kernels, dtype, {32, 2, 1, 16, 32}, window, 0.0f, 300);
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
