// What the tests of the emulated device share.
#pragma once

#include <cstdio>
#include <string>

#include "device.cuh"

namespace g2r::gpu {

inline int failures = 0;

inline void check(bool fine, const std::string& what) {
    if (fine) return;
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
    ++failures;
}

// Runs it in every order of threads.
template <class Run>
void in_every_order(const Run& run) {
    for (const auto order : {emulated::Order::ascending, emulated::Order::descending,
                             emulated::Order::random, emulated::Order::mixed}) {
        emulated::order = order;
        run();
    }
    emulated::order = emulated::Order::mixed;
}

}  // namespace g2r::gpu
