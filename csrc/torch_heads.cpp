// Arguments of what is read at the LM head, beside its products.
#include "torch_ops.h"

namespace g2r_torch {

void residual_sums(const Tensor& logits, const Tensor& targets, const Tensor& weights,
                   const Tensor& owners, double temperature, const Tensor& sums,
                   const Tensor& logps, const Tensor& entropies) {
    constexpr auto kFloat = ScalarType::Float;
    constexpr auto kLong = ScalarType::Long;
    const Checks checks("residual_sums");
    if (!(temperature >= 1e-30 && temperature <= 1e30)) {
        checks.refuse("temperature is out of range", "1e-30 to 1e30", temperature);
    }
    g2r::ResidualSums op{};
    op.inverse_temperature = 1.0 / temperature;
    op.rows = checks.size(logits, "logits", 2, 0);
    op.columns = checks.size(logits, "logits", 2, 1);
    const int64_t count = checks.size(sums, "sums", 2, 0);
    op.logits = checks.in<float>(logits, "logits", kFloat, {op.rows, op.columns});
    op.targets = checks.in<int64_t>(targets, "targets", kLong, {op.rows});
    op.weights = checks.in<float>(weights, "weights", kFloat, {op.rows});
    op.owners = checks.in<int64_t>(owners, "owners", kLong, {op.rows});
    op.sums = checks.out<float>(sums, "sums", kFloat, {count, op.columns});
    op.logps = checks.out<float>(logps, "logps", kFloat, {op.rows});
    op.entropies = checks.out<float>(entropies, "entropies", kFloat, {op.rows});
    for (int64_t row = 0; row < op.rows; ++row) {
        checks.span("targets", op.targets[row], 1, op.columns, row);
        checks.span("owners", op.owners[row], 1, count, row);
    }
    if (op.rows > 0) kernels_in_use().residual_sums(op);
}

}  // namespace g2r_torch
