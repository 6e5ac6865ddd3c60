// A layer's stages outside attention, there and back, with and without what a reader of linear
// layers asks for.
#pragma once

#include <algorithm>

#include "exact_buffers.h"

namespace kernels_test {

// Rows of ±1 have a norm of exactly 1: values are the integers of the plain product.
inline void test_qkv_forward(const g2r::Kernels& kernels, Dtype dtype, int64_t rows, const Sizes& s,
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

inline void test_mlp_forward(const g2r::Kernels& kernels, Dtype dtype, int64_t rows, const Sizes& s,
                             int64_t activation, int64_t kept, bool shown) {
    const int64_t mixed = s.heads * s.head_dim;
    const Buffer<float> x(rows * s.hidden), attended(rows * mixed);
    integers(x, 3);
    const Stored wo(dtype, s.hidden * mixed), gate(dtype, s.width * s.hidden),
        up(dtype, s.width * s.hidden), down(dtype, s.hidden * s.width), post_norm(dtype, s.hidden),
        bias(dtype, s.hidden), wide_bias(dtype, s.width);
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
        d_up(dtype, kept * s.width), activated(dtype, kept * s.width);
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
    if (shown) op.activation_out = activated.get();
    op.eps = 1e-5f;
    kernels.mlp_forward(op);
    check(!shown || finite(activated), "the input of W_down", "mlp_forward");
    check(finite(x) && finite(normed) && finite(rstd) && finite(d_gate) && finite(d_up),
          "an output", "mlp_forward");
}

// Saved rows of zero, or with one entry of a quarter of the width: the norm's gradient, with an
// rstd of 1, is an integer.
inline void norm_rows(const Stored& normed, int64_t rows, int64_t width, bool zero) {
    constant(normed, 0.0f);
    if (zero || width > 256) return;
    for (int64_t r = 0; r < rows; ++r)
        normed.set(r * width + draw(0, width - 1),
                   static_cast<float>(draw(0, 1) ? width : -width) / 4);
}

// grad -= normed * mean(grad * normed), row `at` of normed.
inline void norm_back(std::vector<float>& grad, const Stored& normed, int64_t at) {
    const auto width = static_cast<int64_t>(grad.size());
    float dot = 0.0f;
    for (int64_t i = 0; i < width; ++i)
        dot += grad[static_cast<size_t>(i)] * normed[at * width + i];
    for (int64_t i = 0; i < width; ++i)
        grad[static_cast<size_t>(i)] -= normed[at * width + i] * (dot / static_cast<float>(width));
}

inline void test_mlp_backward(const g2r::Kernels& kernels, Dtype dtype, int64_t rows,
                              const Sizes& s, int64_t kept, bool shown) {
    const int64_t mixed = s.heads * s.head_dim;
    const Buffer<float> dx(rows * s.hidden), rstd(kept), products(rows * s.hidden);
    const Buffer<int32_t> saved(rows);
    integers(dx, 1);
    constant(rstd, 1.0f);
    for (int64_t r = 0; r < rows; ++r) saved[r] = static_cast<int32_t>(draw(0, kept - 1));
    const Stored wo(dtype, s.hidden * mixed), gate(dtype, s.width * s.hidden),
        up(dtype, s.width * s.hidden), down(dtype, s.hidden * s.width), post_norm(dtype, s.hidden),
        normed(dtype, kept * s.hidden), d_gate(dtype, kept * s.width), d_up(dtype, kept * s.width),
        grad(dtype, rows * mixed), gate_up(dtype, rows * 2 * s.width);
    sparse(wo, s.hidden, mixed, 1);
    sparse(gate, s.width, s.hidden, 1);
    sparse(up, s.width, s.hidden, 1);
    sparse(down, s.hidden, s.width, 1);
    for (int64_t h = 0; h < s.hidden; ++h) post_norm.set(h, draw(0, 1) ? 1.0f : -1.0f);
    norm_rows(normed, kept, s.hidden, !shown);
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
    if (shown) op.gate_up = gate_up.get(), op.norm_products = products.get();
    kernels.mlp_backward(op);
    bool equal = true, seen = true;
    for (int64_t r = 0; r < rows; ++r) {
        const float* row = before.data() + r * s.hidden;
        std::vector<float> g(static_cast<size_t>(s.hidden)), out(row, row + s.hidden);
        for (int64_t i = 0; i < s.width; ++i) {
            float act = 0.0f;
            for (int64_t h = 0; h < s.hidden; ++h) act += row[h] * down[h * s.width + i];
            const float to_gate = act * d_gate[saved[r] * s.width + i];
            const float to_up = act * d_up[saved[r] * s.width + i];
            if (shown)
                seen = seen && gate_up[r * 2 * s.width + i] == to_gate &&
                       gate_up[(r * 2 + 1) * s.width + i] == to_up;
            for (int64_t h = 0; h < s.hidden; ++h)
                g[static_cast<size_t>(h)] +=
                    to_gate * gate[i * s.hidden + h] + to_up * up[i * s.hidden + h];
        }
        for (int64_t h = 0; h < s.hidden; ++h) {
            float& value = g[static_cast<size_t>(h)];
            if (shown)
                seen =
                    seen && products[r * s.hidden + h] == value * normed[saved[r] * s.hidden + h];
            value *= post_norm[h];
        }
        norm_back(g, normed, saved[r]);
        for (int64_t h = 0; h < s.hidden; ++h) {
            out[static_cast<size_t>(h)] += g[static_cast<size_t>(h)];
            equal = equal && dx[r * s.hidden + h] == out[static_cast<size_t>(h)];
        }
        for (int64_t i = 0; i < mixed; ++i) {
            float sum = 0.0f, most = 0.0f;
            for (int64_t h = 0; h < s.hidden; ++h) {
                const float term = out[static_cast<size_t>(h)] * wo[h * mixed + i];
                sum += term, most = std::max(most, std::max(std::fabs(term), std::fabs(sum)));
            }
            // What is beyond 256 is no longer exact in bfloat16.
            equal = equal && (most > 256.0f || grad[r * mixed + i] == sum);
        }
    }
    check(equal, "a gradient", "mlp_backward");
    check(seen, "what a reader of linear layers sees", "mlp_backward");
}

inline void test_qkv_backward(const g2r::Kernels& kernels, Dtype dtype, int64_t rows,
                              const Sizes& s, bool norms, bool queries, bool keys, int64_t kept,
                              bool shown) {
    const int64_t q_width = s.heads * s.head_dim, kv_width = s.kv_heads * s.head_dim;
    const int64_t width = (queries ? q_width : 0) + (keys ? 2 * kv_width : 0);
    const Buffer<float> dx(rows * s.hidden), rstd(kept), cos(kept * s.head_dim / 2),
        sin(kept * s.head_dim / 2), dk(rows * kv_width), dv(rows * kv_width),
        q_rstd(kept * s.heads), k_rstd(kept * s.kv_heads), products(rows * s.hidden),
        q_products(rows * s.head_dim), k_products(rows * s.head_dim);
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
        q_normed(dtype, kept * q_width), k_normed(dtype, kept * kv_width),
        projected(dtype, rows * width);
    integers(dq, 2);
    for (int64_t h = 0; h < s.hidden; ++h) input_norm.set(h, draw(0, 1) ? 1.0f : -1.0f);
    constant(q_norm, -1.0f);
    constant(k_norm, 1.0f);
    norm_rows(normed, kept, s.hidden, !shown);
    norm_rows(q_normed, kept * s.heads, s.head_dim, !shown);
    norm_rows(k_normed, kept * s.kv_heads, s.head_dim, !shown);
    sparse(wq, q_width, s.hidden, 2);
    sparse(wk, kv_width, s.hidden, 2);
    sparse(wv, kv_width, s.hidden, 2);
    std::vector<float> expected(static_cast<size_t>(rows * s.hidden));
    int64_t column = 0;
    g2r::QkvBackward op{};
    // The gradient of a projection, of which `products` belongs to its norm, all of it expected.
    std::vector<float> sent(static_cast<size_t>(rows * width));
    std::vector<float> of_q(static_cast<size_t>(rows * s.head_dim)), of_k(of_q);
    const auto add = [&](const auto& grads, const Stored& weight, int64_t heads, float scale,
                         const Stored* norm, const Stored& kept_heads, std::vector<float>& found) {
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t n = 0; n < heads; ++n) {
                std::vector<float> g(static_cast<size_t>(s.head_dim));
                const int64_t at = saved[r] * heads + n;
                for (int64_t d = 0; d < s.head_dim; ++d) {
                    float& value = g[static_cast<size_t>(d)];
                    value = scale * grads[(r * heads + n) * s.head_dim + d];
                    if (norm == nullptr) continue;
                    found[static_cast<size_t>(r * s.head_dim + d)] +=
                        value * kept_heads[at * s.head_dim + d];
                    value *= (*norm)[d];
                }
                if (norm != nullptr) norm_back(g, kept_heads, at);
                for (int64_t d = 0; d < s.head_dim; ++d) {
                    const float value = g[static_cast<size_t>(d)];
                    const int64_t out = n * s.head_dim + d;
                    sent[static_cast<size_t>(r * width + column + out)] = value;
                    for (int64_t h = 0; h < s.hidden; ++h)
                        expected[static_cast<size_t>(r * s.hidden + h)] +=
                            value * weight[out * s.hidden + h];
                }
            }
        column += heads * s.head_dim;
    };
    op.dtype = dtype;
    op.rows = rows, op.hidden = s.hidden, op.head_dim = s.head_dim;
    op.heads = queries ? s.heads : 0, op.kv_heads = keys ? s.kv_heads : 0;
    op.dx = dx.get(), op.saved = saved.get(), op.input_norm = input_norm.get();
    op.cos = cos.get(), op.sin = sin.get(), op.normed = normed.get(), op.rstd = rstd.get();
    op.scaling = 2.0f;
    if (shown) op.projected = projected.get(), op.norm_products = products.get();
    if (queries) {
        op.dq = dq.get();
        op.q = linear_of(wq, nullptr, q_width, s.hidden);
        if (norms) op.q_norm = q_norm.get(), op.q_kept = {q_normed.get(), q_rstd.get()};
        if (norms && shown) op.q_norm_products = q_products.get();
        add(dq, wq, s.heads, 2.0f, norms ? &q_norm : nullptr, q_normed, of_q);
    }
    if (keys) {
        op.dk = dk.get(), op.dv = dv.get();
        op.k = linear_of(wk, nullptr, kv_width, s.hidden);
        op.v = linear_of(wv, nullptr, kv_width, s.hidden);
        if (norms) op.k_norm = k_norm.get(), op.k_kept = {k_normed.get(), k_rstd.get()};
        if (norms && shown) op.k_norm_products = k_products.get();
        add(dk, wk, s.kv_heads, 1.0f, norms ? &k_norm : nullptr, k_normed, of_k);
        add(dv, wv, s.kv_heads, 1.0f, nullptr, k_normed, of_k);
    }
    const std::vector<float> before(dx.get(), dx.get() + dx.size());
    kernels.qkv_backward(op);
    bool equal = true, seen = true;
    for (int64_t r = 0; r < rows; ++r) {
        std::vector<float> g(expected.begin() + r * s.hidden,
                             expected.begin() + (r + 1) * s.hidden);
        for (int64_t h = 0; h < s.hidden; ++h) {
            float& value = g[static_cast<size_t>(h)];
            if (shown)
                seen =
                    seen && products[r * s.hidden + h] == value * normed[saved[r] * s.hidden + h];
            value *= input_norm[h];
        }
        norm_back(g, normed, saved[r]);
        for (int64_t h = 0; h < s.hidden; ++h)
            equal = equal && dx[r * s.hidden + h] == before[static_cast<size_t>(r * s.hidden + h)] +
                                                         g[static_cast<size_t>(h)];
    }
    check(equal, "a gradient", "qkv_backward");
    if (!shown) return;
    for (int64_t i = 0; i < projected.size(); ++i)
        seen = seen && projected[i] == sent[static_cast<size_t>(i)];
    for (int64_t i = 0; i < rows * s.head_dim; ++i) {
        const auto at = static_cast<size_t>(i);
        seen = seen && (op.q_norm_products == nullptr || q_products[i] == of_q[at]) &&
               (op.k_norm_products == nullptr || k_products[i] == of_k[at]);
    }
    check(seen, "what a reader of linear layers sees", "qkv_backward");
}

}  // namespace kernels_test
