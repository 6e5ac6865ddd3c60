// The emulated products of a warpgroup against plain loops, and bugs planted into kernels, which
// the emulation must find.
//
//   test_cuda_warpgroup          everything; prints "passed"
//   test_cuda_warpgroup time     microseconds for a product of 64 x 16 and 16 x 128
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "warpgroup_misuses.h"

namespace g2r::gpu {

std::mt19937 generator(11);

// --------------------------------------------------------------------------------------- products

// What the kernel below leaves out or does wrong.
enum class Bug {
    none,
    no_proxy_fence,
    early_proxy_fence,
    no_barrier,
    no_second_barrier,
    no_fence,
    fence_only_first,
    fence_too_early,
    no_commit,
    no_wait,
    no_last_wait,
    wait_for_fewer,
    wait_for_none,
    registers_too_early,
    shared_too_early,
    wrong_stride,
    swapped_strides,
    wrong_swizzle,
    no_swizzle,
    wrong_start,
    wrong_step,
    wrong_layout,
    other_lane,
    other_warp,
    count
};

constexpr int kSteps = 3, kDepth = 64, kRow = 128, kPanel = 64 * kRow;

constexpr int bytes_of_b(bool b_by_rows, int n_tiles) {
    return b_by_rows ? (n_tiles + 7) / 8 * kPanel : n_tiles * 8 * kRow;
}

G2R_DEVICE char* swizzled(char* base, int row, int chunk, Bug bug) {
    if (bug == Bug::no_swizzle) return base + row * kRow + chunk * 16;
    const int by = bug == Bug::wrong_swizzle ? row >> 1 & 7 : row & 7;
    return base + row * kRow + ((chunk ^ by) << 4);
}

// c = sum over steps of a[step] b[step]: a is 128 x 64, b 64 x 8 n_tiles by rows of b or of its
// transpose. Two warpgroups, 64 rows each. The first half of k goes through `s`, the other to `d`.
template <typename T, bool b_by_rows, int n_tiles, bool from_registers>
G2R_GLOBAL void G2R_LAUNCH_BOUNDS(256, 1) multiply(const T* a, const T* b, float* c, Bug bug) {
    constexpr int columns = 8 * n_tiles;
    const int thread = thread_index(), group = thread / warpgroup_threads;
    const int lane = lane_index(), warp = warp_index(), in_group = thread % warpgroup_threads;
    char* const shared_b = shared_memory();
    char* const shared_a = shared_b + bytes_of_b(b_by_rows, n_tiles) + group * kPanel;
    a += (static_cast<std::ptrdiff_t>(block_index_x()) * kSteps * 2 + group) * 64 * kDepth;
    b += static_cast<std::ptrdiff_t>(block_index_x()) * kSteps * kDepth * columns;
    float d[n_tiles][4], s[n_tiles][4], total[n_tiles][4] = {};
    std::uint32_t left[4][4];
    if (bug == Bug::fence_too_early || bug == Bug::fence_only_first) wgmma_fence();
    for (int step = 0; step < kSteps; ++step, a += 2 * 64 * kDepth, b += kDepth * columns) {
        if (b_by_rows) {
            for (int i = thread; i < kDepth * n_tiles; i += 256) {
                const int row = i / n_tiles, chunk = i % n_tiles;
                cp_async_16(swizzled(shared_b + chunk / 8 * kPanel, row, chunk % 8, bug),
                            b + row * columns + chunk * 8, true);
            }
        } else {
            for (int i = thread; i < columns * 8; i += 256)
                cp_async_16(swizzled(shared_b, i / 8, i % 8, bug), b + i * 8, true);
        }
        cp_async_commit();
        for (int i = in_group; i < 64 * 8; i += warpgroup_threads)
            store_16(swizzled(shared_a, i / 8, i % 8, bug), load_16(a + i * 8));
        if (bug == Bug::early_proxy_fence) fence_async_proxy();
        cp_async_wait<0>();
        if (bug != Bug::no_proxy_fence && bug != Bug::early_proxy_fence) fence_async_proxy();
        if (bug != Bug::no_barrier) sync_block();
        if (from_registers)
            for (int k = 0; k < 4; ++k)
                ldmatrix_x4(left[k], swizzled(shared_a, warp % 4 * 16 + lane % 16,
                                              k * 2 + lane / 16, Bug::none));
        int leading = b_by_rows && n_tiles > 8 ? kPanel : 16;
        int stride = bug == Bug::wrong_stride ? 512 : 1024;
        if (bug == Bug::swapped_strides) std::swap(leading, stride);
        const std::uint64_t to_a = matrix_descriptor(shared_a, 16, 1024);
        std::uint64_t to_b =
            matrix_descriptor(shared_b + (bug == Bug::wrong_start ? 32 : 0), leading, stride);
        if (bug == Bug::other_lane && thread == 77) to_b += 2;
        if (bug == Bug::other_warp && warp == 6) to_b += 2;
        int k_step = b_by_rows ? 16 * kRow >> 4 : 32 >> 4;
        if (bug == Bug::wrong_step) k_step = b_by_rows ? 32 >> 4 : 16 * kRow >> 4;
        const auto product = [&](float (&to)[n_tiles][4], int k, bool accumulate) {
            constexpr bool other = b_by_rows == false;
            const std::uint64_t right = to_b + static_cast<std::uint64_t>(k * k_step);
            if (bug == Bug::wrong_layout) {
                wgmma<T, other>(to, to_a + static_cast<std::uint64_t>(2 * k), right, accumulate);
            } else if (from_registers) {
                wgmma<T, b_by_rows>(to, left[k], right, accumulate);
            } else {
                wgmma<T, b_by_rows>(to, to_a + static_cast<std::uint64_t>(2 * k), right,
                                    accumulate);
            }
        };
        if (bug != Bug::no_fence && bug != Bug::fence_only_first && bug != Bug::fence_too_early)
            wgmma_fence();
        product(s, 0, false);
        product(s, 1, true);
        if (bug != Bug::no_commit) wgmma_commit();
        product(d, 2, step > 0);
        product(d, 3, true);
        wgmma_commit();
        if (bug == Bug::registers_too_early) left[1][2] = 0;
        if (bug == Bug::shared_too_early && in_group == 0)
            store_16(shared_a, {{0x40404040u, 0x40404040u, 0x40404040u, 0x40404040u}});
        if (bug == Bug::wait_for_none) {
            wgmma_wait<2>();
        } else if (bug != Bug::no_wait) {
            wgmma_wait<1>();
        }
        for (int j = 0; j < n_tiles; ++j)
            for (int i = 0; i < 4; ++i) {
                total[j][i] += s[j][i];
                s[j][i] = 0.0f;
            }
        if (bug == Bug::wait_for_fewer) {
            wgmma_wait<1>();
        } else if (bug != Bug::no_last_wait) {
            wgmma_wait<0>();
        }
        if (bug != Bug::no_second_barrier) sync_block();
    }
    c += (block_index_x() * 2 + group) * 64 * columns;
    for (int j = 0; j < n_tiles; ++j)
        for (int i = 0; i < 4; ++i)
            c[(warp % 4 * 16 + lane / 4 + i / 2 * 8) * columns + j * 8 + lane % 4 * 2 + i % 2] =
                total[j][i] + d[j][i];
}

// From the heap and to its end: a read beyond is one that a sanitizer sees.
template <typename T>
std::unique_ptr<T, decltype(&std::free)> aligned(std::size_t size) {
    return {static_cast<T*>(std::aligned_alloc(16, size * sizeof(T))), &std::free};
}

// Runs it on `blocks` blocks; the largest error in units of the sum of the terms' sizes.
template <typename T, bool b_by_rows, int n_tiles, bool from_registers>
double product_error(bool integers, Bug bug, int blocks) {
    constexpr int columns = 8 * n_tiles;
    std::uniform_int_distribution<int> integer(-3, 3);
    std::normal_distribution<float> normal;
    const auto draw = [&] {
        return from_float<T>(integers ? static_cast<float>(integer(generator)) : normal(generator));
    };
    const auto count = static_cast<std::size_t>(blocks * kSteps);
    const auto a = aligned<T>(count * 128 * kDepth), b = aligned<T>(count * kDepth * columns);
    std::generate_n(a.get(), count * 128 * kDepth, draw);
    std::generate_n(b.get(), count * kDepth * columns, draw);
    std::vector<float> c(static_cast<std::size_t>(blocks) * 128 * columns, std::nanf(""));
    constexpr int shared = bytes_of_b(b_by_rows, n_tiles) + 2 * kPanel;
    const int error = launch(multiply<T, b_by_rows, n_tiles, from_registers>, Grid{blocks}, 256,
                             shared, nullptr, a.get(), b.get(), c.data(), bug);
    if (error != 0) {
        check(bug != Bug::none || emulated::passed_over >= 0,
              std::string("a launch: ") + error_text(error));
        return HUGE_VAL;
    }
    double worst = 0;
    for (int block = 0; block < blocks; ++block)
        for (int row = 0; row < 128; ++row)
            for (int column = 0; column < columns; ++column) {
                double sum = 0, sizes = 0;
                for (int step = block * kSteps; step < (block + 1) * kSteps; ++step)
                    for (int k = 0; k < kDepth; ++k) {
                        const double left = to_float(a.get()[(step * 128 + row) * kDepth + k]);
                        const int place = b_by_rows ? k * columns + column : column * kDepth + k;
                        const double right = to_float(b.get()[step * kDepth * columns + place]);
                        sum += left * right;
                        sizes += std::abs(left * right);
                    }
                const auto at = static_cast<std::size_t>((block * 128 + row) * columns + column);
                const double off = std::abs(static_cast<double>(c[at]) - sum);
                if (std::isnan(off)) return HUGE_VAL;
                worst = std::max(worst, off == 0 ? 0 : off / sizes);
            }
    return worst;
}

template <typename T, bool b_by_rows, int n_tiles, bool from_registers>
void check_products() {
    const std::string name = std::string(std::is_same_v<T, f16> ? "f16" : "bf16") +
                             (b_by_rows ? ", b by rows, " : ", b by columns, ") +
                             std::to_string(n_tiles) + (from_registers ? ", registers" : "");
    const double bound = kSteps * kDepth * 0x1p-24;  // one rounding for each term
    const auto error = [](bool integers, Bug bug) {
        return product_error<T, b_by_rows, n_tiles, from_registers>(integers, bug, 3);
    };
    in_every_order([&] {
        check(error(true, Bug::none) == 0, name + ": integers");
        check(error(false, Bug::none) <= bound, name + ": within bound");
    });
}

template <typename T, bool b_by_rows, int n_tiles, bool from_registers>
void check_planted_bugs() {
    const std::string name = (b_by_rows ? "b by rows, " : "b by columns, ") +
                             std::to_string(n_tiles) + (from_registers ? ", registers" : "");
    for (int i = 1; i < static_cast<int>(Bug::count); ++i) {
        const auto bug = static_cast<Bug>(i);
        // A copy that nobody reads as a matrix; registers that nobody reads.
        if (bug == (from_registers ? Bug::shared_too_early : Bug::registers_too_early)) continue;
        // Three blocks: in ascending, descending and random order.
        check(product_error<T, b_by_rows, n_tiles, from_registers>(true, bug, 3) > 0,
              name + ": bug " + std::to_string(i) + " goes unseen");
    }
}

void check_that_all_waits_are_needed() {
    emulated::sites.clear();
    const auto error = [] { return product_error<bf16, true, 16, false>(true, Bug::none, 3); };
    check(error() == 0, "without passing over anything");
    std::vector<std::string> passed;
    for (int i = 0; i < static_cast<int>(emulated::sites.size()); ++i) {
        const std::string what = emulated::sites[static_cast<std::size_t>(i)].what;
        passed.push_back(what);
        emulated::passed_over = i;
        check(error() > 0, "passing over " + what + ", site " + std::to_string(i));
    }
    emulated::passed_over = -1;
    std::sort(passed.begin(), passed.end());
    const std::vector<std::string> expected = {
        "cp_async_commit", "cp_async_wait", "fence_async_proxy", "sync_block", "sync_block",
        "wgmma_commit",    "wgmma_commit",  "wgmma_fence",       "wgmma_wait", "wgmma_wait"};
    check(passed == expected, "what a test may pass over");
}

void check_counts() {
    emulated::warpgroup_counts = {};
    product_error<bf16, true, 16, false>(true, Bug::none, 2);
    product_error<bf16, false, 8, true>(true, Bug::none, 2);
    long long two[2];
    g2r_emulated_warpgroup_counts(two);
    check(two[0] == 2 * 2 * kSteps * 2 * 4, "products are counted");
    check(two[1] == 0, "a swizzled matrix has no bank conflicts");
    g2r_emulated_warpgroup_counts(two);
    check(two[0] == 0, "counts start anew");
}

// ------------------------------------------------------------------------------------------- time

template <bool b_by_rows>
G2R_GLOBAL void multiply_often(int count) {
    for (int i = thread_index(); i < 2048; i += 128) store_16(shared_memory() + 16 * i, {});
    fence_async_proxy();
    sync_block();
    const std::uint64_t a = matrix_descriptor(shared_memory(), 8192, 1024);
    float d[16][4] = {};
    wgmma_fence();
    for (int i = 0; i < count; i += 4) {
        for (int k = 0; k < 4; ++k) wgmma<bf16, b_by_rows>(d, a, a, true);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_fence();
    }
}

int tell_time() {
    const auto measure = [](void (*kernel)(int)) {
        const std::clock_t start = std::clock();
        check(launch(kernel, Grid{}, 128, 32768, nullptr, 4000) == 0, "many products");
        return static_cast<double>(std::clock() - start) * 1e6 / CLOCKS_PER_SEC / 4000;
    };
    const double columns = measure(multiply_often<false>), rows = measure(multiply_often<true>);
    std::printf("%.1f by columns, %.1f by rows\n", columns, rows);
    return 0;
}

template <typename T>
void check_products_of() {
    check_products<T, false, 4, false>();
    check_products<T, true, 4, false>();
    check_products<T, false, 8, true>();
    check_products<T, true, 8, false>();
    check_products<T, false, 16, false>();
    check_products<T, false, 16, true>();
    check_products<T, true, 16, false>();
    check_products<T, true, 16, true>();
}

int run() {
    check_descriptors();
    check_groups();
    check_products_of<bf16>();
    check_products_of<f16>();
    check_products<bf16, true, 32, false>();
    check_planted_bugs<bf16, true, 16, false>();
    check_planted_bugs<bf16, true, 16, true>();
#ifndef G2R_EMULATED_ASAN  // for which two of them are enough
    check_planted_bugs<bf16, false, 8, true>();
    check_planted_bugs<f16, false, 16, false>();
    check_planted_bugs<f16, true, 8, false>();
#endif
    check_that_all_waits_are_needed();
    check_counts();
    check_misuses();
    if (failures == 0) std::puts("passed");
    return failures == 0 ? 0 : 1;
}

}  // namespace g2r::gpu

int main(int argc, char**) { return argc > 1 ? g2r::gpu::tell_time() : g2r::gpu::run(); }
