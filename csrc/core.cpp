// The Python module g2r_fast._core: checks of what Python hands over, nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "prefixes.h"
#include "trie.h"

namespace py = pybind11;

namespace {

using g2r_fast::Ints;

template <typename Integer>
bool holds(const py::buffer_info& info) {
    return info.item_type_is_equivalent_to<Integer>();
}

// One dimension without gaps, aligned for its type; anything else would be read wrongly.
void check_layout(const py::buffer_info& info, const char* name) {
    if (info.ndim != 1) {
        throw py::value_error(std::string(name) + " must have one dimension, got " +
                              std::to_string(info.ndim));
    }
    if (info.size > 1 && info.strides[0] != info.itemsize) {
        throw py::value_error(std::string(name) + " must be contiguous, got a stride of " +
                              std::to_string(info.strides[0]) + " bytes");
    }
    if (info.size > 0 && reinterpret_cast<std::uintptr_t>(info.ptr) % info.itemsize != 0) {
        throw py::value_error(std::string(name) + " must be aligned to its item size");
    }
}

// A copy: what is checked is what is used, whoever writes to the buffer meanwhile.
Ints int64_copy(const py::buffer& buffer, const char* name) {
    const py::buffer_info info = buffer.request();
    if (!holds<std::int64_t>(info)) {
        throw py::type_error(std::string(name) + " must be int64, got format '" + info.format +
                             "'");
    }
    check_layout(info, name);
    const auto* first = static_cast<const std::int64_t*>(info.ptr);
    return Ints(first, first + info.size);
}

Ints checked_offsets(const py::buffer& buffer, py::ssize_t token_count) {
    Ints offsets = int64_copy(buffer, "offsets");
    if (offsets.empty()) {
        throw py::value_error("offsets must hold at least the leading 0, got none");
    }
    if (offsets.front() != 0) {
        throw py::value_error("offsets must begin with 0, got " + std::to_string(offsets.front()));
    }
    for (std::size_t i = 1; i < offsets.size(); ++i) {
        if (offsets[i] < offsets[i - 1]) {
            throw py::value_error("offsets must not decrease; first at index " + std::to_string(i));
        }
    }
    if (offsets.back() != token_count) {
        throw py::value_error("offsets must end at the number of tokens " +
                              std::to_string(token_count) + ", got " +
                              std::to_string(offsets.back()));
    }
    return offsets;
}

std::pair<Ints, Ints> common_prefix_lengths(const py::buffer& tokens, const py::buffer& offsets) {
    const py::buffer_info info = tokens.request();
    const bool wide = holds<std::int64_t>(info);
    if (!wide && !holds<std::int32_t>(info)) {
        throw py::type_error("tokens must be int64 or int32, got format '" + info.format + "'");
    }
    check_layout(info, "tokens");
    const Ints bounds = checked_offsets(offsets, info.size);
    auto sorted = wide ? g2r_fast::sort_with_common_prefixes(
                             static_cast<const std::int64_t*>(info.ptr), bounds)
                       : g2r_fast::sort_with_common_prefixes(
                             static_cast<const std::int32_t*>(info.ptr), bounds);
    return {std::move(sorted.order), std::move(sorted.common)};
}

// The same from lists or tuples of int as they are. None where there is anything else: then
// g2r_fast.native reads it, or says what is wrong with it. Runs no Python code, so that nothing
// changes meanwhile.
py::object common_prefix_lengths_of_lists(const py::list& sequences) {
    Ints tokens, offsets{0};
    for (const py::handle sequence : sequences) {
        PyObject* const ids = sequence.ptr();
        if (!PyList_CheckExact(ids) && !PyTuple_CheckExact(ids)) return py::none();
        PyObject** const items = PySequence_Fast_ITEMS(ids);
        const Py_ssize_t length = PySequence_Fast_GET_SIZE(ids);
        for (Py_ssize_t i = 0; i < length; ++i) {
            if (!PyLong_CheckExact(items[i])) return py::none();
            int overflow = 0;
            tokens.push_back(PyLong_AsLongLongAndOverflow(items[i], &overflow));
            if (overflow != 0) return py::none();
        }
        offsets.push_back(static_cast<std::int64_t>(tokens.size()));
    }
    auto sorted = g2r_fast::sort_with_common_prefixes(tokens.data(), offsets);
    return py::cast(std::make_pair(std::move(sorted.order), std::move(sorted.common)));
}

void check_count(const char* name, const Ints& values, std::size_t count) {
    if (values.size() != count) {
        throw py::value_error(std::string(name) + " must hold " + std::to_string(count) +
                              " values, got " + std::to_string(values.size()));
    }
}

void check_range(const char* name, std::size_t index, std::int64_t value, std::int64_t first,
                 std::int64_t last) {
    if (value < first || value > last) {
        throw py::value_error(std::string(name) + " must lie in " + std::to_string(first) + " .. " +
                              std::to_string(last) + ", got " + std::to_string(value) +
                              " at index " + std::to_string(index));
    }
}

void check_sequences(const g2r_fast::Sequences& sequences) {
    const std::size_t count = sequences.lengths.size();
    std::int64_t left = std::numeric_limits<std::int64_t>::max();  // rows that can be numbered
    check_count("backward_starts", sequences.backward_starts, count);
    for (std::size_t i = 0; i < count; ++i) {
        const std::int64_t length = sequences.lengths[i];
        check_range("lengths", i, length, 1, left);
        check_range("backward_starts", i, sequences.backward_starts[i], 0, length);
        left -= length;
    }
    check_count("positions", sequences.positions, sequences.owners.size());
    for (std::size_t i = 0; i < sequences.owners.size(); ++i) {
        const std::int64_t owner = sequences.owners[i];
        check_range("owners", i, owner, 0, static_cast<std::int64_t>(count) - 1);
        check_range("positions", i, sequences.positions[i], 0, sequences.lengths[owner] - 1);
    }
}

// Every sequence once, and prefixes that sequences of these lengths can share in sorted order.
void check_sorted(const g2r_fast::SortedPrefixes& sorted, const Ints& lengths) {
    const std::size_t count = lengths.size();
    check_count("order", sorted.order, count);
    check_count("common", sorted.common, count == 0 ? 0 : count - 1);
    std::vector<bool> seen(count);
    for (std::size_t i = 0; i < count; ++i) {
        const std::int64_t sequence = sorted.order[i];
        check_range("order", i, sequence, 0, static_cast<std::int64_t>(count) - 1);
        if (seen[sequence]) {
            throw py::value_error("order must name a sequence once, got " +
                                  std::to_string(sequence) + " again at index " +
                                  std::to_string(i));
        }
        seen[sequence] = true;
        if (i == 0) continue;
        // Only a sequence that is equal to the one before it has nothing of its own.
        const std::int64_t before = lengths[sorted.order[i - 1]], own = lengths[sequence];
        check_range("common", i - 1, sorted.common[i - 1], 0,
                    before == own ? own : std::min(before, own - 1));
    }
}

py::bytes as_bytes(const Ints& column) {
    return {reinterpret_cast<const char*>(column.data()), column.size() * sizeof(std::int64_t)};
}

py::tuple lay_out(const py::buffer& order, const py::buffer& common, const py::buffer& lengths,
                  const py::buffer& backward_starts, const py::buffer& owners,
                  const py::buffer& positions) {
    const g2r_fast::SortedPrefixes sorted{int64_copy(order, "order"), int64_copy(common, "common")};
    const g2r_fast::Sequences sequences{
        int64_copy(lengths, "lengths"), int64_copy(backward_starts, "backward_starts"),
        int64_copy(owners, "owners"), int64_copy(positions, "positions")};
    check_sequences(sequences);
    check_sorted(sorted, sequences.lengths);
    const g2r_fast::Layout layout = g2r_fast::lay_out(sorted, sequences);
    return py::make_tuple(as_bytes(layout.start), as_bytes(layout.stop), as_bytes(layout.row),
                          as_bytes(layout.parent), as_bytes(layout.saved_row),
                          as_bytes(layout.first), as_bytes(layout.last),
                          as_bytes(layout.live_first), as_bytes(layout.live_last),
                          as_bytes(layout.lanes), as_bytes(layout.leaf),
                          as_bytes(layout.read_segment), as_bytes(layout.read_row));
}

}  // namespace

PYBIND11_MODULE(_core, module) {
    module.doc() = "The compiled part of g2r_fast; use it through g2r_fast.native.";
    // g2r_fast.native refuses a module of another number: one left over from an older checkout.
    module.attr("INTERFACE") = 2;
    module.def(
        "common_prefix_lengths", &common_prefix_lengths, py::arg("tokens"), py::arg("offsets"),
        "(tokens int64 or int32 [sum of lengths], offsets int64 [N + 1]) -> (order, common): "
        "the stable lexicographic order of the N sequences and the number of leading tokens "
        "that each has in common with the next.");
    module.def("common_prefix_lengths_of_lists", &common_prefix_lengths_of_lists,
               py::arg("sequences"),
               "(list of N lists or tuples of int) -> (order, common) as above, or None where "
               "something in them is not an int that fits int64.");
    module.def(
        "lay_out", &lay_out, py::arg("order"), py::arg("common"), py::arg("lengths"),
        py::arg("backward_starts"), py::arg("owners"), py::arg("positions"),
        "(order and common as above, lengths and backward_starts [N], owners and positions of "
        "the reads; all int64) -> the columns of g2r_fast.planner.Layout, each as the bytes of "
        "an int64 array.");
}
