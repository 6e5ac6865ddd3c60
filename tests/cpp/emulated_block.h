// The blocks of a grid, one after the other: whose turn it is, where threads meet, and the memory
// that they share.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <random>

#include "emulated_fibers.h"

namespace g2r::gpu {

struct Grid {
    int x = 1, y = 1, z = 1;
};

namespace emulated {

// Ends the launch: from a thread it does not come back.
inline void fail(const std::string& what) {
    char place[96];
    std::snprintf(place, sizeof place, "block (%d, %d, %d), ", block->x, block->y, block->z);
    message = place;
    if (running != nullptr) message += "thread " + std::to_string(running->index) + ": ";
    message += what;
    block->failed = true;
    if (running != nullptr) throw Failed();
}

// The last to arrive of `count` threads from `first` on computes for all of them.
template <class Compute>
void meet(Wait kind, int first, int count, int& arrived, void* argument, const Compute& compute) {
    Fiber& fiber = *running;
    fiber.wait = kind;
    fiber.argument = argument;
    if (++arrived < count) {
        to_scheduler(false);
        return;
    }
    arrived = 0;
    void* arguments[1024];
    for (int i = 0; i < count; ++i) {
        Fiber& other = block->fibers[static_cast<std::size_t>(first + i)];
        if (other.wait != kind)
            fail(std::string("at ") + name_of(kind) + ", while thread " +
                 std::to_string(first + i) + " is at " + name_of(other.wait));
        arguments[i] = other.argument;
    }
    compute(arguments);
    for (int i = 0; i < count; ++i)
        block->fibers[static_cast<std::size_t>(first + i)].wait = Wait::none;
}

template <class Compute>
void meet_warp(Wait kind, void* argument, const Compute& compute) {
    const int warp = running->index / kLanes;
    meet(kind, warp * kLanes, kLanes, block->arrived[static_cast<std::size_t>(warp)], argument,
         compute);
}

template <class Compute>
void meet_block(Wait kind, void* argument, const Compute& compute) {
    meet(kind, 0, block->threads, block->arrived.back(), argument, compute);
}

// Where kernels wait, found while they run. A test may have one of them passed over as if it were
// not written, in order to see whether anything notices.
struct Site {
    const char* what;
    const char* file;
    int line;
};
inline std::vector<Site> sites;
inline int passed_over = -1;

// Whether to pass over this one.
inline bool pass_over(const char* what, const char* file, int line) {
    int at = 0;
    for (; at < static_cast<int>(sites.size()); ++at) {
        const Site& site = sites[static_cast<std::size_t>(at)];
        if (site.line == line && std::strcmp(site.file, file) == 0 &&
            std::strcmp(site.what, what) == 0)
            break;
    }
    if (at == static_cast<int>(sites.size())) sites.push_back({what, file, line});
    return at == passed_over;
}

// Memory of a block's threads and of its shared memory.
class Memory {
 public:
    Memory(int threads, std::size_t shared_bytes)
        : each_(kStack + kPage),
          size_(each_ * static_cast<std::size_t>(threads)),
          shared_bytes_(shared_bytes),
          shared_(new char[shared_bytes + 2 * kGuard + 1024]) {
        void* stacks = mmap(nullptr, size_, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        stacks_ = stacks == MAP_FAILED ? nullptr : static_cast<char*>(stacks);
        // Below each stack a page that nobody may touch.
        for (std::size_t at = 0; stacks_ != nullptr && at < size_; at += each_)
            mprotect(stacks_ + at, kPage, PROT_NONE);
    }
    ~Memory() {
#ifdef G2R_EMULATED_ASAN
        if (stacks_ != nullptr) __asan_unpoison_memory_region(stacks_, size_);
        __asan_unpoison_memory_region(shared_.get(), shared_bytes_ + 2 * kGuard + 1024);
#endif
        if (stacks_ != nullptr) munmap(stacks_, size_);
    }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    bool fine() const { return stacks_ != nullptr; }
    char* stack(int thread) const {
        return stacks_ + each_ * static_cast<std::size_t>(thread) + kPage;
    }
    char* shared() const {
        const auto start = reinterpret_cast<std::uintptr_t>(shared_.get()) + kGuard;
        return shared_.get() + kGuard + ((1024 - start % 1024) % 1024);
    }
    void poison() const {
        std::memset(shared(), 0xff, shared_bytes_);
#ifdef G2R_EMULATED_ASAN
        __asan_poison_memory_region(shared() - kGuard, kGuard);
        __asan_poison_memory_region(shared() + shared_bytes_, kGuard);
#else
        std::memset(shared() - kGuard, kGuardByte, kGuard);
        std::memset(shared() + shared_bytes_, kGuardByte, kGuard);
#endif
    }
    bool guards_untouched() const {
#ifndef G2R_EMULATED_ASAN
        for (std::size_t i = 0; i < kGuard; ++i)
            for (const char* guard : {shared() - kGuard, shared() + shared_bytes_})
                if (static_cast<unsigned char>(guard[i]) != kGuardByte) return false;
#endif
        return true;
    }

 private:
    std::size_t each_, size_, shared_bytes_;
    char* stacks_ = nullptr;
    std::unique_ptr<char[]> shared_;
};

// Warps and lanes in the order in which they get their turn.
inline std::vector<int> turns(int count, Order how, std::mt19937& generator) {
    std::vector<int> result(static_cast<std::size_t>(count));
    for (int i = 0; i < count; ++i)
        result[static_cast<std::size_t>(i)] = how == Order::descending ? count - 1 - i : i;
    if (how == Order::random) std::shuffle(result.begin(), result.end(), generator);
    return result;
}

inline void tell_deadlock() {
    std::map<std::string, std::vector<int>> groups;
    for (const Fiber& fiber : block->fibers) groups[name_of(fiber.wait)].push_back(fiber.index);
    std::string what = "threads wait for each other:";
    for (const auto& [place, threads] : groups)
        what += " " + std::to_string(threads.size()) + " at " + place + " (the first is thread " +
                std::to_string(threads.front()) + ");";
    what.pop_back();
    fail(what);
}

inline void begin_block(Order how, unsigned seed);  // in emulated_tracked.h

inline void run_block(Order how, std::mt19937& generator) {
    const auto runnable = [](const Fiber& fiber) { return fiber.wait == Wait::none; };
    for (Fiber& fiber : block->fibers) prepare(fiber);
    std::fill(block->arrived.begin(), block->arrived.end(), 0);
    for (bool progress = true; progress;) {
        progress = false;
        for (const int warp : turns(block->threads / kLanes, how, generator)) {
            const std::vector<int> lanes = turns(kLanes, how, generator);
            // Each warp as far as it gets: in random order only so far as its lanes get at once.
            for (bool again = true; again;) {
                again = false;
                for (const int lane : lanes) {
                    Fiber& fiber = block->fibers[static_cast<std::size_t>(warp * kLanes + lane)];
                    if (!runnable(fiber)) continue;
                    to_fiber(fiber);
                    if (block->failed) return;
                    again = progress = true;
                }
                if (how == Order::random && generator() % 4 == 0) again = false;
            }
        }
    }
    for (const Fiber& fiber : block->fibers)
        if (fiber.wait != Wait::finished) return tell_deadlock();
}

inline int refuse(const std::string& what) {
    message = what;
    return kError;
}

inline int run(Grid grid, int threads, int shared_bytes, void (*call)(void*), void* closure) {
    if (grid.x <= 0 || grid.y <= 0 || grid.z <= 0) return 0;
    if (grid.y > 65535 || grid.z > 65535) return refuse("a grid beyond 65535 in y or z");
    if (threads <= 0 || threads > 1024 || threads % kLanes != 0)
        return refuse("blocks of " + std::to_string(threads) + " threads");
    if (shared_bytes < 0 || shared_bytes > 227 * 1024)
        return refuse(std::to_string(shared_bytes) + " bytes of shared memory");
    if (block != nullptr) return refuse("a launch inside a launch");
    const Memory memory(threads, static_cast<std::size_t>(shared_bytes));
    if (!memory.fine()) return refuse("no memory for the threads' stacks");
    Block here;
    here.threads = threads;
    here.shared = memory.shared();
    here.shared_bytes = static_cast<std::size_t>(shared_bytes);
    here.fibers.resize(static_cast<std::size_t>(threads));
    here.arrived.resize(static_cast<std::size_t>(threads / kLanes + 1));
    here.call = call;
    here.closure = closure;
    for (int i = 0; i < threads; ++i) {
        here.fibers[static_cast<std::size_t>(i)].index = i;
        here.fibers[static_cast<std::size_t>(i)].stack = memory.stack(i);
    }
    block = &here;
    long long number = 0;
    for (here.z = 0; here.z < grid.z && !here.failed; ++here.z)
        for (here.y = 0; here.y < grid.y && !here.failed; ++here.y)
            for (here.x = 0; here.x < grid.x && !here.failed; ++here.x, ++number) {
                memory.poison();
                std::mt19937 generator(static_cast<unsigned>(number));
                const Order how = order == Order::mixed ? static_cast<Order>(number % 3) : order;
                begin_block(how, static_cast<unsigned>(number));
                run_block(how, generator);
                ++counts.blocks;
                if (!here.failed && !memory.guards_untouched())
                    fail("wrote outside its shared memory");
                if (here.failed) break;
            }
    block = nullptr;
    return here.failed ? kError : 0;
}

inline void check_aligned(const void* address, const char* what) {
    if (reinterpret_cast<std::uintptr_t>(address) % 16 != 0)
        fail(std::string(what) + ": an address not aligned to 16 bytes");
}

inline void check_shared(const void* address, const char* what) {
    check_aligned(address, what);
    const auto at = reinterpret_cast<std::uintptr_t>(address);
    const auto start = reinterpret_cast<std::uintptr_t>(block->shared);
    if (at < start || at + 16 > start + block->shared_bytes)
        fail(std::string(what) + ": an address outside shared memory, byte " +
             std::to_string(static_cast<long long>(at - start)) + " of " +
             std::to_string(block->shared_bytes));
}

}  // namespace emulated
}  // namespace g2r::gpu
