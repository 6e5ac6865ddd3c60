// Which table of kernels runs, and how tasks get onto threads.
#include <array>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(__x86_64__)
#define G2R_X86 1
#endif

namespace g2r {

#ifdef G2R_X86
const Kernels& avx512bf16_kernels();
const Kernels& avx512_kernels();
const Kernels& avx2_kernels();
#endif
const Kernels& plain_kernels();

namespace {

struct Table {
    const char* name;
    const Kernels& (*kernels)();
    bool (*runs_here)();  // asks the operating system too: it must save the wide registers
};

#ifdef G2R_X86
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

bool always() { return true; }

constexpr Table kTables[] = {
#ifdef G2R_X86
    {"avx512bf16", avx512bf16_kernels, has_avx512bf16},
    {"avx512", avx512_kernels, has_avx512},
    {"avx2", avx2_kernels, has_avx2},
#endif
    {"plain", plain_kernels, always},
};
constexpr std::size_t kCount = sizeof(kTables) / sizeof(kTables[0]);

int one_thread() { return 1; }

void in_turn(int64_t tasks, void (*task)(void* context, int64_t index), void* context) {
    for (int64_t index = 0; index < tasks; ++index) task(context, index);
}

Pool& current_pool() {
    static Pool pool{one_thread, in_turn};
    return pool;
}

}  // namespace

const Kernels* find_kernels(const char* name) {
    for (const Table& table : kTables) {
        if (std::strcmp(table.name, name) == 0) {
            return table.runs_here() ? &table.kernels() : nullptr;
        }
    }
    return nullptr;
}

const Kernels& best_kernels() {
    const char* asked = std::getenv("G2R_CPU");
    if (asked != nullptr && *asked != '\0') {
        if (const Kernels* kernels = find_kernels(asked)) return *kernels;
        std::string message = "G2R_CPU names no kernels that run on this processor; expected";
        const char* separator = " ";
        for (const Table& table : kTables) {
            if (!table.runs_here()) continue;
            message.append(separator).append(table.name);
            separator = ", ";
        }
        throw std::runtime_error(message + "; got " + asked);
    }
    for (const Table& table : kTables) {
        if (table.runs_here()) return table.kernels();
    }
    return plain_kernels();
}

const char* const* built_kernels() {
    static const auto names = [] {
        std::array<const char*, kCount + 1> all{};
        for (std::size_t i = 0; i < kCount; ++i) all[i] = kTables[i].name;
        return all;
    }();
    return names.data();
}

void out_of_memory(int64_t bytes) {
    throw std::runtime_error("out of memory: " + std::to_string(bytes) + " bytes of scratch");
}

void set_pool(Pool pool) { current_pool() = pool; }

const Pool& pool() { return current_pool(); }

}  // namespace g2r
