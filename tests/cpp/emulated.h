// The functions of csrc/cuda/device.cuh on a CPU: the kernels of a grid run block by block, the
// threads of a block as fibers, each up to its next collective. What goes wrong on a GPU by chance
// goes wrong here for sure:
//
//   - shared memory starts as NaN, with guards at both ends;
//   - the bytes a cp_async_16 will write are NaN from its call until the cp_async_wait of its
//     thread that covers it;
//   - threads run in ascending, descending or random order (by warps, each as far as it gets), so
//     that a missing barrier lets some of them read what is not there yet or no longer;
//   - what wgmma reads and writes is in flight until the wgmma_wait that covers it, and needs
//     fences (emulated_warpgroup.h);
//   - a collective that not all threads reach, or not the same one, ends the launch with an error;
//   - so do addresses outside shared memory or not aligned, where they pass through a function
//   here.
//
// One launch at a time.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "emulated_block.h"
#include "emulated_numbers.h"
#include "emulated_warpgroup.h"

#define G2R_GLOBAL
#define G2R_DEVICE inline
#define G2R_HOST_DEVICE inline
#define G2R_LAUNCH_BOUNDS(threads, blocks)
#define G2R_UNROLL
#define G2R_NO_UNROLL

namespace g2r::gpu {

namespace emulated {

struct Product {
    float* d;
    const std::uint32_t* a;
    std::uint32_t b[2];
};

template <class T>
void multiply(void** arguments) {
    float a[16][16], b[16][8], d[16][8];
    for (int lane = 0; lane < kLanes; ++lane) {
        const Product& mine = *static_cast<const Product*>(arguments[lane]);
        const int row = lane / 4, pair = 2 * (lane % 4);
        for (int half = 0; half < 2; ++half) {
            const auto part = [half](std::uint32_t both) {
                return widen<T>(static_cast<std::uint16_t>(both >> (16 * half)));
            };
            for (int i = 0; i < 4; ++i)
                a[row + 8 * (i % 2)][pair + 8 * (i / 2) + half] = part(mine.a[i]);
            for (int i = 0; i < 2; ++i) {
                b[pair + 8 * i + half][row] = part(mine.b[i]);
                d[row + 8 * i][pair + half] = mine.d[2 * i + half];
            }
        }
    }
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < 16; ++k)
            for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
    for (int lane = 0; lane < kLanes; ++lane) {
        const Product& mine = *static_cast<const Product*>(arguments[lane]);
        for (int i = 0; i < 4; ++i) mine.d[i] = d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
    }
    ++counts.products;
}

struct Load {
    const void* row;
    std::uint32_t* r;
};

inline void load_matrices(void** arguments, bool transposed) {
    for (int matrix = 0; matrix < 4; ++matrix) {
        std::uint16_t values[8][8];
        unsigned banks = 0;
        for (int row = 0; row < 8; ++row) {
            const void* from = static_cast<const Load*>(arguments[8 * matrix + row])->row;
            std::memcpy(values[row], from, 16);
            const unsigned bank = 1u << (reinterpret_cast<std::uintptr_t>(from) / 16 % 8);
            counts.conflicts += (banks & bank) != 0;
            banks |= bank;
        }
        for (int lane = 0; lane < kLanes; ++lane) {
            const int row = lane / 4, pair = 2 * (lane % 4);
            const std::uint32_t low = transposed ? values[pair][row] : values[row][pair];
            const std::uint32_t high = transposed ? values[pair + 1][row] : values[row][pair + 1];
            static_cast<const Load*>(arguments[lane])->r[matrix] = low | (high << 16);
        }
    }
    ++counts.loads;
}

struct Shuffle {
    std::uint32_t value;
    int lane;
};

inline std::uint32_t exchange(std::uint32_t value, int lane) {
    if (lane < 0 || lane >= kLanes) fail("a shuffle from lane " + std::to_string(lane));
    Shuffle mine{value, lane};
    meet_warp(Wait::shuffle, &mine, [](void** arguments) {
        std::uint32_t values[kLanes];
        for (int i = 0; i < kLanes; ++i) values[i] = static_cast<Shuffle*>(arguments[i])->value;
        for (int i = 0; i < kLanes; ++i) {
            auto* other = static_cast<Shuffle*>(arguments[i]);
            other->value = values[other->lane];
        }
    });
    return mine.value;
}

inline bool any(void** arguments, int count) {
    bool result = false;
    for (int i = 0; i < count; ++i) result = result || *static_cast<bool*>(arguments[i]);
    for (int i = 0; i < count; ++i) *static_cast<bool*>(arguments[i]) = result;
    return result;
}

inline void nothing(void** /*arguments*/) {}

}  // namespace emulated

// ---------------------------------------------------------------------------------- the threads

inline int thread_index() { return emulated::running->index; }
inline int lane_index() { return thread_index() % emulated::kLanes; }
inline int warp_index() {
    return static_cast<int>(
        emulated::exchange(static_cast<std::uint32_t>(thread_index() / emulated::kLanes), 0));
}
inline int block_index_x() { return emulated::block->x; }
inline int block_index_y() { return emulated::block->y; }
inline int block_index_z() { return emulated::block->z; }
inline char* shared_memory() { return emulated::block->shared; }

inline void sync_block(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (emulated::pass_over("sync_block", file, line)) return;
    emulated::meet_block(emulated::Wait::block, nullptr, [](void**) {
        ++emulated::counts.barriers;
        emulated::note_block_barrier();
    });
}
inline void sync_warp(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (emulated::pass_over("sync_warp", file, line)) return;
    emulated::meet_warp(emulated::Wait::warp, nullptr, emulated::nothing);
}

// ------------------------------------------------------------------- copies from global to shared

inline void cp_async_16(void* shared, const void* global, bool valid) {
    emulated::check_shared(shared, "cp_async_16");
    emulated::check_aligned(global, "cp_async_16 from global memory");
    emulated::Copy copy = {shared, {}, emulated::running->group};
    if (valid) std::memcpy(copy.bytes, global, 16);
    std::memset(shared, 0xff, 16);
    emulated::note_copy(shared);
    emulated::running->copies.push_back(copy);
    ++emulated::counts.copies;
}

inline void cp_async_commit(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (!emulated::pass_over("cp_async_commit", file, line)) ++emulated::running->group;
}

template <int pending>
void cp_async_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    static_assert(pending >= 0);
    if (emulated::pass_over("cp_async_wait", file, line)) return;
    auto& copies = emulated::running->copies;
    const long long until = emulated::running->group - pending;
    std::size_t kept = 0;
    for (const emulated::Copy& copy : copies) {
        if (copy.group < until) {
            std::memcpy(copy.to, copy.bytes, 16);
            emulated::note_write(copy.to);
        } else {
            copies[kept++] = copy;
        }
    }
    copies.resize(kept);
}

// ------------------------------------------------------------------------------ matrix products

inline void ldmatrix_x4(std::uint32_t (&r)[4], const void* shared_row) {
    emulated::check_shared(shared_row, "ldmatrix_x4");
    emulated::Load mine{shared_row, r};
    emulated::meet_warp(emulated::Wait::matrices, &mine,
                        [](void** arguments) { emulated::load_matrices(arguments, false); });
}

inline void ldmatrix_x4_transposed(std::uint32_t (&r)[4], const void* shared_row) {
    emulated::check_shared(shared_row, "ldmatrix_x4_transposed");
    emulated::Load mine{shared_row, r};
    emulated::meet_warp(emulated::Wait::transposed, &mine,
                        [](void** arguments) { emulated::load_matrices(arguments, true); });
}

template <typename T>
void mma_16x8x16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
    emulated::Product mine{d, a, {b0, b1}};
    emulated::meet_warp(
        std::is_same_v<T, bf16> ? emulated::Wait::product_bf16 : emulated::Wait::product_f16, &mine,
        emulated::multiply<T>);
}

// ------------------------------------------------------------------------ exchange between lanes

inline std::uint32_t shuffle_xor(std::uint32_t value, int mask) {
    return emulated::exchange(value, lane_index() ^ mask);
}
inline float shuffle_xor(float value, int mask) {
    return emulated::float_of(shuffle_xor(emulated::bits_of(value), mask));
}
inline int shuffle(int value, int lane) {
    return static_cast<int>(emulated::exchange(static_cast<std::uint32_t>(value), lane));
}
inline float shuffle(float value, int lane) {
    return emulated::float_of(emulated::exchange(emulated::bits_of(value), lane));
}
inline float quad_max(float value) {
    value = std::fmax(value, shuffle_xor(value, 1));
    return std::fmax(value, shuffle_xor(value, 2));
}
inline float quad_sum(float value) {
    value += shuffle_xor(value, 1);
    return value + shuffle_xor(value, 2);
}
inline bool any_of_warp(bool value) {
    emulated::meet_warp(emulated::Wait::any_of_warp, &value,
                        [](void** arguments) { emulated::any(arguments, emulated::kLanes); });
    return value;
}
inline bool any_of_block(bool value) {
    emulated::meet_block(emulated::Wait::any_of_block, &value, [](void** arguments) {
        emulated::any(arguments, emulated::block->threads);
        ++emulated::counts.barriers;
        emulated::note_block_barrier();
    });
    return value;
}

// ------------------------------------------------------------------------------------- functions

inline float exp2(float x) {
    const float y = std::exp2(x);
    return y < 0x1p-126f ? 0.0f : y;
}
inline float log2(float x) { return std::log2(x); }
inline float log(float x) { return std::log(x); }
inline float tanh(float x) { return std::tanh(x); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline float min(float a, float b) { return std::fmin(a, b); }
inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline float infinity() { return HUGE_VALF; }

// ------------------------------------------------------------------------------------ conversion

inline float to_float(bf16 x) { return emulated::widen<bf16>(x.bits); }
inline float to_float(f16 x) { return emulated::widen<f16>(x.bits); }
inline float to_float(float x) { return x; }

template <typename T>
T from_float(float x) {
    if constexpr (std::is_same_v<T, bf16>) {
        return bf16{emulated::to_bf16(x)};
    } else if constexpr (std::is_same_v<T, f16>) {
        return f16{emulated::to_f16(x)};
    } else {
        static_assert(std::is_same_v<T, float>);
        return x;
    }
}

template <typename T>
std::uint32_t pack(float low, float high) {
    static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
    return static_cast<std::uint32_t>(from_float<T>(low).bits) |
           (static_cast<std::uint32_t>(from_float<T>(high).bits) << 16);
}

template <typename T>
void unpack(std::uint32_t both, float& low, float& high) {
    low = emulated::widen<T>(static_cast<std::uint16_t>(both & 0xffffu));
    high = emulated::widen<T>(static_cast<std::uint16_t>(both >> 16));
}

// ----------------------------------------------------------------------------------- 16 bytes

struct alignas(16) Words {
    std::uint32_t word[4];
};
inline Words load_16(const void* from) {
    emulated::check_aligned(from, "load_16");
    Words words;
    std::memcpy(&words, from, 16);
    return words;
}
inline void store_16(void* to, const Words& words) {
    emulated::check_aligned(to, "store_16");
    std::memcpy(to, &words, 16);
    if (emulated::in_shared_memory(to)) emulated::note_write(to);
}

// ------------------------------------------------------------------------------------ the launch

template <typename T>
struct Same {
    using type = T;
};

// The `stream` is nothing here. Returns 0 or kError.
template <typename... Parameters>
int launch(void (*kernel)(Parameters...), Grid grid, int threads, int shared_bytes,
           void* /*stream*/, typename Same<Parameters>::type... arguments) {
    struct Closure {
        void (*kernel)(Parameters...);
        std::tuple<std::decay_t<Parameters>...> arguments;
    };
    Closure closure{kernel, {arguments...}};
    return emulated::run(
        grid, threads, shared_bytes,
        [](void* pointer) {
            auto& all = *static_cast<Closure*>(pointer);
            std::apply(all.kernel, all.arguments);
        },
        &closure);
}

inline const char* error_text(int error) {
    return error == 0 ? "no error" : emulated::message.c_str();
}

}  // namespace g2r::gpu

// For a test that has loaded a library of emulated kernels.
extern "C" {
// The order of threads: 0 ascending, 1 descending, 2 random, 3 each in turn.
__attribute__((used, visibility("default"))) inline void g2r_emulated_order(int order) {
    g2r::gpu::emulated::order = static_cast<g2r::gpu::emulated::Order>(order);
}
// Passes over the wait with this index from now on; -1: none.
__attribute__((used, visibility("default"))) inline void g2r_emulated_pass_over(int index) {
    g2r::gpu::emulated::passed_over = index;
}
// The waits that have been met so far, "sync_block file:line"; null behind the last.
__attribute__((used, visibility("default"))) inline const char* g2r_emulated_site(int index) {
    static std::string text;
    const auto& sites = g2r::gpu::emulated::sites;
    if (index < 0 || index >= static_cast<int>(sites.size())) return nullptr;
    const auto& site = sites[static_cast<std::size_t>(index)];
    text = std::string(site.what) + " " + site.file + ":" + std::to_string(site.line);
    return text.c_str();
}
// blocks, products, ldmatrix, its bank conflicts, cp_async, barriers since the last call.
__attribute__((used, visibility("default"))) inline void g2r_emulated_counts(long long* six) {
    const auto& counts = g2r::gpu::emulated::counts;
    const long long now[6] = {counts.blocks,    counts.products, counts.loads,
                              counts.conflicts, counts.copies,   counts.barriers};
    std::copy(now, now + 6, six);
    g2r::gpu::emulated::counts = {};
}
// wgmma, the bank conflicts of its reads since the last call.
__attribute__((used, visibility("default"))) inline void g2r_emulated_warpgroup_counts(
    long long* two) {
    auto& counts = g2r::gpu::emulated::warpgroup_counts;
    two[0] = counts.products;
    two[1] = counts.conflicts;
    counts = {};
}
}
