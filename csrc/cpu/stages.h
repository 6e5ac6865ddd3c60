// A layer's stages outside attention: row passes between products, a chunk of rows at a time. Here
// is what they share, and the projections to heads; mlp.h has the rest of a layer.
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

// Rows as what products multiply: themselves, or converted.
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
inline void qkv_backward(const QkvBackward& in) { G2R_BY_DTYPE(qkv_backward, in); }

}  // namespace g2r::G2R_NS
