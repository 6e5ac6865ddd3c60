// The table of one instruction set, made of everything above it.
#pragma once

#include "attention_backward.h"
#include "attention_forward.h"
#include "linear.h"
#include "mlp.h"
#include "norms.h"
#include "residuals.h"
#include "scores.h"
#include "stages.h"

namespace g2r::G2R_NS {

inline void attention_forward(const AttentionForward& in) { G2R_BY_DTYPE(attention_forward, in); }

inline void attention_backward(const AttentionBackward& in) {
    G2R_BY_DTYPE(attention_backward, in);
}

inline const Kernels& table(const char* name) {
    static const Kernels kernels = {
        name,
        qkv_forward,
        mlp_forward,
        mlp_backward,
        qkv_backward,
        attention_forward,
        attention_backward,
        linear_forward,
        linear_backward,
        embedding_scores,
        attribution_rewards,
        squared_gradient_norms,
        squared_row_sums,
        residual_sums,
    };
    return kernels;
}

}  // namespace g2r::G2R_NS
