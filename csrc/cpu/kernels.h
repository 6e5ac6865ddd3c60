// The CPU kernels behind the packed engine's operations: plain pointers, no torch.
//
// One table of functions per instruction set, chosen once at run time. Everything here is
// deterministic: no result depends on the number of threads or on which thread does what.
//
// Words, as in g2r_fast/plan.py: a *row* is a token position computed once; a *segment* is an
// unbranched stretch of the trie of sequences; a *lane* is one sequence on its way back, and the C
// lanes of a token are neighbours (backward row = first + token * C + lane). All tensors are dense
// and row-major. "storage" is the model's dtype, float or bfloat16; everything else is float.
#pragma once

#include <cstdint>

namespace g2r {

enum class Dtype { f32, bf16 };

enum class Activation : int64_t { silu = 0, gelu = 1, gelu_tanh = 2 };

// y = x W^T + b with W [out][in], both in storage; bias may be null.
struct Linear {
    const void* weight = nullptr;
    const void* bias = nullptr;
    int64_t out = 0;
    int64_t in = 0;
};

// What an RMSNorm keeps, [rows][width] storage and [rows] float; pointers may be null.
struct NormRows {
    void* normed = nullptr;
    float* rstd = nullptr;
};

// normed = x rsqrt(mean(x^2) + eps); q, k, v = rotated heads of (normed * input_norm) W^T + b.
// With q_norm or k_norm every head goes through an RMSNorm of its own before the rotation.
// q is multiplied by `scaling`. Any of q, k, v may be absent (weight null).
struct QkvForward {
    Dtype dtype;
    int64_t rows, hidden, heads, kv_heads, head_dim;
    const float* x;          // [rows][hidden]
    const void* input_norm;  // [hidden] storage
    Linear q, k, v;
    const void* q_norm;  // [head_dim] storage, or null
    const void* k_norm;
    const float* cos;  // [rows][head_dim / 2]
    const float* sin;
    const int32_t* keep;  // [rows]: where the row's norms are kept, -1: nowhere
    NormRows norm;        // [kept][hidden]
    NormRows q_kept;      // [kept][heads][head_dim], only with q_norm
    NormRows k_kept;      // [kept][kv_heads][head_dim], only with k_norm
    void* q_out;          // [rows][heads][head_dim] storage
    void* k_out;          // [rows][kv_heads][head_dim]
    void* v_out;
    float eps, scaling;
};

// x += attended W_o^T + b_o; normed = rms(x); gate, up = (normed * post_norm) W^T + b;
// x += (act(gate) * up) W_down^T + b_down. Keeps the derivatives of act(gate) * up.
struct MlpForward {
    Dtype dtype;
    Activation activation;
    int64_t rows, hidden, width, attended_width;  // width: of gate and up
    float* x;                                     // [rows][hidden], in place
    const float* attended;                        // [rows][attended_width]
    Linear o, gate, up, down;
    const void* post_norm;
    const int32_t* keep;
    NormRows norm;         // [kept][hidden]
    void* d_gate;          // [kept][width] storage: act'(gate) * up
    void* d_up;            // [kept][width] storage: act(gate)
    void* activation_out;  // [kept][width] storage: the input of W_down; or null
    float eps;
};

// The input gradients of MlpForward: dx is that of its x, in place; grad_attended that of
// `attended`. `saved[row]` is the row of norm, d_gate and d_up that the forward kept.
struct MlpBackward {
    Dtype dtype;
    int64_t rows, hidden, width, attended_width;
    float* dx;             // [rows][hidden], in place
    const int32_t* saved;  // [rows]
    Linear o, gate, up, down;
    const void* post_norm;
    const void* normed;  // [kept][hidden]
    const float* rstd;
    const void* d_gate;  // [kept][width]
    const void* d_up;
    void* grad_attended;  // [rows][attended_width] storage
    // What a reader of linear layers needs, both or neither null.
    void* gate_up;         // [rows][2 * width] storage: output gradients, gate's first
    float* norm_products;  // [rows][hidden]: gradient of the norm's output * normed
};

// dx += the input gradient of QkvForward; any of dq, dk, dv may be null.
struct QkvBackward {
    Dtype dtype;
    int64_t rows, hidden, heads, kv_heads, head_dim;
    float* dx;             // [rows][hidden], added to
    const int32_t* saved;  // [rows]: row of cos, sin and of everything kept
    const void* dq;        // [rows][heads][head_dim] storage
    const float* dk;       // [rows][kv_heads][head_dim]
    const float* dv;
    const void* input_norm;
    Linear q, k, v;
    const void* q_norm;
    const void* k_norm;
    const float* cos;  // [kept][head_dim / 2]
    const float* sin;
    const void* normed;  // [kept][hidden]
    const float* rstd;
    NormRows q_kept, k_kept;
    float scaling;
    // What a reader of linear layers needs; null: nothing.
    void* projected;         // [rows][widths of what is there] storage: output gradients of q, k, v
    float* norm_products;    // [rows][hidden]: gradient of the norm's output * normed
    float* q_norm_products;  // [rows][head_dim]: the same of q_norm, summed over the heads
    float* k_norm_products;
};

struct Segment {  // tokens [start, stop) of a path; its keys are rows row, row + 1, ...
    int64_t start, stop, row, parent;
};

struct ForwardBlock {  // queries of one segment; blocks come in depth-first order
    int64_t segment, row, count;
};

struct BackwardBlock {  // queries of one segment and their lanes
    int64_t segment, row, count;
    int64_t backward_row;  // of the first query's first lane
    int64_t lane_at;       // of block_lanes: its lanes, ascending
    int64_t lanes;
};

struct Run {  // the backward rows of a segment: tokens * lanes
    int64_t segment, backward_row, tokens, lane_at, lanes;
};

// out = softmax(cap(q k^T) + causal mask) v over each query's own path, lse its log-sum-exp.
// q comes scaled. window 0: none; else a query sees the last `window` keys, its own included.
// softcap 0: none; else cap(s) = softcap * tanh(s / softcap).
struct AttentionForward {
    Dtype dtype;
    int64_t queries, rows, heads, kv_heads, head_dim;
    const void* q;  // [queries][heads][head_dim] storage
    const void* k;  // [rows][kv_heads][head_dim]
    const void* v;
    const Segment* segments;
    int64_t segment_count;
    const ForwardBlock* blocks;
    int64_t block_count;
    const int64_t* positions;  // [queries], ascending within a block
    int64_t window;
    float softcap;
    float* out;  // [queries][heads][head_dim]
    float* lse;  // [queries][heads]
};

// Gradients of AttentionForward for every lane; keys outside every run get none.
struct AttentionBackward {
    Dtype dtype;
    int64_t queries, rows, heads, kv_heads, head_dim, query_rows, key_rows;
    const void* q;
    const void* k;
    const void* v;
    const float* out;  // of the forward, as is lse; null, in float32 only: formed again
    const float* lse;
    const void* grad_out;  // [query_rows][heads][head_dim] storage
    const Segment* segments;
    int64_t segment_count;
    const BackwardBlock* blocks;
    int64_t block_count;
    const int64_t* positions;
    const int64_t* block_lanes;
    const Run* runs;
    int64_t run_count;
    const int64_t* run_lanes;
    int64_t window;
    float softcap;
    void* dq;   // [query_rows][heads][head_dim] storage
    float* dk;  // [key_rows][kv_heads][head_dim]
    float* dv;
};

// out = x W^T + b, [rows][out] float.
struct LinearForward {
    Dtype dtype;
    int64_t rows;
    const void* x;  // [rows][in] storage
    Linear linear;
    float* out;
};

// out = grad W, [rows][in] float: the input gradient of a linear layer, in float products.
struct LinearBackward {
    Dtype dtype;
    int64_t rows;
    const float* grad;  // [rows][out]
    Linear linear;
    float* out;
};

// out[j] = |A^T B|_F^2, entry e of lane j being row kept[e] of `inputs` in A and row rows[e] of
// `grads` in B. No A^T B is formed.
struct SquaredGradientNorms {
    Dtype dtype;
    int64_t in, out_width, entries, lanes;
    const void* inputs;      // [.][in] storage
    const void* grads;       // [.][out_width] storage
    const int32_t* kept;     // [entries]
    const int32_t* rows;     // [entries]
    const int64_t* offsets;  // [lanes + 1], ascending from 0
    double* out;             // [lanes]
};

// out[j] = |sum of the rows of lane j|^2, entry e being row rows[e] of x.
struct SquaredRowSums {
    Dtype dtype;
    int64_t width, entries, lanes;
    const void* x;           // [.][width] storage
    const int32_t* rows;     // [entries]
    const int64_t* offsets;  // [lanes + 1], ascending from 0
    double* out;             // [lanes]
};

enum class Readout : int64_t { dot = 0, l1 = 1, l2 = 2 };

// dot: sum(values * grads); l1: sum(|grads|); l2: sqrt(sum(grads^2)); per lane.
struct EmbeddingScores {
    Readout readout;
    int64_t rows, lanes, width;
    const float* values;  // [rows][width]
    const float* grads;   // [rows][lanes][width]
    float* scores;        // [rows][lanes]
};

// alpha_j = softmax(scores_j / temperature) for every segment j of scores; `standardise`: of
// scores_j / std(scores_j), the population's, or of zeros where that is at most 1e-6 of the largest
// |score|. rewards = 0, then += weights[j] * alpha_j from starts[j] on, j ascending. All float64.
struct AttributionRewards {
    int64_t segments, rewarded;
    const double* scores;    // [offsets[segments]]
    const int64_t* offsets;  // [segments + 1], ascending from 0
    double temperature;
    bool standardise;
    const double* weights;  // [segments]
    const int64_t* starts;  // [segments]
    double* alpha;          // [offsets[segments]]
    double* rewards;        // [rewarded]
};

// sums[owners[t]] += weights[t] * (onehot(targets[t]) - p_t), p_t = softmax(logits[t] /
// temperature); logps = log p_t(targets[t]); entropies = that of p_t. A row with NaN or infinity:
// NaN everywhere.
struct ResidualSums {
    int64_t rows, columns;
    const float* logits;     // [rows][columns]
    const int64_t* targets;  // [rows]: columns
    const float* weights;    // [rows]
    const int64_t* owners;   // [rows]: rows of sums
    double inverse_temperature;
    float* sums;       // [...][columns], added to
    float* logps;      // [rows]
    float* entropies;  // [rows]
};

struct Kernels {
    const char* name;  // "avx512bf16", "avx512", "avx2", "plain"
    void (*qkv_forward)(const QkvForward&);
    void (*mlp_forward)(const MlpForward&);
    void (*mlp_backward)(const MlpBackward&);
    void (*qkv_backward)(const QkvBackward&);
    void (*attention_forward)(const AttentionForward&);
    void (*attention_backward)(const AttentionBackward&);
    void (*linear_forward)(const LinearForward&);
    void (*linear_backward)(const LinearBackward&);
    void (*embedding_scores)(const EmbeddingScores&);
    void (*attribution_rewards)(const AttributionRewards&);
    void (*squared_gradient_norms)(const SquaredGradientNorms&);
    void (*squared_row_sums)(const SquaredRowSums&);
    void (*residual_sums)(const ResidualSums&);
};

// The fastest table this processor can run.
const Kernels& best_kernels();
// The table called `name`, or null where this processor cannot run it or it was not built.
const Kernels* find_kernels(const char* name);
// Names of all tables that were built, null-terminated; best first.
const char* const* built_kernels();

// Throws std::runtime_error; nothing that was held is lost.
[[noreturn]] void out_of_memory(int64_t bytes);

// How tasks get onto threads; the binding sets it to torch's pool, the default runs them in turn.
struct Pool {
    int (*threads)();
    void (*run)(int64_t tasks, void (*task)(void* context, int64_t index), void* context);
};
void set_pool(Pool pool);
const Pool& pool();

}  // namespace g2r
