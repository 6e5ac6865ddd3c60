// Products of a warpgroup (wgmma) on a CPU, as the PTX manual promises them and no more:
//
//   - the four warps of a warpgroup do not wait for each other: each warp has its 16 rows of a
//     product when it gets there, and only a barrier makes one warp wait for another;
//   - from the call to the wgmma_wait that covers it, d is NaN; the operands are read at the call
//     (threads in ascending order), when the wait comes (descending) or either (random);
//   - what a thread wrote to shared memory is read only behind its fence_async_proxy() and a
//     barrier behind that; what was written without a function of the emulation goes unseen;
//   - a wait with products not yet committed is an error, where the manual lets it pass them by;
//   - the registers of a product hold what they held at the last wgmma_fence, or what products and
//     waits have written to them since: wgmma_fence keeps a copy of each thread's stack.
//
// Matrices in shared memory, 128-byte swizzle, T = 8 elements of 16 bits, strides in bytes; bits 4
// to 6 of every address are XORed with its bits 7 to 9, wherever the descriptor starts:
//   K-major:  row r, element k:  r % 8 * 128 + r / 8 * stride + k * 2            (no leading)
//   MN-major: column n, row k:   n % 64 * 2 + n / 64 * leading + k % 8 * 128 + k / 8 * stride
// These are ((8,m),(T,2)):((8T,stride),(1,T)) and ((T,8,m),(8,k)):((1,T,leading),(8T,stride)), the
// canonical layouts of the manual and of CUTLASS's make_gmma_desc.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "emulated_numbers.h"
#include "emulated_tracked.h"

namespace g2r::gpu {

namespace emulated {

// ---------------------------------------------------------------------- matrices in shared memory

struct Matrix {
    std::uint32_t start, leading, stride;
};

inline Matrix decode(std::uint64_t descriptor, const char* name) {
    const auto refuse_it = [name](const char* why) {
        fail(std::string("wgmma: the descriptor of ") + name + " has " + why);
    };
    const auto field = [descriptor](int from) {
        return static_cast<std::uint32_t>(descriptor >> from & 0x3fffu) << 4;
    };
    if (descriptor >> 62 != 1) refuse_it("another swizzle than that of 128 bytes");
    if ((descriptor >> 49 & 7u) != 0) refuse_it("a base offset");
    if ((descriptor & 0x3ff1c000c000c000u) != 0) refuse_it("bits between its fields");
    return {field(0), field(16), field(32)};
}

inline std::uint32_t swizzle(std::uint32_t address) { return address ^ (address >> 3 & 0x70u); }

// 16 bytes: elements 8 part to 8 part + 7 of a row.
inline std::uint32_t k_major(const Matrix& matrix, int row, int part) {
    const auto r = static_cast<std::uint32_t>(row), p = static_cast<std::uint32_t>(part);
    return swizzle(matrix.start + r % 8 * 128 + r / 8 * matrix.stride + p * 16);
}
inline std::uint32_t mn_major(const Matrix& matrix, int row, int part) {
    const auto k = static_cast<std::uint32_t>(row), p = static_cast<std::uint32_t>(part);
    return swizzle(matrix.start + p % 8 * 16 + p / 8 * matrix.leading + k % 8 * 128 +
                   k / 8 * matrix.stride);
}

inline const char* at_address(std::uint32_t address) {
    return block->shared + (address - kSharedStart);
}

inline void check_chunk(std::uint32_t address, const char* name) {
    const auto byte = static_cast<long long>(address) - kSharedStart;
    const auto refuse_it = [byte, name](const std::string& why) {
        fail(std::string("wgmma reads ") + name + " at byte " + std::to_string(byte) + why);
    };
    if (byte < 0 || byte + 16 > static_cast<long long>(block->shared_bytes))
        refuse_it(" of " + std::to_string(block->shared_bytes) + " of shared memory");
    const Chunk& chunk = tracked.chunks[static_cast<std::size_t>(byte / 16)];
    if (chunk.thread < 0 || chunk.fences == kUnderWay) return;
    const auto& times = tracked.proxy_fences[static_cast<std::size_t>(chunk.thread)];
    const auto writer = [&chunk] {
        return ", written by thread " + std::to_string(chunk.thread) + " without a ";
    };
    if (chunk.fences >= static_cast<int>(times.size()))
        refuse_it(writer() + "fence_async_proxy behind that");
    const int time = times[static_cast<std::size_t>(chunk.fences)];
    if (tracked.block_barrier > time) return;
    refuse_it(writer() + "barrier behind its fence_async_proxy");
}

// Rows of a core matrix that wait for another row to leave its banks.
template <class Address>
void count_conflicts(const Address& address) {
    unsigned banks = 0;
    for (int row = 0; row < 8; ++row) {
        const unsigned bank = 1u << (address(row) / 16 % 8);
        warpgroup_counts.conflicts += (banks & bank) != 0;
        banks |= bank;
    }
}

template <class T>
void read_chunk(std::uint32_t address, float* to, int step) {
    std::uint16_t bits[8];
    std::memcpy(bits, at_address(address), 16);
    for (int i = 0; i < 8; ++i) to[i * step] = widen<T>(bits[i]);
}

template <class T, bool b_by_rows, int n_tiles>
void read_operands(const InFlight& product, Operands& operands) {
    constexpr int columns = 8 * n_tiles;
    const int first = product.warp % kWarps * 16;
    if (product.operation.a_in_registers) {
        for (int lane = 0; lane < kLanes; ++lane)
            for (int i = 0; i < 4; ++i) {
                const std::uint32_t both = product.a[static_cast<std::size_t>(lane)][i];
                float* const to = operands.a + (lane / 4 + 8 * (i % 2)) * 16 + 2 * (lane % 4);
                to[8 * (i / 2)] = widen<T>(static_cast<std::uint16_t>(both));
                to[8 * (i / 2) + 1] = widen<T>(static_cast<std::uint16_t>(both >> 16));
            }
    } else {
        const Matrix a = decode(product.operation.a, "a");
        for (int row = 0; row < 16; ++row)
            for (int part = 0; part < 2; ++part)
                read_chunk<T>(k_major(a, first + row, part), operands.a + row * 16 + part * 8, 1);
    }
    operands.b.resize(16 * columns);
    float* const to = operands.b.data();
    const Matrix b = decode(product.operation.b, "b");
    if constexpr (b_by_rows) {
        for (int k = 0; k < 16; ++k)
            for (int part = 0; part < n_tiles; ++part)
                read_chunk<T>(mn_major(b, k, part), to + k * columns + part * 8, 1);
    } else {
        for (int n = 0; n < columns; ++n)
            for (int part = 0; part < 2; ++part)
                read_chunk<T>(k_major(b, n, part), to + part * 8 * columns + n, columns);
    }
}

template <int n_tiles>
void multiply_rows(float* d, const Operands& operands) {
    constexpr int columns = 8 * n_tiles;
    const float* const b = operands.b.data();
    for (int i = 0; i < 16; ++i) {
        float row[columns];
        std::memcpy(row, d + i * columns, sizeof row);
        for (int k = 0; k < 16; k += 4) {  // four at once: the row stays in registers
            const float* const a = operands.a + i * 16 + k;
            const float* const from = b + k * columns;
            const float a0 = a[0], a1 = a[1], a2 = a[2], a3 = a[3];
            for (int n = 0; n < columns; ++n)
                row[n] = row[n] + a0 * from[n] + a1 * from[n + columns] +
                         a2 * from[n + 2 * columns] + a3 * from[n + 3 * columns];
        }
        std::memcpy(d + i * columns, row, sizeof row);
    }
}

// -------------------------------------------------------------------------------- the operations

inline int first_thread() { return running->index / kLanes * kLanes; }

// What a warp does next, the same for its lanes and for the other warps.
inline Warp& next_operation(void** calls) {
    const auto operation = [calls](int lane) -> const Operation& {
        return static_cast<const Call*>(calls[lane])->operation;
    };
    const Operation& now = operation(0);
    const std::string name = name_of(now.kind);
    const auto warp = static_cast<std::size_t>(running->index / kLanes), group = warp / kWarps;
    if (group >= tracked.operations.size()) fail(name + ": not a whole warpgroup");
    for (int lane = 1; lane < kLanes; ++lane)
        if (!(operation(lane) == now)) fail(name + ": other arguments in other lanes of the warp");
    Warp& state = tracked.warps[warp];
    auto& all = tracked.operations[group];
    if (state.operations == all.size()) all.push_back(now);
    const Operation& others = all[state.operations++];
    if (others.kind != now.kind)
        fail("at " + name + ", while another warp of the warpgroup was at " + name_of(others.kind));
    if (!(others == now)) fail(name + ": other arguments in other warps of the warpgroup");
    return state;
}

template <class Visit>
void for_each_register(const Accumulator& accumulator, const Visit& visit) {
    for (int lane = 0; lane < kLanes; ++lane) {
        float* const d = accumulator.d[static_cast<std::size_t>(lane)];
        for (int j = 0; j < accumulator.n_tiles; ++j)
            for (int c = 0; c < 4; ++c)
                visit(d[4 * j + c], (lane / 4 + c / 2 * 8) * accumulator.n_tiles * 8 + 8 * j +
                                        2 * (lane % 4) + c % 2);
    }
}

// Registers as products and waits leave them need no fence.
inline void keep_registers(const Accumulator& accumulator) {
    for (int lane = 0; lane < kLanes; ++lane) {
        const float* const d = accumulator.d[static_cast<std::size_t>(lane)];
        if (void* copy = fenced_copy(first_thread() + lane, d); copy != nullptr)
            std::memcpy(copy, d, bytes_of(accumulator.n_tiles));
    }
}

inline void note_written(Warp& state, const Accumulator& accumulator) {
    const std::pair<const float*, int> d(accumulator.d[0], accumulator.n_tiles);
    if (std::find(state.written.begin(), state.written.end(), d) == state.written.end())
        state.written.push_back(d);
}

inline void check_in_flight(const Accumulator& accumulator) {
    for (int lane = 0; lane < kLanes; ++lane)
        for (int i = 0; i < accumulator.n_tiles * 4; ++i) {
            std::uint32_t bits;
            std::memcpy(&bits, accumulator.d[static_cast<std::size_t>(lane)] + i, 4);
            if (bits != kInFlight)
                fail("d of a product in flight was written by thread " +
                     std::to_string(first_thread() + lane));
        }
}

inline void check_registers(const Warp& state, void** calls, bool in_flight) {
    const Call& first = *static_cast<const Call*>(calls[0]);
    const Operation& operation = first.operation;
    const std::size_t bytes = bytes_of(operation.n_tiles);
    if (!state.fenced) fail("wgmma without any wgmma_fence before it");
    bool written = false;
    for (const auto& [d, n_tiles] : state.written) {
        if (d == first.d && n_tiles == operation.n_tiles) {
            written = true;
        } else if (overlap(d, bytes_of(n_tiles), first.d, bytes)) {
            fail("wgmma: d of a product of another shape, without a wgmma_fence between them");
        }
        if (first.a != nullptr && overlap(d, bytes_of(n_tiles), first.a, 16))
            fail("wgmma: a in registers of d of another product, without a wgmma_fence between");
    }
    for (const InFlight& product : state.products)
        if (product.a[0] != nullptr && overlap(product.a[0], 16, first.d, bytes))
            fail("wgmma: d in registers of a of a product in flight");
    for (int lane = 0; lane < kLanes; ++lane) {
        const Call& mine = *static_cast<const Call*>(calls[lane]);
        const int thread = first_thread() + lane;
        const bool compare =
            written ? fenced_copy(thread, mine.d) != nullptr : operation.accumulate;
        if (!in_flight && compare && changed(thread, mine.d, bytes))
            fail("wgmma: thread " + std::to_string(thread) +
                 " has written d since the last wgmma_fence");
        if (mine.a != nullptr && changed(thread, mine.a, 16))
            fail("wgmma: thread " + std::to_string(thread) +
                 " has written a since the last wgmma_fence");
    }
}

inline std::size_t accumulator_of(Warp& state, void** calls) {
    const Call& first = *static_cast<const Call*>(calls[0]);
    const std::size_t bytes = bytes_of(first.operation.n_tiles);
    std::size_t found = state.accumulators.size(), unused = found;
    for (std::size_t i = 0; i < state.accumulators.size(); ++i) {
        const Accumulator& accumulator = state.accumulators[i];
        if (!accumulator.used) {
            unused = i;
        } else if (accumulator.d[0] == first.d && accumulator.n_tiles == first.operation.n_tiles) {
            found = i;
        } else if (overlap(accumulator.d[0], bytes_of(accumulator.n_tiles), first.d, bytes)) {
            fail("wgmma: d overlaps that of a product of another shape in flight");
        }
        if (accumulator.used && first.a != nullptr &&
            overlap(accumulator.d[0], bytes_of(accumulator.n_tiles), first.a, 16))
            fail("wgmma: a in registers of d of a product in flight");
    }
    if (found < state.accumulators.size()) {
        for (int lane = 0; lane < kLanes; ++lane)
            if (state.accumulators[found].d[static_cast<std::size_t>(lane)] !=
                static_cast<const Call*>(calls[lane])->d)
                fail("wgmma: d in other registers in other lanes of the warp");
        check_in_flight(state.accumulators[found]);
        check_registers(state, calls, true);
        return found;
    }
    check_registers(state, calls, false);
    if (unused == state.accumulators.size()) state.accumulators.emplace_back();
    Accumulator& accumulator = state.accumulators[unused];
    accumulator.used = true;
    accumulator.n_tiles = first.operation.n_tiles;
    for (int lane = 0; lane < kLanes; ++lane)
        accumulator.d[static_cast<std::size_t>(lane)] = static_cast<const Call*>(calls[lane])->d;
    accumulator.values.resize(static_cast<std::size_t>(accumulator.n_tiles) * 128);
    for_each_register(accumulator, [&](float& d, int at) {
        accumulator.values[static_cast<std::size_t>(at)] = d;
        std::memcpy(&d, &kInFlight, 4);
    });
    keep_registers(accumulator);
    note_written(state, accumulator);
    return unused;
}

template <bool b_by_rows, int n_tiles>
void check_matrices(const Operation& operation, int warp) {
    if (!operation.a_in_registers) {
        const Matrix a = decode(operation.a, "a");
        for (int row = 0; row < 64; ++row)
            for (int part = 0; part < 2; ++part) check_chunk(k_major(a, row, part), "a");
        for (int part = 0; part < 4; ++part)
            count_conflicts([&](int row) {
                return k_major(a, warp % kWarps * 16 + part / 2 * 8 + row, part % 2);
            });
    }
    const Matrix b = decode(operation.b, "b");
    constexpr int rows = b_by_rows ? 16 : 8 * n_tiles, parts = b_by_rows ? n_tiles : 2;
    const auto address = [&b](int row, int part) {
        return b_by_rows ? mn_major(b, row, part) : k_major(b, row, part);
    };
    for (int row = 0; row < rows; ++row)
        for (int part = 0; part < parts; ++part) check_chunk(address(row, part), "b");
    if (warp % kWarps != 0) return;
    for (int row = 0; row < rows; row += 8)
        for (int part = 0; part < parts; ++part)
            count_conflicts([&](int i) { return address(row + i, part); });
    ++warpgroup_counts.products;
}

template <class T, bool b_by_rows, int n_tiles>
void issue(void** calls) {
    Warp& state = next_operation(calls);
    const Operation& operation = static_cast<const Call*>(calls[0])->operation;
    const int warp = running->index / kLanes;
    check_matrices<b_by_rows, n_tiles>(operation, warp);
    const std::size_t accumulator = accumulator_of(state, calls);
    state.accumulators[accumulator].group = state.group;
    state.open = true;
    state.products.emplace_back();
    InFlight& product = state.products.back();
    product.operation = operation;
    product.group = state.group;
    product.warp = warp;
    product.accumulator = accumulator;
    for (int lane = 0; lane < kLanes; ++lane)
        product.a[static_cast<std::size_t>(lane)] = static_cast<const Call*>(calls[lane])->a;
    product.read = read_operands<T, b_by_rows, n_tiles>;
    product.multiply = multiply_rows<n_tiles>;
    product.has_read = tracked.how == Order::ascending ||
                       (tracked.how == Order::random && tracked.generator() % 2 == 0);
    if (product.has_read) product.read(product, product.operands);
}

inline void complete(Warp& state, long long until) {
    while (!state.products.empty() && state.products.front().group < until) {
        InFlight& product = state.products.front();
        std::vector<float>& values = state.accumulators[product.accumulator].values;
        if (!product.has_read) product.read(product, product.operands);
        if (!product.operation.accumulate) std::fill(values.begin(), values.end(), 0.0f);
        product.multiply(values.data(), product.operands);
        state.products.pop_front();
    }
    for (Accumulator& accumulator : state.accumulators) {
        if (!accumulator.used || accumulator.group >= until) continue;
        check_in_flight(accumulator);
        for_each_register(accumulator, [&](float& d, int at) {
            d = accumulator.values[static_cast<std::size_t>(at)];
        });
        keep_registers(accumulator);
        note_written(state, accumulator);
        accumulator.used = false;
    }
}

// At the end of a thread.
inline void end_thread() {
    const auto warp = static_cast<std::size_t>(running->index / kLanes), group = warp / kWarps;
    const Warp& state = tracked.warps[warp];
    if (state.open) fail("the kernel ends with a wgmma that is not committed");
    if (!state.products.empty()) fail("the kernel ends with a wgmma that no wgmma_wait covers");
    if (group >= tracked.operations.size()) return;
    const auto first = group * warpgroup_threads;
    for (std::size_t i = first; i < first + warpgroup_threads; ++i)
        if (static_cast<int>(i) != running->index && block->fibers[i].wait != Wait::finished)
            return;
    for (std::size_t i = group * kWarps; i < (group + 1) * kWarps; ++i)
        if (tracked.warps[i].operations != tracked.operations[group].size())
            fail("the warps of a warpgroup end with different numbers of wgmma operations");
}

template <class T, bool b_by_rows, int n_tiles>
void meet_product(float (&d)[n_tiles][4], std::uint64_t a, const std::uint32_t* registers,
                  std::uint64_t b, bool accumulate) {
    static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
    static_assert(n_tiles >= 1 && n_tiles <= 32);
    Call mine;
    mine.operation.kind = Wait::wgmma;
    mine.operation.n_tiles = n_tiles;
    mine.operation.is_f16 = std::is_same_v<T, f16>;
    mine.operation.b_by_rows = b_by_rows;
    mine.operation.a_in_registers = registers != nullptr;
    mine.operation.accumulate = accumulate;
    mine.operation.a = a;
    mine.operation.b = b;
    mine.d = &d[0][0];
    mine.a = registers;
    meet_warp(Wait::wgmma, &mine, issue<T, b_by_rows, n_tiles>);
}

}  // namespace emulated

// ------------------------------------------------------------------------------------ the products

inline std::uint64_t matrix_descriptor(const void* shared, int leading_bytes, int stride_bytes) {
    emulated::check_shared(shared, "matrix_descriptor");
    for (const int bytes : {leading_bytes, stride_bytes})
        if (bytes < 0 || bytes >= 1 << 18 || bytes % 16 != 0)
            emulated::fail("matrix_descriptor: a stride of " + std::to_string(bytes) + " bytes");
    const auto offset = static_cast<const char*>(shared) - emulated::block->shared;
    const auto field = [](std::uint64_t bytes) { return bytes >> 4; };
    return field(static_cast<std::uint64_t>(offset) + emulated::kSharedStart) |
           field(static_cast<std::uint64_t>(leading_bytes)) << 16 |
           field(static_cast<std::uint64_t>(stride_bytes)) << 32 | std::uint64_t{1} << 62;
}

template <typename T, bool b_by_rows, int n_tiles>
void wgmma(float (&d)[n_tiles][4], std::uint64_t a, std::uint64_t b, bool accumulate) {
    emulated::meet_product<T, b_by_rows, n_tiles>(d, a, nullptr, b, accumulate);
}

template <typename T, bool b_by_rows, int n_tiles>
void wgmma(float (&d)[n_tiles][4], const std::uint32_t (&a)[4], std::uint64_t b, bool accumulate) {
    emulated::meet_product<T, b_by_rows, n_tiles>(d, 0, a, b, accumulate);
}

inline void wgmma_fence(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (emulated::pass_over("wgmma_fence", file, line)) return;
    emulated::Call mine;
    mine.operation.kind = emulated::Wait::wgmma_fence;
    mine.stack = emulated::lowest_in_use();
    emulated::meet_warp(emulated::Wait::wgmma_fence, &mine, [](void** calls) {
        emulated::Warp& state = emulated::next_operation(calls);
        state.fenced = true;
        state.written.clear();
        for (int lane = 0; lane < emulated::kLanes; ++lane) {
            const auto thread = static_cast<std::size_t>(emulated::first_thread() + lane);
            emulated::keep_stack(emulated::tracked.fenced[thread], emulated::block->fibers[thread],
                                 static_cast<const emulated::Call*>(calls[lane])->stack);
        }
    });
}

inline void wgmma_commit(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (emulated::pass_over("wgmma_commit", file, line)) return;
    emulated::Call mine;
    mine.operation.kind = emulated::Wait::wgmma_commit;
    emulated::meet_warp(emulated::Wait::wgmma_commit, &mine, [](void** calls) {
        emulated::Warp& state = emulated::next_operation(calls);
        ++state.group;
        state.open = false;
    });
}

template <int pending>
void wgmma_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    static_assert(pending >= 0 && pending <= 7);
    if (emulated::pass_over("wgmma_wait", file, line)) return;
    emulated::Call mine;
    mine.operation.kind = emulated::Wait::wgmma_wait;
    mine.operation.pending = pending;
    emulated::meet_warp(emulated::Wait::wgmma_wait, &mine, [](void** calls) {
        emulated::Warp& state = emulated::next_operation(calls);
        if (state.open) emulated::fail("wgmma_wait behind a wgmma that is not committed");
        emulated::complete(state, state.group - pending);
    });
}

inline void fence_async_proxy(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (emulated::pass_over("fence_async_proxy", file, line)) return;
    const auto thread = static_cast<std::size_t>(emulated::running->index);
    emulated::tracked.proxy_fences[thread].push_back(++emulated::tracked.clock);
}

}  // namespace g2r::gpu
