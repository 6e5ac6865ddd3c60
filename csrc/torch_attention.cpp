// Arguments of attention: heads, and the tables that say who looks at whom.
#include <vector>

#include "torch_ops.h"

namespace g2r_torch {

namespace {

constexpr auto kFloat = ScalarType::Float;
constexpr auto kLong = ScalarType::Long;
constexpr int64_t kLastLane = (int64_t{1} << 31) - 1;

static_assert(sizeof(g2r::Segment) == 4 * sizeof(int64_t));
static_assert(sizeof(g2r::ForwardBlock) == 3 * sizeof(int64_t));
static_assert(sizeof(g2r::BackwardBlock) == 6 * sizeof(int64_t));
static_assert(sizeof(g2r::Run) == 5 * sizeof(int64_t));

struct Heads {
    int64_t heads, kv_heads, head_dim, rows;
};

Heads heads_of(const Checks& checks, const Tensor& q, const Tensor& k) {
    const Heads found{checks.size(q, "q", 3, 1), checks.size(k, "k", 3, 1),
                      checks.size(q, "q", 3, 2), checks.size(k, "k", 3, 0)};
    checks.head_dim(found.head_dim);
    checks.multiple("the number of kv heads", found.kv_heads, 1);
    checks.multiple("the number of heads", found.heads, found.kv_heads);
    return found;
}

// A table of `columns` int64 columns, read as structs of as many int64 fields.
template <typename Struct>
const Struct* table(const Checks& checks, const Tensor& value, const char* name, int64_t& count) {
    count = checks.size(value, name, 2, 0);
    return checks.in<Struct>(value, name, kLong,
                             {count, static_cast<int64_t>(sizeof(Struct) / sizeof(int64_t))});
}

// Segments lie in depth-first order, and the keys of a path follow each other without a gap.
const g2r::Segment* checked_segments(const Checks& checks, const Tensor& value, int64_t rows,
                                     int64_t& count) {
    const auto* segments = table<g2r::Segment>(checks, value, "segments", count);
    for (int64_t i = 0; i < count; ++i) {
        const g2r::Segment& segment = segments[i];
        if (segment.parent < -1 || segment.parent >= i) {
            checks.refuse("a segment has an impossible parent",
                          "-1, or a segment before it: below " + std::to_string(i), segment.parent,
                          i);
        }
        int64_t open = i - 1;  // what is passed by here is closed, and never met again
        while (open >= 0 && open != segment.parent) open = segments[open].parent;
        if (open != segment.parent) {
            checks.refuse("segments are not in depth-first order",
                          "a parent on the path to the segment before", segment.parent, i);
        }
        const int64_t start = segment.parent < 0 ? 0 : segments[segment.parent].stop;
        if (segment.start != start) {
            checks.refuse("a segment does not begin where its parent stops", start, segment.start,
                          i);
        }
        if (segment.stop < segment.start) {
            checks.refuse("a segment stops before it starts",
                          "at least " + std::to_string(segment.start), segment.stop, i);
        }
        checks.span("rows of a segment", segment.row, segment.stop - segment.start, rows, i);
    }
    return segments;
}

// Queries of one segment: rows of q that exist, and positions inside the segment, in order.
void check_queries(const Checks& checks, int64_t index, int64_t segment, int64_t row, int64_t count,
                   const g2r::Segment* segments, int64_t segment_count, const int64_t* positions,
                   int64_t queries) {
    if (segment < 0 || segment >= segment_count) {
        checks.refuse("a block names a segment that does not exist",
                      "0 <= segment < " + std::to_string(segment_count), segment, index);
    }
    checks.span("queries of a block", row, count, queries, index);
    int64_t lowest = segments[segment].start;
    for (int64_t i = row; i < row + count; ++i) {
        if (positions[i] < lowest || positions[i] >= segments[segment].stop) {
            checks.refuse(
                "a position lies outside its segment, or after the next one",
                std::to_string(lowest) + " <= position < " + std::to_string(segments[segment].stop),
                positions[i], i);
        }
        lowest = positions[i];
    }
}

// `count` tokens of `lanes` lanes each: neither product nor sum may overflow. Names of lanes
// ascend.
void check_lanes(const Checks& checks, const char* what, int64_t index, int64_t first,
                 int64_t count, int64_t lanes, int64_t rows, int64_t lane_at, int64_t lane_count,
                 const int64_t* named) {
    checks.span("lanes of a table entry", lane_at, lanes, lane_count, index);
    if (lanes > 0 && count > rows / lanes) {
        checks.refuse(std::string(what) + " reach outside", "within 0 to " + std::to_string(rows),
                      std::to_string(count) + " times " + std::to_string(lanes), index);
    }
    checks.span(what, first, count * lanes, rows, index);
    int64_t lowest = 0;
    for (int64_t i = lane_at; i < lane_at + lanes; ++i) {
        if (named[i] < lowest || named[i] > kLastLane) {
            checks.refuse("a lane is no number of a sequence, or not after the one before it",
                          std::to_string(lowest) + " to " + std::to_string(kLastLane), named[i], i);
        }
        lowest = named[i] + 1;
    }
}

void check_order(const Checks& checks, int64_t index, int64_t segment, int64_t before) {
    if (segment < before) {
        checks.refuse("blocks are not in the order of their segments",
                      "at least " + std::to_string(before), segment, index);
    }
}

}  // namespace

void attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& segments,
                       const Tensor& blocks, const Tensor& positions, const Tensor& out,
                       const Tensor& lse, int64_t window, double softcap) {
    const Checks checks("attention_forward");
    const ScalarType storage = checks.storage(q, "q");
    const Heads heads = heads_of(checks, q, k);
    checks.between("window", window, 0, INT64_MAX);
    checks.number("softcap", softcap, 0);
    g2r::AttentionForward op{};
    op.dtype = dtype_of(storage);
    op.queries = checks.size(q, "q", 3, 0);
    op.rows = heads.rows;
    op.heads = heads.heads;
    op.kv_heads = heads.kv_heads;
    op.head_dim = heads.head_dim;
    op.q = checks.in(q, "q", storage, {op.queries, op.heads, op.head_dim});
    op.k = checks.in(k, "k", storage, {op.rows, op.kv_heads, op.head_dim});
    op.v = checks.in(v, "v", storage, {op.rows, op.kv_heads, op.head_dim});
    op.segments = checked_segments(checks, segments, op.rows, op.segment_count);
    op.positions = checks.in<int64_t>(positions, "positions", kLong, {op.queries});
    op.blocks = table<g2r::ForwardBlock>(checks, blocks, "blocks", op.block_count);
    for (int64_t i = 0; i < op.block_count; ++i) {
        const g2r::ForwardBlock& block = op.blocks[i];
        check_queries(checks, i, block.segment, block.row, block.count, op.segments,
                      op.segment_count, op.positions, op.queries);
        check_order(checks, i, block.segment, i == 0 ? 0 : op.blocks[i - 1].segment);
    }
    op.out = checks.out<float>(out, "out", kFloat, {op.queries, op.heads, op.head_dim});
    op.lse = checks.out<float>(lse, "lse", kFloat, {op.queries, op.heads});
    op.window = window;
    op.softcap = static_cast<float>(softcap);
    if (op.queries > 0 && op.block_count > 0) kernels_in_use().attention_forward(op);
}

void attention_backward(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& out,
                        const Tensor& lse, const Tensor& grad_out, const Tensor& segments,
                        const Tensor& blocks, const Tensor& positions, const Tensor& block_lanes,
                        const Tensor& runs, const Tensor& run_lanes, const Tensor& dq,
                        const Tensor& dk, const Tensor& dv, int64_t window, double softcap) {
    const Checks checks("attention_backward");
    const ScalarType storage = checks.storage(q, "q");
    const Heads heads = heads_of(checks, q, k);
    checks.between("window", window, 0, INT64_MAX);
    checks.number("softcap", softcap, 0);
    g2r::AttentionBackward op{};
    op.dtype = dtype_of(storage);
    op.queries = checks.size(q, "q", 3, 0);
    op.rows = heads.rows;
    op.heads = heads.heads;
    op.kv_heads = heads.kv_heads;
    op.head_dim = heads.head_dim;
    op.query_rows = checks.size(grad_out, "grad_out", 3, 0);
    op.key_rows = checks.size(dk, "dk", 3, 0);
    op.q = checks.in(q, "q", storage, {op.queries, op.heads, op.head_dim});
    op.k = checks.in(k, "k", storage, {op.rows, op.kv_heads, op.head_dim});
    op.v = checks.in(v, "v", storage, {op.rows, op.kv_heads, op.head_dim});
    if (storage != kFloat) checks.needs(out, "out", "a tensor in a model that is not float32");
    op.out = checks.in<float>(out, "out", kFloat, {op.queries, op.heads, op.head_dim});
    op.lse = checks.in<float>(lse, "lse", kFloat, {op.queries, op.heads});
    op.grad_out = checks.in(grad_out, "grad_out", storage, {op.query_rows, op.heads, op.head_dim});
    op.segments = checked_segments(checks, segments, op.rows, op.segment_count);
    op.positions = checks.in<int64_t>(positions, "positions", kLong, {op.queries});
    const int64_t block_lane_count = checks.size(block_lanes, "block_lanes", 1, 0);
    op.block_lanes = checks.in<int64_t>(block_lanes, "block_lanes", kLong, {block_lane_count});
    op.blocks = table<g2r::BackwardBlock>(checks, blocks, "blocks", op.block_count);
    for (int64_t i = 0; i < op.block_count; ++i) {
        const g2r::BackwardBlock& block = op.blocks[i];
        check_queries(checks, i, block.segment, block.row, block.count, op.segments,
                      op.segment_count, op.positions, op.queries);
        check_lanes(checks, "backward rows of a block", i, block.backward_row, block.count,
                    block.lanes, op.query_rows, block.lane_at, block_lane_count, op.block_lanes);
        check_order(checks, i, block.segment, i == 0 ? 0 : op.blocks[i - 1].segment);
    }
    const int64_t run_lane_count = checks.size(run_lanes, "run_lanes", 1, 0);
    op.run_lanes = checks.in<int64_t>(run_lanes, "run_lanes", kLong, {run_lane_count});
    op.runs = table<g2r::Run>(checks, runs, "runs", op.run_count);
    std::vector<bool> has_run(static_cast<std::size_t>(op.segment_count), false);
    for (int64_t i = 0; i < op.run_count; ++i) {
        const g2r::Run& run = op.runs[i];
        if (run.segment < 0 || run.segment >= op.segment_count) {
            checks.refuse("a run names a segment that does not exist",
                          "0 <= segment < " + std::to_string(op.segment_count), run.segment, i);
        }
        if (has_run[run.segment]) {
            checks.refuse("a segment has two runs", "one", run.segment, i);
        }
        has_run[run.segment] = true;
        const g2r::Segment& segment = op.segments[run.segment];
        if (run.tokens != segment.stop - segment.start) {
            checks.refuse("a run is not as long as its segment", segment.stop - segment.start,
                          run.tokens, i);
        }
        check_lanes(checks, "backward rows of a run", i, run.backward_row, run.tokens, run.lanes,
                    op.key_rows, run.lane_at, run_lane_count, op.run_lanes);
    }
    op.dq = checks.out(dq, "dq", storage, {op.query_rows, op.heads, op.head_dim});
    op.dk = checks.out<float>(dk, "dk", kFloat, {op.key_rows, op.kv_heads, op.head_dim});
    op.dv = checks.out<float>(dv, "dv", kFloat, {op.key_rows, op.kv_heads, op.head_dim});
    op.window = window;
    op.softcap = static_cast<float>(softcap);
    if (op.query_rows > 0 || op.key_rows > 0) kernels_in_use().attention_backward(op);
}

}  // namespace g2r_torch
