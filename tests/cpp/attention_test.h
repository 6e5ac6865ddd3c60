// Attention over random tries.
#pragma once

#include <algorithm>

#include "exact_buffers.h"

namespace kernels_test {

// A random trie with random lanes; with a window of 1 a query sees its own key alone.
inline void test_attention(const g2r::Kernels& kernels, Dtype dtype, const Sizes& s, int64_t window,
                           float softcap, int64_t longest) {
    std::vector<g2r::Segment> segments;
    int64_t rows = 0;
    const int64_t count = draw(1, 6);
    for (int64_t i = 0, last = -1; i < count; ++i) {
        // Depth first: the parent is on the path to the segment before.
        int64_t parent = last;
        while (parent >= 0 && draw(0, 2) == 0)
            parent = segments[static_cast<size_t>(parent)].parent;
        const int64_t start = parent < 0 ? 0 : segments[static_cast<size_t>(parent)].stop;
        const int64_t tokens = draw(1, longest);
        segments.push_back({start, start + tokens, rows, parent});
        rows += tokens;
        last = i;
    }
    std::vector<std::vector<int64_t>> through(segments.size());
    const int64_t lanes = draw(1, 5);
    for (int64_t lane = 0; lane < lanes; ++lane)
        for (int64_t at = draw(0, count - 1); at >= 0;
             at = segments[static_cast<size_t>(at)].parent)
            through[static_cast<size_t>(at)].push_back(lane);
    std::vector<g2r::ForwardBlock> forward;
    std::vector<g2r::BackwardBlock> backward;
    std::vector<g2r::Run> runs;
    std::vector<int64_t> lane_names;
    const Buffer<int64_t> positions(rows);
    int64_t backward_rows = 0;
    for (size_t i = 0; i < segments.size(); ++i) {
        const g2r::Segment& segment = segments[i];
        const int64_t tokens = segment.stop - segment.start, at = static_cast<int64_t>(i);
        for (int64_t t = 0; t < tokens; ++t) positions[segment.row + t] = segment.start + t;
        forward.push_back({at, segment.row, tokens});
        const auto alive = static_cast<int64_t>(through[i].size());
        if (alive == 0) continue;
        const auto lane_at = static_cast<int64_t>(lane_names.size());
        lane_names.insert(lane_names.end(), through[i].begin(), through[i].end());
        backward.push_back({at, segment.row, tokens, backward_rows, lane_at, alive});
        runs.push_back({at, backward_rows, tokens, lane_at, alive});
        backward_rows += tokens * alive;
    }
    const int64_t q_width = s.heads * s.head_dim, kv_width = s.kv_heads * s.head_dim;
    const Stored q(dtype, rows * q_width), k(dtype, rows * kv_width), v(dtype, rows * kv_width),
        grad(dtype, backward_rows * q_width), dq(dtype, backward_rows * q_width);
    const Buffer<float> out(rows * q_width), lse(rows * s.heads), dk(backward_rows * kv_width),
        dv(backward_rows * kv_width);
    integers(q, 1);
    integers(k, 1);
    integers(v, 4);
    integers(grad, 2);
    // Exact-size copies of the tables too.
    const Buffer<g2r::Segment> segment_table(count);
    std::copy(segments.begin(), segments.end(), segment_table.get());
    const Buffer<g2r::ForwardBlock> forward_table(count);
    std::copy(forward.begin(), forward.end(), forward_table.get());
    const auto live = static_cast<int64_t>(runs.size());
    const Buffer<g2r::BackwardBlock> backward_table(live);
    std::copy(backward.begin(), backward.end(), backward_table.get());
    const Buffer<g2r::Run> run_table(live);
    std::copy(runs.begin(), runs.end(), run_table.get());
    const Buffer<int64_t> names(static_cast<int64_t>(lane_names.size()));
    std::copy(lane_names.begin(), lane_names.end(), names.get());

    g2r::AttentionForward op{};
    op.dtype = dtype;
    op.queries = rows, op.rows = rows;
    op.heads = s.heads, op.kv_heads = s.kv_heads, op.head_dim = s.head_dim;
    op.q = q.get(), op.k = k.get(), op.v = v.get();
    op.segments = segment_table.get(), op.segment_count = count;
    op.blocks = forward_table.get(), op.block_count = count;
    op.positions = positions.get(), op.window = window, op.softcap = softcap;
    op.out = out.get(), op.lse = lse.get();
    kernels.attention_forward(op);
    check(finite(out) && finite(lse), "an output", "attention_forward");

    g2r::AttentionBackward back{};
    back.dtype = dtype;
    back.queries = rows, back.rows = rows;
    back.heads = s.heads, back.kv_heads = s.kv_heads, back.head_dim = s.head_dim;
    back.query_rows = backward_rows, back.key_rows = backward_rows;
    back.q = q.get(), back.k = k.get(), back.v = v.get();
    back.out = out.get(), back.lse = lse.get();
    back.grad_out = grad.get();
    back.segments = segment_table.get(), back.segment_count = count;
    back.blocks = backward_table.get(), back.block_count = live;
    back.positions = positions.get(), back.block_lanes = names.get();
    back.runs = run_table.get(), back.run_count = live, back.run_lanes = names.get();
    back.window = window, back.softcap = softcap;
    back.dq = dq.get(), back.dk = dk.get(), back.dv = dv.get();
    if (dtype == Dtype::f32) {  // without what the forward gave: formed again
        back.out = nullptr;
        kernels.attention_backward(back);
        check(finite(dq) && finite(dk) && finite(dv), "a gradient", "attention_backward");
        back.out = out.get();
    }
    kernels.attention_backward(back);
    check(finite(dq) && finite(dk) && finite(dv), "a gradient", "attention_backward");
    if (window != 1 || softcap != 0.0f) return;

    bool same = true, gradients = true;
    const int64_t group = s.heads / s.kv_heads;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t head = 0; head < s.heads; ++head) {
            float score = 0.0f;
            for (int64_t i = 0; i < s.head_dim; ++i) {
                const int64_t key = r * kv_width + head / group * s.head_dim + i;
                same = same && out[r * q_width + head * s.head_dim + i] == v[key];
                score += q[r * q_width + head * s.head_dim + i] * k[key];
            }
            same = same && lse[r * s.heads + head] == score;
        }
    check(same, "attention to one key", "attention_forward");
    for (int64_t r = 0; r < backward_rows; ++r)
        for (int64_t n = 0; n < kv_width; ++n) {
            float sum = 0.0f;
            for (int64_t head = n / s.head_dim * group; head < (n / s.head_dim + 1) * group; ++head)
                sum += grad[r * q_width + head * s.head_dim + n % s.head_dim];
            gradients = gradients && dv[r * kv_width + n] == sum && dk[r * kv_width + n] == 0.0f;
        }
    check(gradients, "the gradient of one key", "attention_backward");
}

}  // namespace kernels_test
