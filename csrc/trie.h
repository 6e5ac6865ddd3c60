// Rows, segments and members of a batch, from its sequences in lexicographic order. What the words
// mean is told in g2r_fast/plan.py. Free of Python and of torch, so that it compiles alone.
//
// Linear in tokens: a walk from a leaf to the root passes at least one token a step, and a segment
// has a token for every sequence through it, so that all lists of members together are no longer
// than all sequences.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "prefixes.h"

namespace g2r_fast {

using Ints = std::vector<std::int64_t>;

// The caller has checked that 1 <= length, 0 <= backward_start <= length, 0 <= owner < N and
// 0 <= position < the owner's length.
struct Sequences {
    Ints lengths;          // [N]
    Ints backward_starts;  // [N], no gradient is wanted before
    Ints owners;           // [reads], the sequence of each
    Ints positions;        // [reads]
};

// Segments by column, in row order, which is depth-first. -1 stands for none.
struct Layout {
    Ints start, stop;             // positions of the segment's tokens
    Ints row;                     // of its first token
    Ints parent;                  // its segment, or -1
    Ints saved_row;               // of its first token, or -1
    Ints first, last;             // lanes[first .. last): the sequences through it
    Ints live_first, live_last;   // lanes[live_first .. live_last): those whose backward reaches it
    Ints lanes;                   // first the N sequences in depth-first order
    Ints leaf;                    // [N], the segment in which a sequence ends
    Ints read_segment, read_row;  // [reads]
};

// Grows by sequences in sorted order, so only the last path can branch.
class Trie {
 public:
    struct Node {
        std::int64_t start, stop, row, parent;
    };

    // Adds a sequence that shares `common` tokens with the one added before; where it ends.
    std::int64_t add(std::int64_t length, std::int64_t common) {
        const std::int64_t parent = cut(last_, common);
        if (common < length) {  // else it is equal to the one before
            last_ = size();
            nodes_.push_back({common, length, rows_, parent});
            rows_ += length - common;
        }
        return last_;
    }

    // Lets no node between `leaf` and the root straddle `position`; the one that ends in front of
    // it, -1 at position 0. The lower part of a node keeps its number, so that leaves stay leaves.
    std::int64_t cut(std::int64_t leaf, std::int64_t position) {
        const std::int64_t node = holder(leaf, position - 1);
        if (node < 0 || nodes_[node].stop <= position) return node;
        const Node whole = nodes_[node];
        const std::int64_t upper = size();
        nodes_.push_back({whole.start, position, whole.row, whole.parent});
        nodes_[node] = {position, whole.stop, whole.row + position - whole.start, upper};
        return upper;
    }

    // The node between `leaf` and the root that holds a position before the leaf's stop; -1 for -1.
    std::int64_t holder(std::int64_t leaf, std::int64_t position) const {
        while (leaf >= 0 && nodes_[leaf].start > position) leaf = nodes_[leaf].parent;
        return leaf;
    }

    const Node& operator[](std::int64_t node) const { return nodes_[node]; }
    std::int64_t size() const { return static_cast<std::int64_t>(nodes_.size()); }

 private:
    std::vector<Node> nodes_;
    std::int64_t last_ = -1;
    std::int64_t rows_ = 0;
};

namespace detail {

// Turns node numbers, as they came, into segment numbers, in row order.
inline void add_segments(Layout& layout, const Trie& trie, Ints& number) {
    Ints by_row(trie.size());
    std::iota(by_row.begin(), by_row.end(), std::int64_t{0});
    std::sort(by_row.begin(), by_row.end(),
              [&](std::int64_t a, std::int64_t b) { return trie[a].row < trie[b].row; });
    number.resize(by_row.size());
    for (std::size_t i = 0; i < by_row.size(); ++i) {
        number[by_row[i]] = static_cast<std::int64_t>(i);
    }
    for (const std::int64_t at : by_row) {
        const Trie::Node& node = trie[at];
        layout.start.push_back(node.start);
        layout.stop.push_back(node.stop);
        layout.row.push_back(node.row);
        layout.parent.push_back(node.parent < 0 ? -1 : number[node.parent]);
    }
}

// The sequences through a segment are neighbours in depth-first order: from the first to the last
// of those that end in it or below it.
inline void add_members(Layout& layout) {
    const std::size_t count = layout.leaf.size();
    layout.first.assign(layout.start.size(), static_cast<std::int64_t>(count));
    layout.last.assign(layout.start.size(), 0);
    for (std::size_t i = 0; i < count; ++i) {
        const std::int64_t leaf = layout.leaf[layout.lanes[i]];
        layout.first[leaf] = std::min(layout.first[leaf], static_cast<std::int64_t>(i));
        layout.last[leaf] = static_cast<std::int64_t>(i) + 1;
    }
    for (std::size_t i = layout.start.size(); i-- > 0;) {  // children lie behind their parents
        const std::int64_t parent = layout.parent[i];
        if (parent < 0) continue;
        layout.first[parent] = std::min(layout.first[parent], layout.first[i]);
        layout.last[parent] = std::max(layout.last[parent], layout.last[i]);
    }
}

// A segment through which some come back and some do not has a list of its own behind the order.
inline void add_live(Layout& layout, const Ints& backward_starts) {
    std::int64_t saved_rows = 0;
    for (std::size_t i = 0; i < layout.start.size(); ++i) {
        const auto own = static_cast<std::int64_t>(layout.lanes.size());
        for (std::int64_t at = layout.first[i]; at < layout.last[i]; ++at) {
            const std::int64_t sequence = layout.lanes[at];
            if (backward_starts[sequence] <= layout.start[i]) layout.lanes.push_back(sequence);
        }
        const std::int64_t live = static_cast<std::int64_t>(layout.lanes.size()) - own;
        const bool all = live == layout.last[i] - layout.first[i];
        if (all) layout.lanes.resize(own);
        layout.live_first.push_back(all ? layout.first[i] : own);
        layout.live_last.push_back(layout.live_first.back() + live);
        layout.saved_row.push_back(live > 0 ? saved_rows : -1);
        if (live > 0) saved_rows += layout.stop[i] - layout.start[i];
    }
}

inline void add_reads(Layout& layout, const Trie& trie, const Ints& number, const Ints& leaves,
                      const Sequences& sequences) {
    layout.read_segment.resize(sequences.owners.size());
    layout.read_row.resize(sequences.owners.size());
    std::int64_t owner = -1, node = -1;
    // Backwards, as positions mostly ascend: one walk from leaf to root serves a whole sequence.
    for (std::size_t i = sequences.owners.size(); i-- > 0;) {
        const std::int64_t position = sequences.positions[i];
        if (sequences.owners[i] != owner || position >= trie[node].stop) {
            owner = sequences.owners[i];
            node = leaves[owner];
        }
        node = trie.holder(node, position);
        layout.read_segment[i] = number[node];
        layout.read_row[i] = trie[node].row + position - trie[node].start;
    }
}

}  // namespace detail

// `sorted` is what sort_with_common_prefixes says of the sequences.
inline Layout lay_out(const SortedPrefixes& sorted, const Sequences& sequences) {
    Trie trie;
    Ints leaves(sorted.order.size());  // nodes
    for (std::size_t i = 0; i < sorted.order.size(); ++i) {
        const std::int64_t sequence = sorted.order[i];
        const std::int64_t common = i == 0 ? 0 : sorted.common[i - 1];
        leaves[sequence] = trie.add(sequences.lengths[sequence], common);
    }
    for (const std::int64_t sequence : sorted.order) {
        trie.cut(leaves[sequence], sequences.backward_starts[sequence]);
    }

    Layout layout;
    Ints number;
    detail::add_segments(layout, trie, number);
    layout.lanes = sorted.order;
    layout.leaf.reserve(leaves.size());
    for (const std::int64_t node : leaves) layout.leaf.push_back(number[node]);
    detail::add_members(layout);
    detail::add_live(layout, sequences.backward_starts);
    detail::add_reads(layout, trie, number, leaves, sequences);
    return layout;
}

}  // namespace g2r_fast
