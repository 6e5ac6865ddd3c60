// A layer's stages outside attention: row passes between products, a chunk of rows at a time.
//
// S is the storage type, T what products multiply.
#pragma once

#include "gemm.h"
#include "rows.h"

namespace g2r::G2R_NS {

// body(start, rows) for chunks of at most `most` rows, whose intermediate values are alive
// together. Where there are rows enough, every thread takes chunks of its own through all the
// products of a stage, and waits for the others once; else the threads share the products of one
// chunk after the other.
template <class Body>
void each_chunk(i64 rows, i64 most, const Body& body) {
    const i64 threads = pool().threads();
    if (threads > 1 && rows >= threads * kFewestOwnRows) {
        const i64 tiles = ceil_div(rows, kRows);
        const i64 chunks = round_up(ceil_div(rows, most), threads);
        parallel(chunks, [&](i64 index) {
            const Alone alone;
            const i64 start = index * tiles / chunks * kRows;
            const i64 stop = smaller(rows, (index + 1) * tiles / chunks * kRows);
            body(start, stop - start);
        });
        return;
    }
    const i64 chunk = most * ceil_div(threads, 16);
    for (i64 start = 0; start < rows; start += chunk) body(start, smaller(chunk, rows - start));
}

// Rows of storage as what products multiply: themselves, or converted.
template <class S, class T>
class Operands {
 public:
    Operands(i64 rows, i64 width) : width_(width), data_(rows * width) {}
    const T* of(const S* x, i64 rows) const {
        T* const out = data_;
        each_row(rows, [&](i64 row) { convert_row(x + row * width_, width_, out + row * width_); });
        return out;
    }

 private:
    i64 width_;
    Array<T> data_;
};
template <class S>
class Operands<S, S> {
 public:
    Operands(i64, i64) {}
    const S* of(const S* x, i64) const { return x; }
};

template <class S>
G2R_INLINE vf bias_at(const void* bias, i64 column) {
    return bias == nullptr ? vf{} : load(static_cast<const S*>(bias) + column);
}

// An epilogue: use(out, values, column) for every vector of the finished numbers, `out` being where
// it belongs in [rows][width]. Columns are a multiple of kWidth.
template <class Out, class Use>
struct EachVector {
    Out* out;
    i64 width;
    Use use;
    template <int N>
    G2R_INLINE void expect(i64 row, i64 column) const {
        ask_for<N, true>(out + row * width + column);
    }
    template <int N>
    G2R_INLINE void operator()(i64 row, i64 column, const vf (&values)[N]) const {
#pragma GCC unroll 8
        for (int n = 0; n < N; n++, column += kWidth)
            use(out + row * width + column, values[n], column);
    }
};

template <class Out, class Use>
G2R_INLINE EachVector<Out, Use> each_vector(Out* out, i64 width, const Use& use) {
    return {out, width, use};
}

template <class Out>
G2R_INLINE auto store_into(Out* out, i64 width) {
    return each_vector(out, width, [](Out* at, vf values, i64) { store(at, values); });
}

template <class S>
G2R_INLINE auto add_into(float* out, i64 width, const void* bias) {
    return each_vector(out, width, [=](float* at, vf values, i64 column) {
        store(at, load(at) + (values + bias_at<S>(bias, column)));
    });
}

// out = the norm of x, before its weight, kept as row `at` of `kept`, or nowhere: -1.
template <class S, class T>
G2R_INLINE void norm_forward(const float* x, i64 width, float eps, const NormRows& kept, i64 at,
                             T* out) {
    const float rstd = norm_rstd(x, width, eps);
    S* normed = static_cast<S*>(kept.normed);
    norm_row(x, width, rstd, at < 0 || normed == nullptr ? nullptr : normed + at * width, out);
    if (at >= 0 && kept.rstd != nullptr) kept.rstd[at] = rstd;
}

// dx += the norm's input gradient; g is the gradient of its output times its weight.
template <class S>
G2R_INLINE void norm_backward(const float* g, i64 width, const void* normed, const float* rstd,
                              i64 at, float* dx) {
    const S* kept = static_cast<const S*>(normed) + at * width;
    norm_backward_row<true>(g, width, kept, rstd[at], dx);
}

template <class S>
Stack<S> stacked(const Linear& first, const Linear& second = {}, const Linear& third = {}) {
    Stack<S> stack;
    stack.add(first);
    stack.add(second);
    stack.add(third);
    return stack;
}

// The heads of one projection.
struct HeadsForward {
    i64 heads, head_dim;
    const void* bias;
    const void* norm;  // or null
    NormRows kept;
    void* out;
    float eps, scale;
};

// projected: [heads][head_dim], overwritten; cos null: no rotation.
template <class S>
G2R_INLINE void finish_heads(const HeadsForward& in, float* projected, i64 row, i64 kept,
                             const float* cos, const float* sin) {
    const i64 dim = in.head_dim;
    for (i64 h = 0; h < in.heads; h++, projected += dim) {
        float rotated[kMostHeadDim];
        S* out = static_cast<S*>(in.out) + (row * in.heads + h) * dim;
        if (in.bias != nullptr)
            for (i64 d = 0; d < dim; d += kWidth)
                store(projected + d, load(projected + d) + bias_at<S>(in.bias, h * dim + d));
        if (in.norm != nullptr) {
            const i64 at = kept < 0 ? -1 : kept * in.heads + h;
            norm_forward<S>(projected, dim, in.eps, in.kept, at, projected);
            for (i64 d = 0; d < dim; d += kWidth)
                store(projected + d,
                      load(projected + d) * load(static_cast<const S*>(in.norm) + d));
        }
        if (cos != nullptr) {
            rotate(projected, dim / 2, cos, sin, in.scale, rotated);
            convert_row(rotated, dim, out);
        } else {
            convert_row(projected, dim, out);
        }
    }
}

template <class S, class T>
void qkv_forward_as(const QkvForward& in) {
    const i64 hidden = in.hidden, dim = in.head_dim, half = dim / 2;
    Transposed<T, S> weight{stacked<S>(in.q, in.k, in.v), static_cast<const S*>(in.input_norm)};
    const i64 width = weight.columns();
    const PackedAhead<T> ahead(in.rows, packed_size(width, hidden));
    weight.packed = ahead.from(0);
    pack_ahead(weight);
    const i64 q_width = in.q.weight == nullptr ? 0 : in.q.out;
    const i64 k_width = in.k.weight == nullptr ? 0 : in.k.out;
    const HeadsForward q{in.heads,  dim,      in.q.bias, in.q_norm,
                         in.q_kept, in.q_out, in.eps,    in.scaling};
    const HeadsForward k{in.kv_heads, dim, in.k.bias, in.k_norm, in.k_kept, in.k_out, in.eps, 1.0f};
    const HeadsForward v{in.kv_heads, dim, in.v.bias, nullptr, {}, in.v_out, in.eps, 1.0f};
    each_chunk(in.rows, ahead.chunk_rows(), [&](i64 start, i64 rows) {
        const Array<T> normed(rows * hidden);
        const Array<float> projected(rows * width);
        each_row(rows, [&](i64 r) {
            const i64 row = start + r;
            norm_forward<S>(in.x + row * hidden, hidden, in.eps, in.norm, in.keep[row],
                            normed + r * hidden);
        });
        multiply_into<T>({normed, hidden}, rows, weight, projected, false);
        each_row(rows, [&](i64 r) {
            const i64 row = start + r, kept = in.keep[row];
            const float *cos = in.cos + row * half, *sin = in.sin + row * half;
            float* at = projected + r * width;
            if (in.q.weight != nullptr) finish_heads<S>(q, at, row, kept, cos, sin);
            if (in.k.weight != nullptr) finish_heads<S>(k, at + q_width, row, kept, cos, sin);
            if (in.v.weight != nullptr)
                finish_heads<S>(v, at + q_width + k_width, row, kept, nullptr, nullptr);
        });
    });
}

// Features of gate and of up that go through the products together: few, so that what lies between
// two products stays in the caches however wide the layer is, and both together are one slice.
constexpr i64 kStripe = kDepth / 2;

// body(first, count) for the stripes of `width` features.
template <class Body>
void each_stripe(i64 width, const Body& body) {
    for (i64 first = 0; first < width; first += kStripe)
        body(first, smaller(kStripe, width - first));
}

// An epilogue of products with gates beside the same ups, in panels of half and half: act(gate) *
// up and what is kept of it.
template <Activation activation, class S, class T>
struct Activate {
    const MlpForward& in;
    i64 start, rows;    // of the chunk
    i64 first, stripe;  // features of the stripe
    T* out;             // [rows][kStripe]

    template <int N>
    G2R_INLINE void expect(i64 row, i64 column) const {
        const i64 kept = in.keep[start + smaller(row, rows - 1)];
        ask_for<N / 2, true>(out + row * kStripe + column / 2);
        if (kept < 0) return;
        const i64 at = kept * in.width + first + column / 2;
        ask_for<N / 2, true>(static_cast<const S*>(in.d_gate) + at);
        ask_for<N / 2, true>(static_cast<const S*>(in.d_up) + at);
    }
    template <int N>
    G2R_INLINE void operator()(i64 row, i64 column, const vf (&values)[N]) const {
        const i64 kept = in.keep[start + row], feature = first + column / 2;
        const i64 left = stripe - column / 2, to = kept * in.width + feature;
        S* const d_gate = static_cast<S*>(in.d_gate) + to;
        S* const d_up = static_cast<S*>(in.d_up) + to;
        S* const shown = static_cast<S*>(in.activation_out);
        T* const activated = out + row * kStripe + column / 2;
        const void *const gate_bias = in.gate.bias, *const up_bias = in.up.bias;
#pragma GCC unroll 8
        for (int n = 0; n < N / 2; n++) {
            const int at = n * kWidth;
            if (at >= left) return;
            const vf gate = values[n] + bias_at<S>(gate_bias, feature + at);
            const vf up = values[N / 2 + n] + bias_at<S>(up_bias, feature + at);
            const Activated act = activate<activation>(gate);
            store(activated + at, act.value * up);
            if (kept < 0) continue;
            store(d_gate + at, act.slope * up);
            store(d_up + at, act.value);
            if (shown != nullptr) store(shown + to + at, act.value * up);
        }
    }
};

// Output features [first, first + count) of a linear layer.
template <class S>
Linear outputs(Linear linear, i64 first, i64 count) {
    linear.weight = static_cast<const S*>(linear.weight) + first * linear.in;
    linear.out = count;
    return linear;
}

template <class S, class T>
void mlp_forward_as(const MlpForward& in) {
    const i64 hidden = in.hidden;
    const S* post_norm = static_cast<const S*>(in.post_norm);
    // Packed one after the other: the output projection, gate and up by stripes, down by stripes.
    const i64 gate_up_at = packed_size(hidden, in.attended_width);
    const i64 down_at = gate_up_at + packed_size(2 * round_up(in.width, kPanel / 2), hidden);
    const PackedAhead<T> ahead(in.rows, down_at + packed_size(hidden, in.width));
    const auto gate_up_of = [&](i64 first, i64 stripe) {
        return Transposed<T, S>{
            stacked<S>(outputs<S>(in.gate, first, stripe), outputs<S>(in.up, first, stripe)),
            post_norm,
            stripe,
            0,
            hidden,
            ahead.from(gate_up_at + packed_size(2 * first, hidden))};
    };
    const auto down_of = [&](i64 first, i64 stripe) {
        return Transposed<T, S>{stacked<S>(in.down),
                                nullptr,
                                0,
                                first,
                                stripe,
                                ahead.from(down_at + packed_size(hidden, first))};
    };
    Transposed<T, S> o{stacked<S>(in.o)};
    o.packed = ahead.from(0);
    pack_ahead(o);
    each_stripe(in.width, [&](i64 first, i64 stripe) {
        pack_ahead(gate_up_of(first, stripe));
        pack_ahead(down_of(first, stripe));
    });
    each_chunk(in.rows, ahead.chunk_rows(), [&](i64 start, i64 rows) {
        const Operands<S, T> attended(rows, in.attended_width);
        const Array<T> normed(rows * hidden), activated(rows * kStripe);
        float* x = in.x + start * hidden;
        const S* mixed = static_cast<const S*>(in.attended) + start * in.attended_width;
        multiply<T>({attended.of(mixed, rows), in.attended_width}, rows, o,
                    add_into<S>(x, hidden, in.o.bias));
        each_row(rows, [&](i64 r) {
            float* at = x + r * hidden;
            norm_forward<S>(at, hidden, in.eps, in.norm, in.keep[start + r], normed + r * hidden);
            if (in.down.bias != nullptr)
                for (i64 h = 0; h < hidden; h += kWidth)
                    store(at + h, load(at + h) + bias_at<S>(in.down.bias, h));
        });
        each_stripe(in.width, [&](i64 first, i64 stripe) {
            by_activation(in.activation, [&](auto activation) {
                using Epilogue = Activate<decltype(activation)::value, S, T>;
                multiply<T>({normed, hidden}, rows, gate_up_of(first, stripe),
                            Epilogue{in, start, rows, first, stripe, activated});
            });
            multiply_into<T>({activated, kStripe}, rows, down_of(first, stripe), x, true);
        });
    });
}

// For a reader of linear layers: products = g * normed, and g *= weight, which the products with
// weights have then left out.
template <class S>
G2R_INLINE void show_norm(float* g, i64 width, const void* normed, i64 at, const S* weight,
                          float* products) {
    const S* kept = static_cast<const S*>(normed) + at * width;
    for (i64 i = 0; i < width; i += kWidth) {
        const vf grad = load(g + i);
        store(products + i, grad * load(kept + i));
        store(g + i, grad * load(weight + i));
    }
}

// An epilogue of products that are gradients of act(gate) * up: those of gate and of up.
template <class S, class T>
struct GateUpGrads {
    const MlpBackward& in;
    i64 start, rows;    // of the chunk
    i64 first, stripe;  // features of the stripe
    T* out;             // [rows][2 * kStripe], the stripe of gate, then of up

    template <int N>
    G2R_INLINE void expect(i64 row, i64 column) const {
        const i64 at = in.saved[start + smaller(row, rows - 1)] * in.width + first + column;
        ask_for<N, false>(static_cast<const S*>(in.d_gate) + at);
        ask_for<N, false>(static_cast<const S*>(in.d_up) + at);
        ask_for<N, true>(out + row * 2 * kStripe + column);
        ask_for<N, true>(out + row * 2 * kStripe + stripe + column);
    }
    template <int N>
    G2R_INLINE void operator()(i64 row, i64 column, const vf (&values)[N]) const {
        const i64 from = in.saved[start + row] * in.width + first + column;
        const S* const d_gate = static_cast<const S*>(in.d_gate) + from;
        const S* const d_up = static_cast<const S*>(in.d_up) + from;
        T* const gate_out = out + row * 2 * kStripe + column;
        T* const up_out = gate_out + stripe;
        S* shown = static_cast<S*>(in.gate_up);
        if (shown != nullptr) shown += (start + row) * 2 * in.width + first + column;
        const i64 width = in.width;
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            const int at = n * kWidth;
            const vf gate = values[n] * load(d_gate + at), up = values[n] * load(d_up + at);
            store(gate_out + at, gate);
            store(up_out + at, up);
            if (shown == nullptr) continue;
            store(shown + at, gate);
            store(shown + width + at, up);
        }
    }
};

template <class S, class T>
void mlp_backward_as(const MlpBackward& in) {
    const i64 hidden = in.hidden;
    const bool shown = in.gate_up != nullptr;
    const S* post_norm = static_cast<const S*>(in.post_norm);
    // Packed one after the other: the output projection, down by stripes, gate and up by stripes.
    const i64 down_at = packed_size(in.attended_width, hidden);
    const i64 gate_up_at = down_at + packed_size(in.width, hidden);
    const PackedAhead<T> ahead(in.rows, gate_up_at + packed_size(hidden, 2 * in.width));
    const auto down_of = [&](i64 first, i64 stripe) {
        return Plain<T, S>{stacked<S>(in.down), nullptr, first, stripe,
                           ahead.from(down_at + packed_size(first, hidden))};
    };
    const auto gate_up_of = [&](i64 first, i64 stripe) {
        return Plain<T, S>{
            stacked<S>(outputs<S>(in.gate, first, stripe), outputs<S>(in.up, first, stripe)),
            shown ? nullptr : post_norm, 0, hidden,
            ahead.from(gate_up_at + packed_size(hidden, 2 * first))};
    };
    Plain<T, S> o{stacked<S>(in.o)};
    o.packed = ahead.from(0);
    pack_ahead(o);
    each_stripe(in.width, [&](i64 first, i64 stripe) {
        pack_ahead(down_of(first, stripe));
        pack_ahead(gate_up_of(first, stripe));
    });
    each_chunk(in.rows, ahead.chunk_rows(), [&](i64 start, i64 rows) {
        const Operands<float, T> grads(rows, hidden);
        const Array<T> back(rows * 2 * kStripe);
        const Array<float> dh(rows * hidden);
        float* dx = in.dx + start * hidden;
        const int32_t* saved = in.saved + start;
        const Rows<T> grad{grads.of(dx, rows), hidden};
        each_stripe(in.width, [&](i64 first, i64 stripe) {
            multiply(grad, rows, down_of(first, stripe),
                     GateUpGrads<S, T>{in, start, rows, first, stripe, back});
            multiply_into<T>({back, 2 * kStripe}, rows, gate_up_of(first, stripe), dh, first > 0);
        });
        each_row(rows, [&](i64 r) {
            float* g = dh + r * hidden;
            if (shown)
                show_norm(g, hidden, in.normed, saved[r], post_norm,
                          in.norm_products + (start + r) * hidden);
            norm_backward<S>(g, hidden, in.normed, in.rstd, saved[r], dx + r * hidden);
        });
        S* out = static_cast<S*>(in.grad_attended) + start * in.attended_width;
        multiply<T>({grads.of(dx, rows), hidden}, rows, o, store_into(out, in.attended_width));
    });
}

struct HeadsBackward {
    i64 heads, head_dim;
    const void* norm;  // or null
    NormRows kept;
    float scale;
    float* products;  // [rows][head_dim], or null
};

// grads: [heads][head_dim] at a row; out: the same, before rotation, norm and scale.
template <class S, class G, class T>
G2R_INLINE void start_heads(const HeadsBackward& in, const G* grads, i64 row, i64 saved,
                            const float* cos, const float* sin, T* out) {
    const i64 dim = in.head_dim;
    float* products = in.products == nullptr ? nullptr : in.products + row * dim;
    if (products != nullptr) std::memset(products, 0, size_t(dim) * sizeof(float));
    for (i64 h = 0; h < in.heads; h++, grads += dim, out += dim) {
        float wide[kMostHeadDim], grad[kMostHeadDim];
        convert_row(grads, dim, wide);
        rotate_back(wide, dim / 2, cos, sin, in.scale, grad);
        if (in.norm != nullptr) {
            const S* weight = static_cast<const S*>(in.norm);
            const i64 at = saved * in.heads + h;
            const S* normed = static_cast<const S*>(in.kept.normed) + at * dim;
            if (products != nullptr)
                for (i64 d = 0; d < dim; d += kWidth)
                    store(products + d, load(products + d) + load(grad + d) * load(normed + d));
            for (i64 d = 0; d < dim; d += kWidth)
                store(grad + d, load(grad + d) * load(weight + d));
            norm_backward_row<false>(grad, dim, normed, in.kept.rstd[at], grad);
        }
        convert_row(grad, dim, out);
    }
}

template <class S, class T>
void qkv_backward_as(const QkvBackward& in) {
    const i64 hidden = in.hidden, dim = in.head_dim, half = dim / 2;
    const i64 q_width = in.heads * dim, kv_width = in.kv_heads * dim;
    const bool shown = in.norm_products != nullptr;
    const S* input_norm = static_cast<const S*>(in.input_norm);
    const Linear none;
    Plain<T, S> weight{stacked<S>(in.dq != nullptr ? in.q : none, in.dk != nullptr ? in.k : none,
                                  in.dv != nullptr ? in.v : none),
                       shown ? nullptr : input_norm};
    const i64 width = weight.depth();
    if (width == 0) {
        if (shown) std::memset(in.norm_products, 0, size_t(in.rows * hidden) * sizeof(float));
        return;
    }
    const PackedAhead<T> ahead(in.rows, packed_size(hidden, width));
    weight.packed = ahead.from(0);
    pack_ahead(weight);
    const HeadsBackward q{in.heads, dim, in.q_norm, in.q_kept, in.scaling, in.q_norm_products};
    const HeadsBackward k{in.kv_heads, dim, in.k_norm, in.k_kept, 1.0f, in.k_norm_products};
    each_chunk(in.rows, ahead.chunk_rows(), [&](i64 start, i64 rows) {
        const Array<T> grads(rows * width);
        const Array<float> dh(rows * hidden);
        each_row(rows, [&](i64 r) {
            const i64 row = start + r, saved = in.saved[row];
            const float *cos = in.cos + saved * half, *sin = in.sin + saved * half;
            T* out = grads + r * width;
            if (in.dq != nullptr) {
                start_heads<S>(q, static_cast<const S*>(in.dq) + row * q_width, row, saved, cos,
                               sin, out);
                out += q_width;
            }
            if (in.dk != nullptr) {
                start_heads<S>(k, in.dk + row * kv_width, row, saved, cos, sin, out);
                out += kv_width;
            }
            if (in.dv != nullptr) convert_row(in.dv + row * kv_width, kv_width, out);
            if (shown)
                convert_row(static_cast<const T*>(grads + r * width), width,
                            static_cast<S*>(in.projected) + row * width);
        });
        multiply_into<T>({grads, width}, rows, weight, dh, false);
        each_row(rows, [&](i64 r) {
            const i64 row = start + r;
            float* g = dh + r * hidden;
            if (shown)
                show_norm(g, hidden, in.normed, in.saved[row], input_norm,
                          in.norm_products + row * hidden);
            norm_backward<S>(g, hidden, in.normed, in.rstd, in.saved[row], in.dx + row * hidden);
        });
    });
}

inline void qkv_forward(const QkvForward& in) { G2R_BY_DTYPE(qkv_forward, in); }
inline void mlp_forward(const MlpForward& in) { G2R_BY_DTYPE(mlp_forward, in); }
inline void mlp_backward(const MlpBackward& in) { G2R_BY_DTYPE(mlp_backward, in); }
inline void qkv_backward(const QkvBackward& in) { G2R_BY_DTYPE(qkv_backward, in); }

}  // namespace g2r::G2R_NS
