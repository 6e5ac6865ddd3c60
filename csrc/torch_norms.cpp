// Arguments of the squared norms of weight gradients.
#include "torch_ops.h"

namespace g2r_torch {

namespace {

// Ascending from 0 to `entries`.
const int64_t* offsets_of(const Checks& checks, const Tensor& offsets, int64_t lanes,
                          int64_t entries) {
    const auto* values = checks.in<int64_t>(offsets, "offsets", ScalarType::Long, {lanes + 1});
    if (values[0] != 0) checks.refuse("offsets do not begin at 0", 0, values[0]);
    for (int64_t i = 0; i < lanes; ++i) {
        if (values[i + 1] < values[i] || values[i + 1] > entries) {
            checks.refuse("offsets do not ascend to the number of entries",
                          std::to_string(values[i]) + " to " + std::to_string(entries),
                          values[i + 1], i + 1);
        }
    }
    if (values[lanes] != entries) {
        checks.refuse("offsets do not end at the number of entries", entries, values[lanes], lanes);
    }
    return values;
}

}  // namespace

void squared_gradient_norms(const Tensor& inputs, const Tensor& grads, const Tensor& kept,
                            const Tensor& rows, const Tensor& offsets, const Tensor& out) {
    const Checks checks("squared_gradient_norms");
    const ScalarType storage = checks.storage(inputs, "inputs");
    g2r::SquaredGradientNorms op{};
    op.dtype = dtype_of(storage);
    op.in = checks.size(inputs, "inputs", 2, 1);
    op.out_width = checks.size(grads, "grads", 2, 1);
    op.entries = checks.size(kept, "kept", 1, 0);
    op.lanes = checks.size(out, "out", 1, 0);
    const int64_t input_rows = checks.size(inputs, "inputs", 2, 0);
    const int64_t grad_rows = checks.size(grads, "grads", 2, 0);
    op.inputs = checks.in(inputs, "inputs", storage, {input_rows, op.in});
    op.grads = checks.in(grads, "grads", storage, {grad_rows, op.out_width});
    op.kept = checks.rows_of(kept, "kept", op.entries, 0, input_rows);
    op.rows = checks.rows_of(rows, "rows", op.entries, 0, grad_rows);
    op.offsets = offsets_of(checks, offsets, op.lanes, op.entries);
    op.out = checks.out<double>(out, "out", ScalarType::Double, {op.lanes});
    if (op.lanes > 0) kernels_in_use().squared_gradient_norms(op);
}

void squared_row_sums(const Tensor& x, const Tensor& rows, const Tensor& offsets,
                      const Tensor& out) {
    const Checks checks("squared_row_sums");
    const ScalarType storage = checks.storage(x, "x");
    g2r::SquaredRowSums op{};
    op.dtype = dtype_of(storage);
    op.width = checks.size(x, "x", 2, 1);
    checks.multiple("the width of x", op.width, 16);
    op.entries = checks.size(rows, "rows", 1, 0);
    op.lanes = checks.size(out, "out", 1, 0);
    const int64_t x_rows = checks.size(x, "x", 2, 0);
    op.x = checks.in(x, "x", storage, {x_rows, op.width});
    op.rows = checks.rows_of(rows, "rows", op.entries, 0, x_rows);
    op.offsets = offsets_of(checks, offsets, op.lanes, op.entries);
    op.out = checks.out<double>(out, "out", ScalarType::Double, {op.lanes});
    if (op.lanes > 0) kernels_in_use().squared_row_sums(op);
}

}  // namespace g2r_torch
