// What the emulation remembers of a block for its warpgroups' products: who wrote which bytes of
// shared memory and fenced them, what is in flight, and what registers held at the last fence.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <random>
#include <vector>

#include "emulated_block.h"

namespace g2r::gpu {

constexpr int warpgroup_threads = 128;

namespace emulated {

constexpr int kWarps = warpgroup_threads / kLanes;
constexpr std::uint32_t kSharedStart = 1024;  // the address of the block's shared memory
constexpr int kUnderWay = -1;
// A signalling NaN: arithmetic on it leaves another one.
constexpr std::uint32_t kInFlight = 0xffbfffffu;

// ------------------------------------------------------------------------------- what is tracked

// Who wrote 16 bytes of shared memory, and how many fences of that thread had been before.
struct Chunk {
    int thread = -1;
    int fences = kUnderWay;
};

// What all threads of a warpgroup must do alike.
struct Operation {
    Wait kind = Wait::none;
    int pending = 0;
    int n_tiles = 0;
    bool is_f16 = false, b_by_rows = false, a_in_registers = false, accumulate = false;
    std::uint64_t a = 0, b = 0;

    bool operator==(const Operation& other) const {
        return kind == other.kind && pending == other.pending && n_tiles == other.n_tiles &&
               is_f16 == other.is_f16 && b_by_rows == other.b_by_rows &&
               a_in_registers == other.a_in_registers && accumulate == other.accumulate &&
               a == other.a && b == other.b;
    }
};

struct Call {
    Operation operation;
    float* d = nullptr;
    const std::uint32_t* a = nullptr;
    const void* stack = nullptr;
};

struct Operands {
    float a[16 * 16];
    std::vector<float> b;
};

// A warp's part of a product in flight.
struct InFlight {
    Operation operation;
    long long group;
    int warp;
    std::size_t accumulator;
    std::array<const std::uint32_t*, kLanes> a;
    void (*read)(const InFlight&, Operands&);
    void (*multiply)(float*, const Operands&);
    bool has_read;
    Operands operands;
};

// The registers d of a warp while products are in flight.
struct Accumulator {
    std::array<float*, kLanes> d;
    int n_tiles = 0;
    long long group = 0;        // of its last product
    std::vector<float> values;  // 16 x 8 n_tiles
    bool used = false;
};

struct Warp {
    std::size_t operations = 0;
    long long group = 0;  // the one still open
    bool open = false;    // whether it has products
    bool fenced = false;  // whether there was any wgmma_fence
    std::deque<InFlight> products;
    std::vector<Accumulator> accumulators;
    std::vector<std::pair<const float*, int>> written;  // d of the first lane since the last fence
};

// A thread's stack, from its lowest byte in use at the last wgmma_fence.
struct Fenced {
    const char* from = nullptr;
    std::vector<std::uint64_t> words;
};

struct Tracked {
    Order how = Order::ascending;
    std::mt19937 generator;
    std::vector<Chunk> chunks;
    int clock = 0, block_barrier = 0;
    std::vector<std::vector<int>> proxy_fences;  // of each thread, when
    std::vector<std::vector<Operation>> operations;
    std::vector<Warp> warps;
    std::vector<Fenced> fenced;
};
inline Tracked tracked;

struct WarpgroupCounts {
    long long products = 0;
    long long conflicts = 0;  // rows of core matrices that wait for another to leave its banks
};
inline WarpgroupCounts warpgroup_counts;

inline void begin_block(Order how, unsigned seed) {
    const auto threads = static_cast<std::size_t>(block->threads);
    tracked.how = how;
    tracked.generator.seed(seed);
    tracked.chunks.assign(block->shared_bytes / 16, {});
    tracked.clock = tracked.block_barrier = 0;
    tracked.proxy_fences.resize(threads);
    for (auto& times : tracked.proxy_fences) times.clear();
    tracked.operations.assign(threads / warpgroup_threads, {});
    tracked.warps.assign(threads / kLanes, {});
    tracked.fenced.resize(threads);
    for (Fenced& fenced : tracked.fenced) fenced.from = nullptr;
}

inline bool in_shared_memory(const void* address) {
    const auto at = reinterpret_cast<std::uintptr_t>(address);
    const auto start = reinterpret_cast<std::uintptr_t>(block->shared);
    return at >= start && at + 16 <= start + block->shared_bytes;
}

inline Chunk& chunk_of(const void* shared) {
    return tracked
        .chunks[static_cast<std::size_t>(static_cast<const char*>(shared) - block->shared) / 16];
}

inline void note_copy(const void* shared) { chunk_of(shared) = {running->index, kUnderWay}; }
inline void note_write(const void* shared) {
    const auto& fences = tracked.proxy_fences[static_cast<std::size_t>(running->index)];
    chunk_of(shared) = {running->index, static_cast<int>(fences.size())};
}
inline void note_block_barrier() { tracked.block_barrier = ++tracked.clock; }

// ------------------------------------------------------------------------------------- the stacks

// Below all that the caller keeps.
G2R_OPAQUE inline const void* lowest_in_use() { return __builtin_frame_address(0); }

G2R_UNSEEN inline void keep_stack(Fenced& fenced, const Fiber& fiber, const void* from) {
    const auto* const low =
        reinterpret_cast<const char*>(reinterpret_cast<std::uintptr_t>(from) / 8 * 8);
    if (low < fiber.stack || low >= fiber.stack + kStack) return;
    const auto bytes = static_cast<std::size_t>(fiber.stack + kStack - low);
    fenced.from = low;
    fenced.words.resize(bytes / 8);
#ifdef G2R_EMULATED_ASAN
    const auto* const words = reinterpret_cast<const volatile std::uint64_t*>(low);
    for (std::size_t i = 0; i < bytes / 8; ++i) fenced.words[i] = words[i];
#else
    std::memcpy(fenced.words.data(), low, bytes);
#endif
}

// Where the copy of these registers is; null where there is none.
inline void* fenced_copy(int thread, const void* registers) {
    Fenced& fenced = tracked.fenced[static_cast<std::size_t>(thread)];
    const auto* const at = static_cast<const char*>(registers);
    const char* const top = block->fibers[static_cast<std::size_t>(thread)].stack + kStack;
    if (fenced.from == nullptr || at < fenced.from || at >= top) return nullptr;
    return reinterpret_cast<char*>(fenced.words.data()) + (at - fenced.from);
}

inline bool changed(int thread, const void* registers, std::size_t bytes) {
    const Fiber& fiber = block->fibers[static_cast<std::size_t>(thread)];
    const void* const copy = fenced_copy(thread, registers);
    if (copy != nullptr) return std::memcmp(copy, registers, bytes) != 0;
    // On the stack, but deeper than at the fence: they are younger than that.
    const auto* const at = static_cast<const char*>(registers);
    return at >= fiber.stack && at < fiber.stack + kStack;
}

inline bool overlap(const void* first, std::size_t bytes, const void* second, std::size_t others) {
    const auto a = reinterpret_cast<std::uintptr_t>(first);
    const auto b = reinterpret_cast<std::uintptr_t>(second);
    return a < b + others && b < a + bytes;
}

inline std::size_t bytes_of(int n_tiles) { return static_cast<std::size_t>(n_tiles) * 16; }

}  // namespace emulated
}  // namespace g2r::gpu
