// The trie against its definition on random batches, without Python: the exit status tells.
//
//   g++ -std=c++17 -g -fsanitize=address,undefined -Icsrc tests/cpp/trie_test.cpp && ./a.out
#include "trie.h"

#include <cstdio>
#include <map>
#include <random>
#include <string>
#include <utility>

namespace {

using g2r_fast::Ints;

struct Batch {
    std::vector<Ints> ids;
    g2r_fast::Sequences wishes;
};

bool begins_with(const Ints& ids, const Ints& prefix) {
    return ids.size() >= prefix.size() && std::equal(prefix.begin(), prefix.end(), ids.begin());
}

g2r_fast::SortedPrefixes sorted(const std::vector<Ints>& all) {
    Ints tokens, offsets{0};
    for (const Ints& ids : all) {
        tokens.insert(tokens.end(), ids.begin(), ids.end());
        offsets.push_back(static_cast<std::int64_t>(tokens.size()));
    }
    return g2r_fast::sort_with_common_prefixes(tokens.data(), offsets);
}

// Every distinct prefix is a row, and rows lie in lexicographic order. A row begins a segment where
// its prefix is the first, where the one before it branches or ends a sequence, and where a
// sequence through it wants gradients from there on.
g2r_fast::Layout by_definition(const Batch& batch) {
    const auto count = static_cast<std::int64_t>(batch.ids.size());
    g2r_fast::Layout layout;
    std::map<Ints, std::int64_t> rows, children;
    std::vector<std::pair<Ints, std::int64_t>> order;
    for (std::int64_t i = 0; i < count; ++i) {
        order.emplace_back(batch.ids[i], i);
        for (std::size_t n = 1; n <= batch.ids[i].size(); ++n) {
            rows[Ints(batch.ids[i].begin(), batch.ids[i].begin() + n)] = 0;
        }
    }
    std::sort(order.begin(), order.end());
    for (const auto& entry : order) layout.lanes.push_back(entry.second);
    std::int64_t row = 0;
    for (auto& [prefix, number] : rows) {
        number = row++;
        ++children[Ints(prefix.begin(), prefix.end() - 1)];
    }

    std::map<Ints, std::int64_t> segment_of;
    std::int64_t saved_rows = 0;
    for (const auto& [prefix, number] : rows) {
        const Ints before(prefix.begin(), prefix.end() - 1);
        const auto start = static_cast<std::int64_t>(before.size());
        bool begins = before.empty() || children[before] > 1;
        for (std::int64_t i = 0; i < count; ++i) {
            begins |= batch.ids[i] == before;
            begins |= begins_with(batch.ids[i], prefix) && batch.wishes.backward_starts[i] == start;
        }
        if (!begins) {  // one more token of the segment above
            segment_of[prefix] = segment_of[before];
            layout.stop[segment_of[before]] = start + 1;
            if (layout.saved_row[segment_of[before]] >= 0) ++saved_rows;
            continue;
        }
        segment_of[prefix] = static_cast<std::int64_t>(layout.start.size());
        layout.start.push_back(start);
        layout.stop.push_back(start + 1);
        layout.row.push_back(number);
        layout.parent.push_back(before.empty() ? -1 : segment_of[before]);
        Ints live;
        std::int64_t first = count, last = 0;
        for (std::int64_t at = 0; at < count; ++at) {
            const std::int64_t i = order[at].second;
            if (!begins_with(batch.ids[i], prefix)) continue;
            first = std::min(first, at);
            last = at + 1;
            if (batch.wishes.backward_starts[i] <= start) live.push_back(i);
        }
        const auto size = static_cast<std::int64_t>(live.size());
        const bool all = size == last - first;
        layout.first.push_back(first);
        layout.last.push_back(last);
        layout.live_first.push_back(all ? first : static_cast<std::int64_t>(layout.lanes.size()));
        layout.live_last.push_back(layout.live_first.back() + size);
        if (!all) layout.lanes.insert(layout.lanes.end(), live.begin(), live.end());
        layout.saved_row.push_back(live.empty() ? -1 : saved_rows);
        if (!live.empty()) ++saved_rows;
    }
    for (const Ints& ids : batch.ids) layout.leaf.push_back(segment_of[ids]);
    for (std::size_t i = 0; i < batch.wishes.owners.size(); ++i) {
        const Ints& ids = batch.ids[batch.wishes.owners[i]];
        const Ints prefix(ids.begin(), ids.begin() + batch.wishes.positions[i] + 1);
        layout.read_segment.push_back(segment_of[prefix]);
        layout.read_row.push_back(rows[prefix]);
    }
    return layout;
}

class Checks {
 public:
    explicit Checks(std::string where) : where_(std::move(where)) {}

    void expect(bool good, const char* what) {
        if (good) return;
        ++failures;
        std::fprintf(stderr, "%s: %s\n", where_.c_str(), what);
    }

    void equal(const g2r_fast::Layout& found, const g2r_fast::Layout& wanted) {
        expect(found.start == wanted.start, "start");
        expect(found.stop == wanted.stop, "stop");
        expect(found.row == wanted.row, "row");
        expect(found.parent == wanted.parent, "parent");
        expect(found.saved_row == wanted.saved_row, "saved_row");
        expect(found.first == wanted.first, "first");
        expect(found.last == wanted.last, "last");
        expect(found.live_first == wanted.live_first, "live_first");
        expect(found.live_last == wanted.live_last, "live_last");
        expect(found.lanes == wanted.lanes, "lanes");
        expect(found.leaf == wanted.leaf, "leaf");
        expect(found.read_segment == wanted.read_segment, "read_segment");
        expect(found.read_row == wanted.read_row, "read_row");
    }

    int failures = 0;

 private:
    std::string where_;
};

// Few ids and short sequences, so that prefixes of every kind are shared, and duplicates.
Batch random_batch(std::uint32_t seed) {
    std::mt19937 generator(seed);
    const auto below = [&](std::int64_t bound) {
        return static_cast<std::int64_t>(generator() % static_cast<std::uint64_t>(bound));
    };
    Batch batch;
    const std::int64_t count = below(10), kinds = 1 + below(3), longest = 1 + below(10);
    for (std::int64_t i = 0; i < count; ++i) {
        Ints ids(1 + below(longest));
        for (std::int64_t& id : ids) id = below(kinds) - 1;
        batch.wishes.lengths.push_back(static_cast<std::int64_t>(ids.size()));
        batch.wishes.backward_starts.push_back(below(batch.wishes.lengths.back() + 1));
        batch.ids.push_back(std::move(ids));
    }
    for (std::int64_t reads = count == 0 ? 0 : below(20); reads-- > 0;) {  // in any order
        batch.wishes.owners.push_back(below(count));
        batch.wishes.positions.push_back(below(batch.wishes.lengths[batch.wishes.owners.back()]));
    }
    return batch;
}

// Each sequence a prefix of the next: as deep as a trie can be.
int check_chain(std::int64_t depth) {
    Checks checks("chain of " + std::to_string(depth));
    g2r_fast::SortedPrefixes prefixes;
    g2r_fast::Sequences wishes;
    for (std::int64_t i = 0; i < depth; ++i) {
        prefixes.order.push_back(i);
        if (i > 0) prefixes.common.push_back(i);
        wishes.lengths.push_back(i + 1);
        wishes.backward_starts.push_back(i % 2 == 0 ? 0 : i + 1);  // every other comes back
        wishes.owners.push_back(i);
        wishes.positions.push_back(i / 2);
    }
    const g2r_fast::Layout layout = g2r_fast::lay_out(prefixes, wishes);
    checks.expect(static_cast<std::int64_t>(layout.start.size()) == depth, "one segment a token");
    for (std::int64_t i = 0; i < depth; ++i) {
        checks.expect(layout.parent[i] == i - 1 && layout.row[i] == i, "segments in a row");
        checks.expect(layout.first[i] == i && layout.last[i] == depth, "members");
        checks.expect(layout.read_row[i] == i / 2 && layout.read_segment[i] == i / 2, "reads");
        // Of the sequences i .. depth - 1, the even ones.
        checks.expect(layout.live_last[i] - layout.live_first[i] == (depth + 1) / 2 - (i + 1) / 2,
                      "live");
    }
    return checks.failures;
}

}  // namespace

int main() {
    int failures = check_chain(1) + check_chain(2000);
    for (std::uint32_t seed = 0; seed < 3000; ++seed) {
        const Batch batch = random_batch(seed);
        const g2r_fast::SortedPrefixes prefixes = sorted(batch.ids);
        Checks checks("seed " + std::to_string(seed));
        checks.equal(g2r_fast::lay_out(prefixes, batch.wishes), by_definition(batch));
        failures += checks.failures;
    }
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
