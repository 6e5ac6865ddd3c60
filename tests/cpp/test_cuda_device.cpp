// The emulated device against plain loops, and bugs planted into kernels, which it must find.
//
//   test_cuda_device             everything; prints "passed"
//   test_cuda_device PLANT       one bug that only a sanitizer can find: "shared" or "global"
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "device_checks.h"

namespace g2r::gpu {

std::mt19937 generator(7);
// ---------------------------------------------------------------------------------- conversions

template <typename T>
float value_of(int bits) {
    return to_float(T{static_cast<std::uint16_t>(bits)});
}

// Between any two neighbours: what lies nearer to one becomes that one, the middle the even one.
template <typename T>
void check_rounding(int infinite, const char* name) {
    bool fine = true;
    for (int bits = 0; bits + 1 <= infinite; ++bits) {
        // Beyond the largest number its distance to the one before goes on.
        const float low = value_of<T>(bits);
        const double step = bits + 1 == infinite ? static_cast<double>(low) - value_of<T>(bits - 1)
                                                 : static_cast<double>(value_of<T>(bits + 1)) - low;
        const auto middle = static_cast<float>(low + step / 2);
        if (static_cast<double>(middle) != low + step / 2) continue;  // below float's own steps
        const std::pair<float, int> cases[] = {{low, bits},
                                               {std::nextafter(middle, -1.0f), bits},
                                               {middle, bits + bits % 2},
                                               {std::nextafter(middle, HUGE_VALF), bits + 1}};
        for (const auto& [number, expected] : cases) {
            if (number < 0) continue;
            fine = fine && from_float<T>(number).bits == expected;
            fine = fine && from_float<T>(-number).bits == (expected | 0x8000);
        }
    }
    fine = fine && from_float<T>(HUGE_VALF).bits == infinite;
    fine = fine && std::isnan(to_float(from_float<T>(std::nanf(""))));
    fine = fine && std::isnan(value_of<T>(0xffff));
    check(fine, std::string("rounding to ") + name);
    float low, high;
    unpack<T>(pack<T>(1.5f, -3.0f), low, high);
    check(low == 1.5f && high == -3.0f, std::string("pairs of ") + name);
    check((pack<T>(1.5f, 0.0f) >> 16) == 0, std::string("the low half comes first in ") + name);
}

// --------------------------------------------------------------------------------------- products

// What the kernel below leaves out or does wrong.
enum class Bug {
    none,
    no_wait,
    early_wait,
    no_barrier,
    no_second_barrier,
    wrong_lanes,
    no_transpose,
    swapped
};

constexpr int kSteps = 5, kDepth = 64;

// c = sum over steps of a[step] b[step]: a is 64 x 64, b 64 x 8 per step, by rows of b or, where
// `by_columns`, of its transpose. Four warps, 16 rows each; one buffer, filled again in every step.
template <typename T, bool by_columns>
G2R_GLOBAL void G2R_LAUNCH_BOUNDS(128, 1) multiply(const T* a, const T* b, float* c, Bug bug) {
    constexpr int row = kDepth * 2;  // bytes
    char* const shared_a = shared_memory();
    char* const shared_b = shared_a + 64 * row;  // 64 x 16, the last 8 columns 0; or 16 x 64
    const int lane = lane_index(), warp = warp_index(), thread = thread_index();
    a += static_cast<std::ptrdiff_t>(block_index_x()) * kSteps * 64 * kDepth;
    b += static_cast<std::ptrdiff_t>(block_index_x()) * kSteps * kDepth * 8;
    float d[4] = {};
    for (int step = 0; step < kSteps; ++step) {
        for (int i = thread; i < 64 * 8; i += 128) {  // chunks of 16 bytes
            const int at = i / 8, chunk = i % 8;
            cp_async_16(shared_a + at * row + ((chunk ^ (at & 7)) << 4),
                        a + (step * 64 + at) * kDepth + chunk * 8, true);
        }
        if (bug == Bug::early_wait) cp_async_commit();
        if (by_columns) {
            const int at = thread / 8, chunk = thread % 8;
            cp_async_16(shared_b + at * row + ((chunk ^ (at & 7)) << 4),
                        b + (step * 8 + at % 8) * kDepth + chunk * 8, at < 8);
        } else {
            const int at = thread / 2, chunk = thread % 2;
            cp_async_16(shared_b + at * 32 + chunk * 16, b + (step * kDepth + at) * 8, chunk == 0);
        }
        cp_async_commit();
        if (bug == Bug::early_wait) cp_async_wait<1>();
        if (bug != Bug::no_wait && bug != Bug::early_wait) cp_async_wait<0>();
        if (bug != Bug::no_barrier) sync_block();
        for (int k = 0; k < kDepth / 16; ++k) {
            std::uint32_t left[4], right[4];
            const int from = bug == Bug::wrong_lanes ? (lane % 2) * 8 + lane / 4 : lane % 16;
            const int at = warp * 16 + from, chunk = k * 2 + lane / 16;
            ldmatrix_x4(left, shared_a + at * row + ((chunk ^ (at & 7)) << 4));
            if (bug == Bug::swapped) std::swap(left[1], left[2]);
            if (by_columns) {
                const int column = lane % 8 + lane / 16 * 8, part = k * 2 + lane / 8 % 2;
                ldmatrix_x4(right, shared_b + column * row + ((part ^ (column & 7)) << 4));
            } else {
                const char* const from_b = shared_b + (k * 16 + lane % 16) * 32 + lane / 16 * 16;
                bug == Bug::no_transpose ? ldmatrix_x4(right, from_b)
                                         : ldmatrix_x4_transposed(right, from_b);
            }
            mma_16x8x16<T>(d, left, right[0], right[1]);
            float zero[4] = {};
            mma_16x8x16<T>(zero, left, right[2], right[3]);
            for (const float x : zero) d[0] += x;
        }
        if (bug != Bug::no_second_barrier) sync_block();
    }
    c += (block_index_x() * 64 + warp * 16) * 8;
    for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// Runs it on `blocks` blocks; the largest error in units of the sum of the terms' sizes.
template <typename T, bool by_columns>
double product_error(bool integers, Bug bug, int blocks) {
    std::uniform_int_distribution<int> integer(-3, 3);
    std::normal_distribution<float> normal;
    const auto draw = [&] {
        return from_float<T>(integers ? static_cast<float>(integer(generator)) : normal(generator));
    };
    const auto count = static_cast<std::size_t>(blocks * kSteps);
    // From the heap and to its end: a read beyond is one that a sanitizer sees.
    const auto aligned = [](std::size_t size) {
        return std::unique_ptr<T, decltype(&std::free)>(
            static_cast<T*>(std::aligned_alloc(16, size * sizeof(T))), &std::free);
    };
    const auto a = aligned(count * 64 * kDepth), b = aligned(count * kDepth * 8);
    std::generate_n(a.get(), count * 64 * kDepth, draw);
    std::generate_n(b.get(), count * kDepth * 8, draw);
    std::vector<float> c(static_cast<std::size_t>(blocks) * 64 * 8, std::nanf(""));
    constexpr int shared = 64 * kDepth * 2 + 16 * kDepth * 2;
    const int error = launch(multiply<T, by_columns>, Grid{blocks}, 128, shared, nullptr, a.get(),
                             b.get(), c.data(), bug);
    if (error != 0) {
        check(bug != Bug::none, std::string("a launch: ") + error_text(error));
        return HUGE_VAL;
    }
    double worst = 0;
    for (int block = 0; block < blocks; ++block)
        for (int row = 0; row < 64; ++row)
            for (int column = 0; column < 8; ++column) {
                double sum = 0, sizes = 0;
                for (int step = 0; step < kSteps; ++step)
                    for (int k = 0; k < kDepth; ++k) {
                        const int at = block * kSteps + step;
                        const double left = to_float(a.get()[(at * 64 + row) * kDepth + k]);
                        const int place = by_columns ? column * kDepth + k : k * 8 + column;
                        const double right = to_float(b.get()[at * kDepth * 8 + place]);
                        sum += left * right;
                        sizes += std::abs(left * right);
                    }
                const double got = c[static_cast<std::size_t>((block * 64 + row) * 8 + column)];
                const double off = std::abs(got - sum);
                worst = std::isnan(off) ? HUGE_VAL : std::max(worst, off == 0 ? 0 : off / sizes);
                if (std::isnan(off)) return HUGE_VAL;
            }
    return worst;
}

template <typename T, bool by_columns>
void check_products(const std::string& name) {
    const double bound = kSteps * kDepth * 0x1p-24;  // one rounding for each term
    in_every_order([&] {
        check(product_error<T, by_columns>(true, Bug::none, 3) == 0, name + " of integers");
        check(product_error<T, by_columns>(false, Bug::none, 3) <= bound, name + " within bound");
    });
    for (const Bug bug : {Bug::no_wait, Bug::early_wait, Bug::no_barrier, Bug::no_second_barrier,
                          Bug::wrong_lanes, Bug::no_transpose, Bug::swapped}) {
        if (by_columns && bug == Bug::no_transpose) continue;
        check(product_error<T, by_columns>(true, bug, 3) > 0,
              name + ": bug " + std::to_string(static_cast<int>(bug)) + " goes unseen");
    }
}

void check_bank_conflicts() {
    emulated::counts = {};
    product_error<bf16, true>(true, Bug::none, 1);
    check(emulated::counts.conflicts == 0, "swizzled rows have no bank conflicts");
    check(emulated::counts.products == kSteps * 4 * 4 * 2, "products are counted");
    emulated::counts = {};
    product_error<bf16, false>(true, Bug::none, 1);
    // b has rows of 32 bytes: of the eight rows of a matrix, four share their banks with others.
    check(emulated::counts.conflicts == kSteps * 4 * 4 * 4 * 4, "rows of 32 bytes have conflicts");
}

// -------------------------------------------------------------------------------- copies, groups

// out[4][8]: one chunk per group; what is there after waiting for all but `pending` groups.
template <int pending>
G2R_GLOBAL void copy_groups(const float* from, float* out) {
    auto* shared = reinterpret_cast<float*>(shared_memory());
    float* const mine = shared + thread_index() * 16;
    for (int group = 0; group < 4; ++group) {
        cp_async_16(mine + group * 4, from + group * 4, group != 1);
        cp_async_commit();
    }
    cp_async_wait<pending>();
    for (int i = 0; i < 16; ++i) out[thread_index() * 16 + i] = mine[i];
}

template <int pending>
void check_groups() {
    const std::unique_ptr<float, decltype(&std::free)> from(
        static_cast<float*>(std::aligned_alloc(16, 64)), &std::free);
    for (int i = 0; i < 16; ++i) from.get()[i] = static_cast<float>(i);
    std::vector<float> out(32 * 16);
    check(launch(copy_groups<pending>, Grid{}, 32, 32 * 64, nullptr, from.get(), out.data()) == 0,
          "copies in groups");
    for (std::size_t i = 0; i < out.size(); ++i) {
        const auto at = static_cast<int>(i % 16), group = at / 4;
        const float expected = group == 1 ? 0.0f : static_cast<float>(at);
        check(group < 4 - pending ? out[i] == expected : std::isnan(out[i]),
              "group " + std::to_string(group) + " of 4, " + std::to_string(pending) + " pending");
    }
}

// What is not valid is not read: the source lies far behind its memory.
G2R_GLOBAL void copy_nothing(const char* from, float* out) {
    cp_async_16(shared_memory() + thread_index() * 16, from + 4096 * 16, false);
    cp_async_commit();
    cp_async_wait<0>();
    sync_block();
    out[thread_index()] = reinterpret_cast<float*>(shared_memory())[127 - thread_index()];
}

// --------------------------------------------------------------------------- lanes, blocks, order

G2R_GLOBAL void exchange_lanes(int* wrong) {
    const int lane = lane_index(), first = lane & ~3;
    const auto expect = [&](bool fine) { *wrong += !fine; };
    expect(quad_sum(static_cast<float>(lane)) == static_cast<float>(4 * first + 6));
    expect(quad_max(static_cast<float>(lane % 3)) ==
           static_cast<float>(std::max({first % 3, (first + 1) % 3, (first + 2) % 3})));
    expect(shuffle(lane * 2, 31 - lane) == 2 * (31 - lane));
    expect(shuffle(static_cast<float>(lane), 5) == 5.0f);
    expect(shuffle_xor(static_cast<std::uint32_t>(lane), 8) ==
           static_cast<std::uint32_t>(lane ^ 8));
    expect(warp_index() == thread_index() / 32);
    expect(any_of_warp(thread_index() == 40) == (warp_index() == 1));
    expect(any_of_block(thread_index() == 40));
    expect(!any_of_block(false));
    sync_warp();
}

G2R_GLOBAL void count_blocks(int* visits, Grid grid) {
    if (thread_index() != 0) return;
    ++visits[(block_index_z() * grid.y + block_index_y()) * grid.x + block_index_x()];
}

// ---------------------------------------------------------------------------------- planted bugs

enum class Misuse {
    absent_from_barrier,
    half_a_warp_at_barrier,
    different_collectives,
    different_types,
    lane_ends_early,
    copy_outside,
    matrix_outside,
    copy_misaligned,
    source_misaligned,
    shuffle_outside,
    load_misaligned,
    last
};

G2R_GLOBAL void misuse(Misuse how, const char* global) {
    const int thread = thread_index(), lane = lane_index();
    std::uint32_t r[4] = {};
    float d[4] = {};
    switch (how) {
        case Misuse::absent_from_barrier:
            if (thread >= 32) sync_block();
            break;
        case Misuse::half_a_warp_at_barrier:
            if (lane < 16) sync_block();
            sync_warp();
            break;
        case Misuse::different_collectives:
            lane < 7 ? ldmatrix_x4(r, shared_memory()) : ldmatrix_x4_transposed(r, shared_memory());
            break;
        case Misuse::different_types:
            lane == 3 ? mma_16x8x16<bf16>(d, r, 0, 0) : mma_16x8x16<f16>(d, r, 0, 0);
            break;
        case Misuse::lane_ends_early:
            if (lane == 9) return;
            quad_sum(1.0f);
            break;
        case Misuse::copy_outside:
            cp_async_16(shared_memory() + 16 * thread, global, true);  // 64 chunks of shared memory
            break;
        case Misuse::matrix_outside:
            ldmatrix_x4(r, shared_memory() - 16 + 16 * lane);
            break;
        case Misuse::copy_misaligned:
            cp_async_16(shared_memory() + 8, global, true);
            break;
        case Misuse::source_misaligned:
            cp_async_16(shared_memory(), global + 8, true);
            break;
        case Misuse::shuffle_outside:
            shuffle(1.0f, lane + 1);
            break;
        case Misuse::load_misaligned:
            load_16(global + 4);
            break;
        case Misuse::last:
            break;
    }
    sync_block();
}

void check_misuses() {
    alignas(16) const char global[64] = {};
    for (int i = 0; i < static_cast<int>(Misuse::last); ++i)
        in_every_order([&] {
            const int error = launch(misuse, Grid{2}, 96, 1024, nullptr, static_cast<Misuse>(i),
                                     static_cast<const char*>(global));
            check(error == emulated::kError, "misuse " + std::to_string(i) + " goes unseen");
            check(std::string(error_text(error)).rfind("block (0, 0, 0), ", 0) == 0,
                  std::string("where it is: ") + error_text(error));
        });
    const int fine =
        launch(misuse, Grid{2}, 96, 1024, nullptr, Misuse::last, static_cast<const char*>(global));
    check(fine == 0, "a launch after those that failed");
}

G2R_GLOBAL void overrun(char* global, int shared_at, int global_at) {
    if (thread_index() != 5) return;
    if (shared_at >= 0) shared_memory()[shared_at] = 1;
    if (global_at >= 0) global[global_at] = 1;
}

void check_launches() {
    const Grid grid{3, 4, 5};
    std::vector<int> visits(60);
    check(launch(count_blocks, grid, 64, 0, nullptr, visits.data(), grid) == 0, "a grid");
    check(std::all_of(visits.begin(), visits.end(), [](int n) { return n == 1; }),
          "every block runs once");
    int wrong = 0;
    in_every_order(
        [&] { check(launch(exchange_lanes, Grid{3}, 64, 0, nullptr, &wrong) == 0, "lanes"); });
    check(wrong == 0, "what lanes exchange");
    check(launch(exchange_lanes, Grid{0}, 64, 0, nullptr, &wrong) == 0, "no blocks");
    check(launch(exchange_lanes, Grid{1}, 48, 0, nullptr, &wrong) != 0, "48 threads");
    check(launch(exchange_lanes, Grid{1}, 2048, 0, nullptr, &wrong) != 0, "2048 threads");
    check(launch(exchange_lanes, Grid{1}, 64, 1 << 20, nullptr, &wrong) != 0, "1 MiB shared");
    std::vector<float> out(128, 1.0f);
    const std::unique_ptr<char, decltype(&std::free)> from(
        static_cast<char*>(std::aligned_alloc(16, 16)), &std::free);
    check(launch(copy_nothing, Grid{}, 128, 2048, nullptr, from.get(), out.data()) == 0, "zeros");
    check(std::all_of(out.begin(), out.end(), [](float x) { return x == 0; }), "all zeros");
#ifndef G2R_EMULATED_ASAN
    check(launch(overrun, Grid{}, 32, 100, nullptr, nullptr, 99, -1) == 0, "the last byte");
    check(launch(overrun, Grid{}, 32, 100, nullptr, nullptr, 100, -1) != 0, "one byte beyond");
#endif
    check(exp2(-HUGE_VALF) == 0 && exp2(3.0f) == 8 && exp2(-130.0f) == 0, "exp2");
}

int plant(const std::string& name) {
    const std::unique_ptr<char[]> global(new char[64]);
    const int shared_at = name == "shared" ? 100 : 99, global_at = name == "global" ? 64 : 63;
    return launch(overrun, Grid{}, 32, 100, nullptr, global.get(), shared_at, global_at);
}

int run() {
    check_rounding<bf16>(0x7f80, "bf16");
    check_rounding<f16>(0x7c00, "f16");
    check_products<bf16, false>("bf16 rows");
    check_products<bf16, true>("bf16 columns");
    check_products<f16, false>("f16 rows");
    check_products<f16, true>("f16 columns");
    check_bank_conflicts();
    check_groups<0>();
    check_groups<1>();
    check_groups<3>();
    check_groups<4>();
    check_misuses();
    check_launches();
    if (failures == 0) std::puts("passed");
    return failures == 0 ? 0 : 1;
}

}  // namespace g2r::gpu

int main(int argc, char** argv) { return argc > 1 ? g2r::gpu::plant(argv[1]) : g2r::gpu::run(); }
