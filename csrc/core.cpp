// The Python module g2r_fast._core: checks of what Python hands over, nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "prefixes.h"

namespace py = pybind11;

namespace {

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

std::vector<std::int64_t> checked_offsets(const py::buffer_info& info, py::ssize_t token_count) {
    if (!holds<std::int64_t>(info)) {
        throw py::type_error("offsets must be int64, got format '" + info.format + "'");
    }
    check_layout(info, "offsets");
    if (info.size < 1) {
        throw py::value_error("offsets must hold at least the leading 0, got none");
    }
    const auto* first = static_cast<const std::int64_t*>(info.ptr);
    // A copy: what was checked is what is used, whoever writes to the buffer meanwhile.
    std::vector<std::int64_t> offsets(first, first + info.size);
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

std::pair<std::vector<std::int64_t>, std::vector<std::int64_t>> common_prefix_lengths(
    const py::buffer& tokens, const py::buffer& offsets) {
    const py::buffer_info token_info = tokens.request();
    const py::buffer_info offset_info = offsets.request();
    const bool wide = holds<std::int64_t>(token_info);
    if (!wide && !holds<std::int32_t>(token_info)) {
        throw py::type_error("tokens must be int64 or int32, got format '" + token_info.format +
                             "'");
    }
    check_layout(token_info, "tokens");
    const std::vector<std::int64_t> bounds = checked_offsets(offset_info, token_info.size);
    auto sorted = wide ? g2r_fast::sort_with_common_prefixes(
                             static_cast<const std::int64_t*>(token_info.ptr), bounds)
                       : g2r_fast::sort_with_common_prefixes(
                             static_cast<const std::int32_t*>(token_info.ptr), bounds);
    return {std::move(sorted.order), std::move(sorted.common)};
}

}  // namespace

PYBIND11_MODULE(_core, module) {
    module.doc() = "The compiled part of g2r_fast; use it through g2r_fast.native.";
    // g2r_fast.native refuses a module of another number: one left over from an older checkout.
    module.attr("INTERFACE") = 1;
    module.def(
        "common_prefix_lengths", &common_prefix_lengths, py::arg("tokens"), py::arg("offsets"),
        "(tokens int64 or int32 [sum of lengths], offsets int64 [N + 1]) -> (order, common): "
        "the stable lexicographic order of the N sequences and the number of leading tokens "
        "that each has in common with the next.");
}
