// Lexicographic order of token-id sequences and the prefixes that neighbours share: all that a trie
// over a batch needs. Free of Python and of torch, so that it compiles alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace g2r_fast {

struct SortedPrefixes {
    std::vector<std::int64_t> order;   // [N], stable: equal sequences keep their order
    std::vector<std::int64_t> common;  // [N - 1], tokens shared by order[i] and order[i + 1]
};

// Sequence i is tokens[offsets[i] .. offsets[i + 1]). The caller has checked the offsets.
template <typename Token>
SortedPrefixes sort_with_common_prefixes(const Token* tokens,
                                         const std::vector<std::int64_t>& offsets) {
    const auto begin = [&](std::int64_t i) { return tokens + offsets[i]; };
    const auto end = [&](std::int64_t i) { return tokens + offsets[i + 1]; };

    SortedPrefixes result;
    result.order.resize(offsets.size() - 1);
    std::iota(result.order.begin(), result.order.end(), std::int64_t{0});
    std::stable_sort(
        result.order.begin(), result.order.end(), [&](std::int64_t left, std::int64_t right) {
            return std::lexicographical_compare(begin(left), end(left), begin(right), end(right));
        });
    for (std::size_t i = 1; i < result.order.size(); ++i) {
        const std::int64_t left = result.order[i - 1], right = result.order[i];
        const auto differ = std::mismatch(begin(left), end(left), begin(right), end(right));
        result.common.push_back(differ.first - begin(left));
    }
    return result;
}

}  // namespace g2r_fast
