// Arguments of the row operations: norms, projections, feed-forward.
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "torch_ops.h"

namespace g2r_torch {

namespace {

constexpr auto kFloat = ScalarType::Float;

g2r::Linear linear_of(const Checks& checks, const MaybeTensor& weight, const char* weight_name,
                      const MaybeTensor& bias, const char* bias_name, ScalarType storage,
                      int64_t out, int64_t in) {
    g2r::Linear linear;
    linear.weight = checks.in(weight, weight_name, storage, {out, in});
    linear.bias = weight ? checks.in(bias, bias_name, storage, {out}) : nullptr;
    linear.out = out;
    linear.in = in;
    return linear;
}

// Heads of a projection, from the rows of its weight; 0 where there is none.
int64_t heads_of(const Checks& checks, const MaybeTensor& weight, const char* name,
                 int64_t head_dim) {
    if (!weight) return 0;
    const int64_t width = checks.size(*weight, name, 2, 0);
    checks.multiple(name, width, head_dim);
    return width / head_dim;
}

int64_t kv_heads_of(const Checks& checks, const MaybeTensor& wk, const MaybeTensor& wv,
                    int64_t head_dim) {
    const int64_t from_k = heads_of(checks, wk, "the number of rows of wk", head_dim);
    const int64_t from_v = heads_of(checks, wv, "the number of rows of wv", head_dim);
    if (wk && wv && from_k != from_v) {
        checks.refuse("wk and wv have different numbers of heads", from_k, from_v);
    }
    return wk ? from_k : from_v;
}

// What a norm over heads keeps. Null is fine where nothing is kept.
g2r::NormRows kept_heads(const Checks& checks, const MaybeTensor& normed, const char* normed_name,
                         const MaybeTensor& rstd, const char* rstd_name, ScalarType storage,
                         int64_t kept, int64_t heads, int64_t head_dim) {
    if (kept > 0) {
        checks.needs(normed, normed_name, "a tensor, as heads are normalised");
        checks.needs(rstd, rstd_name, "a tensor, as heads are normalised");
    }
    return {const_cast<void*>(checks.in(normed, normed_name, storage, {kept, heads, head_dim})),
            const_cast<float*>(checks.in<float>(rstd, rstd_name, kFloat, {kept, heads}))};
}

}  // namespace

void qkv_forward(const Tensor& x, const Tensor& input_norm, const MaybeTensor& wq,
                 const MaybeTensor& bq, const MaybeTensor& wk, const MaybeTensor& bk,
                 const MaybeTensor& wv, const MaybeTensor& bv, const MaybeTensor& q_norm,
                 const MaybeTensor& k_norm, const Tensor& cos, const Tensor& sin,
                 const Tensor& keep, const Tensor& normed, const Tensor& rstd,
                 const MaybeTensor& q_normed, const MaybeTensor& q_rstd,
                 const MaybeTensor& k_normed, const MaybeTensor& k_rstd, const MaybeTensor& q,
                 const MaybeTensor& k, const MaybeTensor& v, int64_t head_dim, double eps,
                 double scaling) {
    const Checks checks("qkv_forward");
    checks.head_dim(head_dim);
    checks.number("eps", eps, 0);
    checks.number("scaling", scaling, -1e30);
    const ScalarType storage = checks.storage(input_norm, "input_norm");
    g2r::QkvForward op{};
    op.dtype = dtype_of(storage);
    op.rows = checks.size(x, "x", 2, 0);
    op.hidden = checks.size(x, "x", 2, 1);
    checks.multiple("the width of x", op.hidden, 16);
    op.heads = heads_of(checks, wq, "the number of rows of wq", head_dim);
    op.kv_heads = kv_heads_of(checks, wk, wv, head_dim);
    op.head_dim = head_dim;
    op.x = checks.in<float>(x, "x", kFloat, {op.rows, op.hidden});
    op.input_norm = checks.in(input_norm, "input_norm", storage, {op.hidden});
    const int64_t q_width = op.heads * head_dim, kv_width = op.kv_heads * head_dim;
    op.q = linear_of(checks, wq, "wq", bq, "bq", storage, q_width, op.hidden);
    op.k = linear_of(checks, wk, "wk", bk, "bk", storage, kv_width, op.hidden);
    op.v = linear_of(checks, wv, "wv", bv, "bv", storage, kv_width, op.hidden);
    op.cos = checks.in<float>(cos, "cos", kFloat, {op.rows, head_dim / 2});
    op.sin = checks.in<float>(sin, "sin", kFloat, {op.rows, head_dim / 2});
    const int64_t kept = checks.size(normed, "normed", 2, 0);
    op.keep = checks.rows_of(keep, "keep", op.rows, -1, kept);
    op.norm = {checks.out(normed, "normed", storage, {kept, op.hidden}),
               checks.out<float>(rstd, "rstd", kFloat, {kept})};
    if (wq) {
        checks.needs(q, "q", "a tensor, as wq is there");
        op.q_out = checks.out(q, "q", storage, {op.rows, op.heads, head_dim});
        op.q_norm = checks.in(q_norm, "q_norm", storage, {head_dim});
        if (q_norm) {
            op.q_kept = kept_heads(checks, q_normed, "q_normed", q_rstd, "q_rstd", storage, kept,
                                   op.heads, head_dim);
        }
    }
    if (wk) {
        checks.needs(k, "k", "a tensor, as wk is there");
        op.k_out = checks.out(k, "k", storage, {op.rows, op.kv_heads, head_dim});
        op.k_norm = checks.in(k_norm, "k_norm", storage, {head_dim});
        if (k_norm) {
            op.k_kept = kept_heads(checks, k_normed, "k_normed", k_rstd, "k_rstd", storage, kept,
                                   op.kv_heads, head_dim);
        }
    }
    if (wv) {
        checks.needs(v, "v", "a tensor, as wv is there");
        op.v_out = checks.out(v, "v", storage, {op.rows, op.kv_heads, head_dim});
    }
    op.eps = static_cast<float>(eps);
    op.scaling = static_cast<float>(scaling);
    if (op.rows > 0) kernels_in_use().qkv_forward(op);
}

void mlp_forward(const Tensor& x, const Tensor& attended, const Tensor& wo, const MaybeTensor& bo,
                 const Tensor& post_norm, const Tensor& w_gate, const MaybeTensor& b_gate,
                 const Tensor& w_up, const MaybeTensor& b_up, const Tensor& w_down,
                 const MaybeTensor& b_down, const Tensor& keep, const Tensor& normed,
                 const Tensor& rstd, const Tensor& d_gate, const Tensor& d_up,
                 const MaybeTensor& activated, double eps, int64_t activation) {
    const Checks checks("mlp_forward");
    checks.between("activation", activation, 0, 2);
    checks.number("eps", eps, 0);
    const ScalarType storage = checks.storage(post_norm, "post_norm");
    g2r::MlpForward op{};
    op.dtype = dtype_of(storage);
    op.activation = static_cast<g2r::Activation>(activation);
    op.rows = checks.size(x, "x", 2, 0);
    op.hidden = checks.size(x, "x", 2, 1);
    op.width = checks.size(w_gate, "w_gate", 2, 0);
    const int64_t heads = checks.size(attended, "attended", 3, 1);
    const int64_t head_dim = checks.size(attended, "attended", 3, 2);
    checks.head_dim(head_dim);
    op.attended_width = heads * head_dim;
    checks.multiple("the width of x", op.hidden, 16);
    checks.multiple("the number of rows of w_gate", op.width, 16);
    checks.multiple("the width of attended", op.attended_width, 16);
    op.x = checks.out<float>(x, "x", kFloat, {op.rows, op.hidden});
    op.attended = checks.in<float>(attended, "attended", kFloat, {op.rows, heads, head_dim});
    op.o = linear_of(checks, wo, "wo", bo, "bo", storage, op.hidden, op.attended_width);
    op.post_norm = checks.in(post_norm, "post_norm", storage, {op.hidden});
    op.gate = linear_of(checks, w_gate, "w_gate", b_gate, "b_gate", storage, op.width, op.hidden);
    op.up = linear_of(checks, w_up, "w_up", b_up, "b_up", storage, op.width, op.hidden);
    op.down = linear_of(checks, w_down, "w_down", b_down, "b_down", storage, op.hidden, op.width);
    const int64_t kept = checks.size(normed, "normed", 2, 0);
    op.keep = checks.rows_of(keep, "keep", op.rows, -1, kept);
    op.norm = {checks.out(normed, "normed", storage, {kept, op.hidden}),
               checks.out<float>(rstd, "rstd", kFloat, {kept})};
    op.d_gate = checks.out(d_gate, "d_gate", storage, {kept, op.width});
    op.d_up = checks.out(d_up, "d_up", storage, {kept, op.width});
    op.activation_out = checks.out(activated, "activated", storage, {kept, op.width});
    op.eps = static_cast<float>(eps);
    if (op.rows > 0) kernels_in_use().mlp_forward(op);
}

void mlp_backward(const Tensor& dx, const Tensor& saved, const Tensor& wo, const Tensor& post_norm,
                  const Tensor& w_gate, const Tensor& w_up, const Tensor& w_down,
                  const Tensor& normed, const Tensor& rstd, const Tensor& d_gate,
                  const Tensor& d_up, const Tensor& grad_attended, const MaybeTensor& gate_up,
                  const MaybeTensor& norm_products) {
    const Checks checks("mlp_backward");
    const ScalarType storage = checks.storage(post_norm, "post_norm");
    g2r::MlpBackward op{};
    op.dtype = dtype_of(storage);
    op.rows = checks.size(dx, "dx", 2, 0);
    op.hidden = checks.size(dx, "dx", 2, 1);
    op.width = checks.size(w_gate, "w_gate", 2, 0);
    const int64_t heads = checks.size(grad_attended, "grad_attended", 3, 1);
    const int64_t head_dim = checks.size(grad_attended, "grad_attended", 3, 2);
    checks.head_dim(head_dim);
    op.attended_width = heads * head_dim;
    checks.multiple("the width of dx", op.hidden, 16);
    checks.multiple("the number of rows of w_gate", op.width, 16);
    checks.multiple("the width of grad_attended", op.attended_width, 16);
    op.dx = checks.out<float>(dx, "dx", kFloat, {op.rows, op.hidden});
    const MaybeTensor none;
    op.o = linear_of(checks, wo, "wo", none, "", storage, op.hidden, op.attended_width);
    op.gate = linear_of(checks, w_gate, "w_gate", none, "", storage, op.width, op.hidden);
    op.up = linear_of(checks, w_up, "w_up", none, "", storage, op.width, op.hidden);
    op.down = linear_of(checks, w_down, "w_down", none, "", storage, op.hidden, op.width);
    op.post_norm = checks.in(post_norm, "post_norm", storage, {op.hidden});
    const int64_t kept = checks.size(normed, "normed", 2, 0);
    op.saved = checks.rows_of(saved, "saved", op.rows, 0, kept);
    op.normed = checks.in(normed, "normed", storage, {kept, op.hidden});
    op.rstd = checks.in<float>(rstd, "rstd", kFloat, {kept});
    op.d_gate = checks.in(d_gate, "d_gate", storage, {kept, op.width});
    op.d_up = checks.in(d_up, "d_up", storage, {kept, op.width});
    op.grad_attended =
        checks.out(grad_attended, "grad_attended", storage, {op.rows, heads, head_dim});
    op.gate_up = checks.out(gate_up, "gate_up", storage, {op.rows, 2 * op.width});
    op.norm_products =
        checks.out<float>(norm_products, "norm_products", kFloat, {op.rows, op.hidden});
    if (gate_up) checks.needs(norm_products, "norm_products", "a tensor, as gate_up is there");
    if (norm_products) checks.needs(gate_up, "gate_up", "a tensor, as norm_products is there");
    if (op.rows > 0) kernels_in_use().mlp_backward(op);
}

void qkv_backward(const Tensor& dx, const Tensor& saved, const MaybeTensor& dq,
                  const MaybeTensor& dk, const MaybeTensor& dv, const Tensor& input_norm,
                  const MaybeTensor& wq, const MaybeTensor& wk, const MaybeTensor& wv,
                  const MaybeTensor& q_norm, const MaybeTensor& k_norm, const Tensor& cos,
                  const Tensor& sin, const Tensor& normed, const Tensor& rstd,
                  const MaybeTensor& q_normed, const MaybeTensor& q_rstd,
                  const MaybeTensor& k_normed, const MaybeTensor& k_rstd,
                  const MaybeTensor& projected, const MaybeTensor& norm_products,
                  const MaybeTensor& q_norm_products, const MaybeTensor& k_norm_products,
                  int64_t head_dim, double scaling) {
    const Checks checks("qkv_backward");
    checks.head_dim(head_dim);
    checks.number("scaling", scaling, -1e30);
    const ScalarType storage = checks.storage(input_norm, "input_norm");
    g2r::QkvBackward op{};
    op.dtype = dtype_of(storage);
    op.rows = checks.size(dx, "dx", 2, 0);
    op.hidden = checks.size(dx, "dx", 2, 1);
    checks.multiple("the width of dx", op.hidden, 16);
    if (dq) checks.needs(wq, "wq", "a tensor, as dq is there");
    if (dk) checks.needs(wk, "wk", "a tensor, as dk is there");
    if (dv) checks.needs(wv, "wv", "a tensor, as dv is there");
    op.heads = heads_of(checks, wq, "the number of rows of wq", head_dim);
    op.kv_heads = kv_heads_of(checks, wk, wv, head_dim);
    op.head_dim = head_dim;
    op.dx = checks.out<float>(dx, "dx", kFloat, {op.rows, op.hidden});
    op.input_norm = checks.in(input_norm, "input_norm", storage, {op.hidden});
    const MaybeTensor none;
    const int64_t q_width = op.heads * head_dim, kv_width = op.kv_heads * head_dim;
    op.q = linear_of(checks, wq, "wq", none, "", storage, q_width, op.hidden);
    op.k = linear_of(checks, wk, "wk", none, "", storage, kv_width, op.hidden);
    op.v = linear_of(checks, wv, "wv", none, "", storage, kv_width, op.hidden);
    op.dq = checks.in(dq, "dq", storage, {op.rows, op.heads, head_dim});
    op.dk = checks.in<float>(dk, "dk", kFloat, {op.rows, op.kv_heads, head_dim});
    op.dv = checks.in<float>(dv, "dv", kFloat, {op.rows, op.kv_heads, head_dim});
    const int64_t kept = checks.size(normed, "normed", 2, 0);
    op.saved = checks.rows_of(saved, "saved", op.rows, 0, kept);
    op.cos = checks.in<float>(cos, "cos", kFloat, {kept, head_dim / 2});
    op.sin = checks.in<float>(sin, "sin", kFloat, {kept, head_dim / 2});
    op.normed = checks.in(normed, "normed", storage, {kept, op.hidden});
    op.rstd = checks.in<float>(rstd, "rstd", kFloat, {kept});
    if (wq && q_norm) {
        op.q_norm = checks.in(q_norm, "q_norm", storage, {head_dim});
        op.q_kept = kept_heads(checks, q_normed, "q_normed", q_rstd, "q_rstd", storage, kept,
                               op.heads, head_dim);
    }
    if (wk && k_norm) {
        op.k_norm = checks.in(k_norm, "k_norm", storage, {head_dim});
        op.k_kept = kept_heads(checks, k_normed, "k_normed", k_rstd, "k_rstd", storage, kept,
                               op.kv_heads, head_dim);
    }
    op.scaling = static_cast<float>(scaling);
    if (projected || norm_products || q_norm_products || k_norm_products) {
        const char* together = "a tensor, as linear layers are read";
        checks.needs(projected, "projected", together);
        checks.needs(norm_products, "norm_products", together);
        if (dq && op.q_norm != nullptr) checks.needs(q_norm_products, "q_norm_products", together);
        if (dk && op.k_norm != nullptr) checks.needs(k_norm_products, "k_norm_products", together);
        // Nothing would be written there.
        if (!dq && q_norm_products)
            checks.refuse("q_norm_products is there", "None, as dq is", "a tensor");
        if (!dk && k_norm_products)
            checks.refuse("k_norm_products is there", "None, as dk is", "a tensor");
        const int64_t width = (dq ? q_width : 0) + (dk ? kv_width : 0) + (dv ? kv_width : 0);
        op.projected = checks.out(projected, "projected", storage, {op.rows, width});
        op.norm_products =
            checks.out<float>(norm_products, "norm_products", kFloat, {op.rows, op.hidden});
        op.q_norm_products =
            checks.out<float>(q_norm_products, "q_norm_products", kFloat, {op.rows, head_dim});
        op.k_norm_products =
            checks.out<float>(k_norm_products, "k_norm_products", kFloat, {op.rows, head_dim});
    }
    if (op.rows > 0) kernels_in_use().qkv_backward(op);
}

void linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& out) {
    const Checks checks("linear");
    const ScalarType storage = checks.storage(weight, "weight");
    g2r::LinearForward op{};
    op.dtype = dtype_of(storage);
    op.rows = checks.size(x, "x", 2, 0);
    const int64_t width = checks.size(x, "x", 2, 1);
    checks.multiple("the width of x", width, 16);
    const int64_t outputs = checks.size(weight, "weight", 2, 0);
    op.x = checks.in(x, "x", storage, {op.rows, width});
    op.linear = linear_of(checks, weight, "weight", bias, "bias", storage, outputs, width);
    op.out = checks.out<float>(out, "out", kFloat, {op.rows, outputs});
    if (op.rows > 0 && outputs > 0) kernels_in_use().linear_forward(op);
}

void linear_backward(const Tensor& grad, const Tensor& weight, const Tensor& out) {
    const Checks checks("linear_backward");
    const ScalarType storage = checks.storage(weight, "weight");
    g2r::LinearBackward op{};
    op.dtype = dtype_of(storage);
    op.rows = checks.size(grad, "grad", 2, 0);
    const int64_t outputs = checks.size(weight, "weight", 2, 0);
    const int64_t width = checks.size(weight, "weight", 2, 1);
    checks.multiple("the width of out", width, 16);
    op.grad = checks.in<float>(grad, "grad", kFloat, {op.rows, outputs});
    op.linear = linear_of(checks, weight, "weight", {}, "", storage, outputs, width);
    op.out = checks.out<float>(out, "out", kFloat, {op.rows, width});
    if (op.rows > 0) kernels_in_use().linear_backward(op);
}

void prefer_large_pages(const Tensor& memory) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    // From the page of the first byte on: an allocation's own header may lie in front of it, and
    // the large page that holds both is wanted too.
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t start = reinterpret_cast<uintptr_t>(memory.data_ptr());
    const auto bytes = static_cast<uintptr_t>(memory.numel()) * memory.element_size();
    const uintptr_t first = start / page * page, stop = (start + bytes) / page * page;
    if (first < stop) madvise(reinterpret_cast<void*>(first), stop - first, MADV_HUGEPAGE);
#else
    (void)memory;
#endif
}

}  // namespace g2r_torch
