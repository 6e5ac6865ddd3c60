// The functions that torch_ops.cpp registers: each checks its arguments and calls the table in use.
#pragma once

#include <string>

#include "cpu/kernels.h"
#include "torch_checks.h"

namespace g2r_torch {

// The table that the ops call.
const g2r::Kernels& kernels_in_use();

inline g2r::Dtype dtype_of(ScalarType storage) {
    return storage == ScalarType::Float ? g2r::Dtype::f32 : g2r::Dtype::bf16;
}

void qkv_forward(const Tensor& x, const Tensor& input_norm, const MaybeTensor& wq,
                 const MaybeTensor& bq, const MaybeTensor& wk, const MaybeTensor& bk,
                 const MaybeTensor& wv, const MaybeTensor& bv, const MaybeTensor& q_norm,
                 const MaybeTensor& k_norm, const Tensor& cos, const Tensor& sin,
                 const Tensor& keep, const Tensor& normed, const Tensor& rstd,
                 const MaybeTensor& q_normed, const MaybeTensor& q_rstd,
                 const MaybeTensor& k_normed, const MaybeTensor& k_rstd, const MaybeTensor& q,
                 const MaybeTensor& k, const MaybeTensor& v, int64_t head_dim, double eps,
                 double scaling);

void mlp_forward(const Tensor& x, const Tensor& attended, const Tensor& wo, const MaybeTensor& bo,
                 const Tensor& post_norm, const Tensor& w_gate, const MaybeTensor& b_gate,
                 const Tensor& w_up, const MaybeTensor& b_up, const Tensor& w_down,
                 const MaybeTensor& b_down, const Tensor& keep, const Tensor& normed,
                 const Tensor& rstd, const Tensor& d_gate, const Tensor& d_up,
                 const MaybeTensor& activated, double eps, int64_t activation);

void mlp_backward(const Tensor& dx, const Tensor& saved, const Tensor& wo, const Tensor& post_norm,
                  const Tensor& w_gate, const Tensor& w_up, const Tensor& w_down,
                  const Tensor& normed, const Tensor& rstd, const Tensor& d_gate,
                  const Tensor& d_up, const Tensor& grad_attended, const MaybeTensor& gate_up,
                  const MaybeTensor& norm_products);

void qkv_backward(const Tensor& dx, const Tensor& saved, const MaybeTensor& dq,
                  const MaybeTensor& dk, const MaybeTensor& dv, const Tensor& input_norm,
                  const MaybeTensor& wq, const MaybeTensor& wk, const MaybeTensor& wv,
                  const MaybeTensor& q_norm, const MaybeTensor& k_norm, const Tensor& cos,
                  const Tensor& sin, const Tensor& normed, const Tensor& rstd,
                  const MaybeTensor& q_normed, const MaybeTensor& q_rstd,
                  const MaybeTensor& k_normed, const MaybeTensor& k_rstd,
                  const MaybeTensor& projected, const MaybeTensor& norm_products,
                  const MaybeTensor& q_norm_products, const MaybeTensor& k_norm_products,
                  int64_t head_dim, double scaling);

void attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& segments,
                       const Tensor& blocks, const Tensor& positions, const Tensor& out,
                       const Tensor& lse, int64_t window, double softcap);

void attention_backward(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& out,
                        const Tensor& lse, const Tensor& grad_out, const Tensor& segments,
                        const Tensor& blocks, const Tensor& positions, const Tensor& block_lanes,
                        const Tensor& runs, const Tensor& run_lanes, const Tensor& dq,
                        const Tensor& dk, const Tensor& dv, int64_t window, double softcap);

// Advice for fresh memory that will be written from end to end: in pages of 2 MiB the system hands
// it out in a fraction of the time. Where it is not taken, nothing changes.
void prefer_large_pages(const Tensor& memory);

void linear_backward(const Tensor& grad, const Tensor& weight, const Tensor& out);

void linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& out);

void squared_gradient_norms(const Tensor& inputs, const Tensor& grads, const Tensor& kept,
                            const Tensor& rows, const Tensor& offsets, const Tensor& out);

void squared_row_sums(const Tensor& x, const Tensor& rows, const Tensor& offsets,
                      const Tensor& out);

void embedding_scores(const Tensor& values, const Tensor& grads, int64_t readout,
                      const Tensor& scores);

void attribution_rewards(const Tensor& scores, const Tensor& offsets, double temperature,
                         bool standardise, const Tensor& weights, const Tensor& starts,
                         const Tensor& alpha, const Tensor& rewards);

void residual_sums(const Tensor& logits, const Tensor& targets, const Tensor& weights,
                   const Tensor& owners, double temperature, const Tensor& sums,
                   const Tensor& logps, const Tensor& entropies);

}  // namespace g2r_torch
