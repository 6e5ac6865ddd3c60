// A pool of three threads for the kernels, while one of these lives.
#pragma once

#include <atomic>
#include <thread>

#include "exact_buffers.h"

namespace kernels_test {

class ThreePool {
 public:
    ThreePool() : before_(g2r::pool()) { g2r::set_pool({threads, run}); }
    ~ThreePool() { g2r::set_pool(before_); }
    ThreePool(const ThreePool&) = delete;
    ThreePool& operator=(const ThreePool&) = delete;

 private:
    static constexpr int kThreads = 3;
    static int threads() { return kThreads; }

    // Fresh threads every time: what they keep for themselves is gone with them.
    static void run(int64_t tasks, void (*task)(void* context, int64_t index), void* context) {
        std::atomic<int64_t> next{0};
        const auto work = [&] {
            for (int64_t index = next++; index < tasks; index = next++) task(context, index);
        };
        std::vector<std::thread> others;
        for (int i = 1; i < kThreads; ++i) others.emplace_back(work);
        work();
        for (std::thread& other : others) other.join();
    }

    g2r::Pool before_;
};

}  // namespace kernels_test
