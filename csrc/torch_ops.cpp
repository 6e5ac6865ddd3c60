// torch.ops.g2r_fast: schemas, registration, torch's thread pool. Only the stable ABI of libtorch
// (2.10) is used, so that one binary serves every later version, and every Python.
#include "torch_ops.h"

#include <algorithm>
#include <atomic>

#if TORCH_TARGET_VERSION != 0x020a000000000000
#error "compile with -DTORCH_TARGET_VERSION=0x020a000000000000"
#endif

namespace g2r_torch {

namespace {

std::atomic<const g2r::Kernels*> in_use{nullptr};

int threads() { return static_cast<int>(torch::stable::get_num_threads()); }

// One range per thread; whoever has time takes the next task. What a task computes does not depend
// on who takes it, so neither do the results.
void run(int64_t tasks, void (*task)(void* context, int64_t index), void* context) {
    const int64_t workers = std::min<int64_t>(threads(), tasks);
    if (workers <= 1) {
        for (int64_t index = 0; index < tasks; ++index) task(context, index);
        return;
    }
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
        for (;;) {
            const int64_t index = next.fetch_add(1, std::memory_order_relaxed);
            if (index >= tasks) return;
            task(context, index);
        }
    });
}

const bool pool_is_set = (g2r::set_pool({threads, run}), true);

std::string cpu_kernels() { return kernels_in_use().name; }

std::string built_cpu_kernels() {
    std::string names;
    for (const char* const* name = g2r::built_kernels(); *name != nullptr; ++name) {
        if (!names.empty()) names += ",";
        names += *name;
    }
    return names;
}

void use_cpu_kernels(const std::string& name) {
    const g2r::Kernels* kernels =
        name.empty() ? &g2r::best_kernels() : g2r::find_kernels(name.c_str());
    if (kernels == nullptr) {
        Checks("use_cpu_kernels")
            .refuse("these kernels do not run on this processor or were not built",
                    "one of " + built_cpu_kernels() + " that runs here", name);
    }
    in_use.store(kernels, std::memory_order_release);
}

}  // namespace

const g2r::Kernels& kernels_in_use() {
    const g2r::Kernels* kernels = in_use.load(std::memory_order_acquire);
    if (kernels == nullptr) {
        kernels = &g2r::best_kernels();
        in_use.store(kernels, std::memory_order_release);
    }
    return *kernels;
}

}  // namespace g2r_torch

STABLE_TORCH_LIBRARY_FRAGMENT(g2r_fast, library) {
    library.def(
        "qkv_forward(Tensor x, Tensor input_norm, Tensor? wq, Tensor? bq, Tensor? wk, Tensor? bk, "
        "Tensor? wv, Tensor? bv, Tensor? q_norm, Tensor? k_norm, Tensor cos, Tensor sin, "
        "Tensor keep, Tensor(a!) normed, Tensor(b!) rstd, Tensor(c!)? q_normed, "
        "Tensor(d!)? q_rstd, Tensor(e!)? k_normed, Tensor(f!)? k_rstd, Tensor(g!)? q, "
        "Tensor(h!)? k, Tensor(i!)? v, int head_dim, float eps, float scaling) -> ()");
    library.def(
        "mlp_forward(Tensor(a!) x, Tensor attended, Tensor wo, Tensor? bo, Tensor post_norm, "
        "Tensor w_gate, Tensor? b_gate, Tensor w_up, Tensor? b_up, Tensor w_down, "
        "Tensor? b_down, Tensor keep, Tensor(b!) normed, Tensor(c!) rstd, Tensor(d!) d_gate, "
        "Tensor(e!) d_up, Tensor(f!)? activated, float eps, int activation) -> ()");
    library.def(
        "mlp_backward(Tensor(a!) dx, Tensor saved, Tensor wo, Tensor post_norm, Tensor w_gate, "
        "Tensor w_up, Tensor w_down, Tensor normed, Tensor rstd, Tensor d_gate, Tensor d_up, "
        "Tensor(b!) grad_attended, Tensor(c!)? gate_up, Tensor(d!)? norm_products) -> ()");
    library.def(
        "qkv_backward(Tensor(a!) dx, Tensor saved, Tensor? dq, Tensor? dk, Tensor? dv, "
        "Tensor input_norm, Tensor? wq, Tensor? wk, Tensor? wv, Tensor? q_norm, Tensor? k_norm, "
        "Tensor cos, Tensor sin, Tensor normed, Tensor rstd, Tensor? q_normed, Tensor? q_rstd, "
        "Tensor? k_normed, Tensor? k_rstd, Tensor(b!)? projected, Tensor(c!)? norm_products, "
        "Tensor(d!)? q_norm_products, Tensor(e!)? k_norm_products, int head_dim, "
        "float scaling) -> ()");
    library.def(
        "attention_forward(Tensor q, Tensor k, Tensor v, Tensor segments, Tensor blocks, "
        "Tensor positions, Tensor(a!) out, Tensor(b!) lse, int window, float softcap) -> ()");
    library.def(
        "attention_backward(Tensor q, Tensor k, Tensor v, Tensor? out, Tensor lse, "
        "Tensor grad_out, Tensor segments, Tensor blocks, Tensor positions, Tensor block_lanes, "
        "Tensor runs, "
        "Tensor run_lanes, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, int window, "
        "float softcap) -> ()");
    library.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()");
    library.def("linear_backward(Tensor grad, Tensor weight, Tensor(a!) out) -> ()");
    library.def(
        "embedding_scores(Tensor values, Tensor grads, int readout, Tensor(a!) scores) -> ()");
    library.def(
        "attribution_rewards(Tensor scores, Tensor offsets, float temperature, bool standardise, "
        "Tensor weights, Tensor starts, Tensor(a!) alpha, Tensor(b!) rewards) -> ()");
    library.def(
        "squared_gradient_norms(Tensor inputs, Tensor grads, Tensor kept, Tensor rows, "
        "Tensor offsets, Tensor(a!) out) -> ()");
    library.def("squared_row_sums(Tensor x, Tensor rows, Tensor offsets, Tensor(a!) out) -> ()");
    library.def(
        "residual_sums(Tensor logits, Tensor targets, Tensor weights, Tensor owners, "
        "float temperature, Tensor(a!) sums, Tensor(b!) logps, Tensor(c!) entropies) -> ()");
    library.def("prefer_large_pages(Tensor memory) -> ()");
    library.def("cpu_kernels() -> str");
    library.def("built_cpu_kernels() -> str");
    library.def("use_cpu_kernels(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(g2r_fast, CPU, library) {
    library.impl("qkv_forward", TORCH_BOX(&g2r_torch::qkv_forward));
    library.impl("mlp_forward", TORCH_BOX(&g2r_torch::mlp_forward));
    library.impl("mlp_backward", TORCH_BOX(&g2r_torch::mlp_backward));
    library.impl("qkv_backward", TORCH_BOX(&g2r_torch::qkv_backward));
    library.impl("attention_forward", TORCH_BOX(&g2r_torch::attention_forward));
    library.impl("attention_backward", TORCH_BOX(&g2r_torch::attention_backward));
    library.impl("linear", TORCH_BOX(&g2r_torch::linear));
    library.impl("linear_backward", TORCH_BOX(&g2r_torch::linear_backward));
    library.impl("prefer_large_pages", TORCH_BOX(&g2r_torch::prefer_large_pages));
    library.impl("embedding_scores", TORCH_BOX(&g2r_torch::embedding_scores));
    library.impl("attribution_rewards", TORCH_BOX(&g2r_torch::attribution_rewards));
    library.impl("squared_gradient_norms", TORCH_BOX(&g2r_torch::squared_gradient_norms));
    library.impl("squared_row_sums", TORCH_BOX(&g2r_torch::squared_row_sums));
    library.impl("residual_sums", TORCH_BOX(&g2r_torch::residual_sums));
}

STABLE_TORCH_LIBRARY_IMPL(g2r_fast, CompositeExplicitAutograd, library) {
    library.impl("cpu_kernels", TORCH_BOX(&g2r_torch::cpu_kernels));
    library.impl("built_cpu_kernels", TORCH_BOX(&g2r_torch::built_cpu_kernels));
    library.impl("use_cpu_kernels", TORCH_BOX(&g2r_torch::use_cpu_kernels));
}
