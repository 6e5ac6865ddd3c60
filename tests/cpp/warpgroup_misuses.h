// Groups of products and waits for them; descriptors; misuses of wgmma, each of which must be told.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "device_checks.h"

namespace g2r::gpu {

// ------------------------------------------------------------------------------- groups and waits

// Shared memory full of ones, so that a product adds 16 to d. out[lane]: d, or -1 where it is NaN.
enum class Groups {
    one,
    chained,
    afresh,
    still_under_way,
    empty_group,
    of_an_empty_group,
    registers,
    columns,
    count
};

G2R_GLOBAL void count_products(Groups how, float* out) {
    const int thread = thread_index();
    const std::uint32_t ones = pack<bf16>(1.0f, 1.0f);
    for (int i = thread; i < 512; i += 128)
        store_16(shared_memory() + 16 * i, {{ones, ones, ones, ones}});
    fence_async_proxy();
    sync_block();
    const std::uint64_t matrix = matrix_descriptor(shared_memory(), 16, 1024);
    float d[2][4] = {{1, 1, 1, 1}, {1, 1, 1, 1}};
    std::uint32_t a[4] = {ones, ones, ones, ones};
    wgmma_fence();
    wgmma<bf16, false>(d, matrix, matrix, how != Groups::afresh);
    switch (how) {
        case Groups::chained:
            wgmma<bf16, false>(d, matrix, matrix, true);
            wgmma_commit();
            wgmma<bf16, true>(d, matrix, matrix, true);
            wgmma_commit();
            wgmma_wait<1>();  // its last product is still in flight
            if (d[0][0] == d[0][0]) d[0][0] = 1000;
            wgmma<bf16, false>(d, a, matrix, true);
            break;
        case Groups::still_under_way:
            wgmma_commit();
            wgmma_wait<1>();
            out[thread] = d[1][3] == d[1][3] ? d[1][3] : -1;
            wgmma_wait<0>();
            return;
        case Groups::empty_group:
            wgmma_commit();
            wgmma_commit();
            wgmma_wait<1>();
            out[thread] = d[1][3];
            return;
        case Groups::of_an_empty_group:
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_commit();
            wgmma_wait<0>();
            wgmma<bf16, false>(d, matrix, matrix, true);  // no fence: d is as the wait left it
            break;
        case Groups::registers:
            wgmma_commit();
            wgmma_wait<0>();
            a[0] = a[1] = 0;  // half of k
            d[1][3] += 100;
            wgmma_fence();
            wgmma<bf16, true>(d, a, matrix, true);
            break;
        default:
            break;
    }
    wgmma_commit();
    wgmma_wait<0>();
    out[thread] = d[1][3];
}

inline void check_groups() {
    std::vector<float> out(128);
    const float expected[] = {17, 65, 16, -1, 17, 33, 125, 17};
    for (int i = 0; i < static_cast<int>(Groups::count); ++i)
        in_every_order([&] {
            const int error = launch(count_products, Grid{3}, 128, 8192, nullptr,
                                     static_cast<Groups>(i), out.data());
            check(error == 0, "groups " + std::to_string(i) + ": " + error_text(error));
            const bool fine =
                std::all_of(out.begin(), out.end(), [&](float x) { return x == expected[i]; });
            check(fine, "groups " + std::to_string(i) + ": " + std::to_string(out[77]));
        });
}

// ---------------------------------------------------------------------------------- planted errors

enum class Misuse {
    none,
    address_misaligned,
    address_outside,
    stride_not_of_16,
    stride_too_long,
    swizzle_of_64_bytes,
    base_offset,
    field_overflow,
    b_outside,
    no_fence_at_all,
    d_written_since_fence,
    d_written_since_wait,
    d_cleared_since_wait,
    d_written_in_flight,
    d_scaled_in_flight,
    a_written_since_fence,
    a_written_since_wait,
    a_is_d,
    a_is_d_in_flight,
    d_is_a_in_flight,
    other_shape_in_flight,
    other_shape,
    other_accumulate,
    other_type,
    warp_without_commit,
    warp_without_fence,
    thread_without_wait,
    never_committed,
    not_committed_before_wait,
    never_waited_for,
    not_fenced,
    no_barrier,
    last
};

struct Expected {
    Misuse misuse;
    const char* what;
};

G2R_GLOBAL void misuse(Misuse how) {
    const int thread = thread_index(), warp = thread / 32;
    char* const shared = shared_memory();
    const std::uint32_t ones = pack<f16>(1.0f, 1.0f);
    for (int i = thread; i < 512; i += 256) store_16(shared + 16 * i, {{ones, ones, ones, ones}});
    fence_async_proxy();
    sync_block();
    const auto is = [how](Misuse other) { return how == other; };
    const int stride = is(Misuse::stride_not_of_16) ? 1032 : 1024;
    const int leading = is(Misuse::stride_too_long) ? 1 << 18 : 16;
    int from = is(Misuse::address_misaligned) ? 8 : 0;
    if (is(Misuse::address_outside)) from = 8192;
    const std::uint64_t matrix = matrix_descriptor(shared + from, leading, stride);
    std::uint64_t b = matrix;
    if (is(Misuse::swizzle_of_64_bytes))
        b = (b & ~(std::uint64_t{3} << 62)) | std::uint64_t{2} << 62;
    if (is(Misuse::base_offset)) b |= std::uint64_t{1} << 49;
    if (is(Misuse::field_overflow)) b += 1 << 14;
    if (is(Misuse::b_outside)) b += 7168 >> 4;
    union {
        float wide[16][4];
        std::uint32_t words[16][4];
    } registers = {};
    auto& wide = registers.wide;
    auto& as_a = registers.words[5];
    auto& d = *reinterpret_cast<float (*)[2][4]>(&wide[4][0]);
    std::uint32_t a[4] = {ones, ones, ones, ones};
    if (is(Misuse::not_fenced)) {
        if (thread == 9) store_16(shared, {{ones, ones, ones, ones}});
        sync_block();
    }
    if (is(Misuse::no_barrier) && thread == 9) {
        store_16(shared, {{ones, ones, ones, ones}});
        fence_async_proxy();
    }
    if (!is(Misuse::no_fence_at_all) && !(is(Misuse::warp_without_fence) && warp == 6))
        wgmma_fence();
    if (is(Misuse::d_written_since_fence) && thread == 130) d[1][2] = 1;
    if (is(Misuse::a_written_since_fence) && thread == 130) a[3] = 0;
    if (is(Misuse::a_is_d_in_flight)) wgmma<f16, true>(d, matrix, b, false);
    if (is(Misuse::d_is_a_in_flight)) wgmma<f16, true>(wide, as_a, b, false);
    if (is(Misuse::other_type) && warp % 4 == 3) {
        wgmma<bf16, true>(d, a, b, true);
    } else if (is(Misuse::a_is_d_in_flight)) {
        wgmma<f16, true>(*reinterpret_cast<float (*)[2][4]>(&wide[8][0]), as_a, b, true);
    } else {
        wgmma<f16, true>(d, a, b, !is(Misuse::other_accumulate) || thread != 40);
    }
    if (is(Misuse::other_shape_in_flight)) wgmma<f16, true>(wide, a, b, true);
    if (is(Misuse::d_written_in_flight) && thread == 30) d[0][0] = 0;
    if (is(Misuse::d_scaled_in_flight)) d[1][1] *= 0.5f;
    if (is(Misuse::never_committed)) return;
    if (!is(Misuse::not_committed_before_wait) && !(is(Misuse::warp_without_commit) && warp == 2))
        wgmma_commit();
    if (is(Misuse::never_waited_for)) return;
    if (!is(Misuse::thread_without_wait) || thread != 100) wgmma_wait<0>();
    if (is(Misuse::d_written_since_wait)) d[0][0] += 1;
    if (is(Misuse::d_cleared_since_wait)) d[0][0] = 0;
    if (is(Misuse::a_written_since_wait)) a[2] += 1;
    if (is(Misuse::other_shape)) {
        wgmma<f16, true>(wide, a, b, true);
    } else {
        wgmma<f16, true>(d, is(Misuse::a_is_d) ? as_a : a, b, !is(Misuse::d_cleared_since_wait));
    }
    wgmma_commit();
    wgmma_wait<0>();
}

inline void check_misuses() {
    const Expected table[] = {
        {Misuse::address_misaligned, "not aligned to 16 bytes"},
        {Misuse::address_outside, "outside shared memory"},
        {Misuse::stride_not_of_16, "a stride of 1032 bytes"},
        {Misuse::stride_too_long, "a stride of 262144 bytes"},
        {Misuse::swizzle_of_64_bytes, "the descriptor of b has another swizzle"},
        {Misuse::base_offset, "the descriptor of b has a base offset"},
        {Misuse::field_overflow, "the descriptor of b has bits between its fields"},
        {Misuse::b_outside, "wgmma reads b at byte 8192 of 8192"},
        {Misuse::no_fence_at_all, "without any wgmma_fence"},
        {Misuse::d_written_since_fence, "thread 130 has written d since the last wgmma_fence"},
        {Misuse::d_written_since_wait, "has written d since the last wgmma_fence"},
        {Misuse::d_cleared_since_wait, "has written d since the last wgmma_fence"},
        {Misuse::d_written_in_flight, "d of a product in flight was written by thread 30"},
        {Misuse::d_scaled_in_flight, "d of a product in flight was written"},
        {Misuse::a_written_since_fence, "thread 130 has written a since the last wgmma_fence"},
        {Misuse::a_written_since_wait, "has written a since the last wgmma_fence"},
        {Misuse::a_is_d, "a in registers of d of another product"},
        {Misuse::a_is_d_in_flight, "a in registers of d of a"},
        {Misuse::d_is_a_in_flight, "overlap"},
        {Misuse::other_shape_in_flight, "another shape in flight"},
        {Misuse::other_shape, "another shape, without a wgmma_fence"},
        {Misuse::other_accumulate, "other arguments in other lanes"},
        {Misuse::other_type, "other arguments in other warps"},
        {Misuse::warp_without_commit, "while another warp of the warpgroup was at"},
        {Misuse::warp_without_fence, "while another warp of the warpgroup was at"},
        {Misuse::thread_without_wait, "at wgmma"},
        {Misuse::never_committed, "ends with a wgmma that is not committed"},
        {Misuse::not_committed_before_wait, "wgmma_wait behind a wgmma that is not committed"},
        {Misuse::never_waited_for, "ends with a wgmma that no wgmma_wait covers"},
        {Misuse::not_fenced, "written by thread 9 without a fence_async_proxy"},
        {Misuse::no_barrier, "written by thread 9 without a barrier"},
    };
    check(std::size(table) + 1 == static_cast<std::size_t>(Misuse::last), "a line for each misuse");
    for (const auto& [how, what] : table)
        in_every_order([how = how, what = what] {
            const std::string name = "misuse " + std::to_string(static_cast<int>(how));
            const int error = launch(misuse, Grid{2}, 256, 8192, nullptr, how);
            check(error == emulated::kError, name + " goes unseen");
            check(std::string(error_text(error)).find(what) != std::string::npos,
                  name + ": " + error_text(error));
        });
    in_every_order([] {
        const int error = launch(misuse, Grid{2}, 256, 8192, nullptr, Misuse::none);
        check(error == 0, std::string("no misuse: ") + error_text(error));
        const int rest = launch(misuse, Grid{2}, 160, 8192, nullptr, Misuse::none);
        check(rest != 0 &&
                  std::string(error_text(rest)).find("not a whole warpgroup") != std::string::npos,
              std::string("one warp more: ") + error_text(rest));
    });
}

// Bits as the manual counts them.
G2R_GLOBAL void describe(std::uint64_t* out) {
    out[0] = matrix_descriptor(shared_memory() + 2048 + 32, 8192, 1024);
    out[1] = matrix_descriptor(shared_memory(), 0, 16);
}

inline void check_descriptors() {
    std::uint64_t found[2] = {};
    check(launch(describe, Grid{}, 32, 4096, nullptr, found) == 0, "descriptors");
    const std::uint64_t start = found[1] & 0x3fff;
    check(start != 0 && start % 64 == 0, "shared memory starts at a multiple of 1024");
    check(found[0] == (std::uint64_t{1} << 62 | std::uint64_t{64} << 32 | std::uint64_t{512} << 16 |
                       (start + 130)),
          "the fields of a descriptor");
    check(found[1] == (std::uint64_t{1} << 62 | std::uint64_t{1} << 32 | start), "a stride of 16");
}

}  // namespace g2r::gpu
