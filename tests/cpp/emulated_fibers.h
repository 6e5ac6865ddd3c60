// The threads of a block as fibers: each has a stack of its own and runs until it waits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

// Twenty times as fast as ucontext, which makes two system calls for each switch.
#if defined(__x86_64__) && !defined(G2R_EMULATED_UCONTEXT)
#define G2R_SWITCH 1
#else
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define G2R_EMULATED_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define G2R_EMULATED_ASAN 1
#endif
#endif
#ifdef G2R_EMULATED_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define G2R_UNSEEN __attribute__((no_sanitize_address))
#else
#define G2R_UNSEEN
#endif
// The compiler must not look into a switch of stacks: everything may have changed behind it.
#ifdef __clang__
#define G2R_OPAQUE __attribute__((noinline))
#else
#define G2R_OPAQUE __attribute__((noipa))
#endif

namespace g2r::gpu::emulated {

constexpr int kError = 999;  // of a launch; what it is stands in `message`
constexpr int kLanes = 32;
constexpr std::size_t kStack = std::size_t{1} << 18;
constexpr std::size_t kPage = 4096;
constexpr std::size_t kGuard = 4096;
constexpr unsigned char kGuardByte = 0xa5;

inline std::string message;

// In which order the threads of a block run; `mixed` takes the others in turn, block by block.
enum class Order { ascending, descending, random, mixed };
inline Order order = Order::mixed;

// Since the last reset().
struct Counts {
    long long blocks, products, loads, conflicts, copies, barriers;
    // conflicts: rows of ldmatrix that wait for another row of the same matrix to leave its banks
};
inline Counts counts = {};

enum class Wait {
    none,
    block,
    any_of_block,
    warp,
    any_of_warp,
    product_bf16,
    product_f16,
    matrices,
    transposed,
    shuffle,
    wgmma,
    wgmma_fence,
    wgmma_commit,
    wgmma_wait,
    finished,
    failed
};

inline const char* name_of(Wait wait) {
    switch (wait) {
        case Wait::none:
            return "nothing";
        case Wait::block:
            return "sync_block";
        case Wait::any_of_block:
            return "any_of_block";
        case Wait::warp:
            return "sync_warp";
        case Wait::any_of_warp:
            return "any_of_warp";
        case Wait::product_bf16:
            return "mma_16x8x16<bf16>";
        case Wait::product_f16:
            return "mma_16x8x16<f16>";
        case Wait::matrices:
            return "ldmatrix_x4";
        case Wait::transposed:
            return "ldmatrix_x4_transposed";
        case Wait::shuffle:
            return "a shuffle";
        case Wait::wgmma:
            return "wgmma";
        case Wait::wgmma_fence:
            return "wgmma_fence";
        case Wait::wgmma_commit:
            return "wgmma_commit";
        case Wait::wgmma_wait:
            return "wgmma_wait";
        case Wait::finished:
            return "its end";
        case Wait::failed:
            return "an error";
    }
    return "?";
}

struct Failed {};  // thrown in a thread that has told why

struct Copy {
    void* to;
    unsigned char bytes[16];
    long long group;
};

struct Fiber {
    int index = 0;
    Wait wait = Wait::none;
    void* argument = nullptr;  // of the collective it waits at
    long long group = 0;       // of its copies, the one still open
    std::vector<Copy> copies;
    char* stack = nullptr;
#ifdef G2R_SWITCH
    void* pointer = nullptr;
#else
    ucontext_t context;
#endif
    void* fake_stack = nullptr;
};

// Where a switch of stacks goes back to.
struct Scheduler {
#ifdef G2R_SWITCH
    void* pointer = nullptr;
#else
    ucontext_t context;
#endif
    const void* bottom = nullptr;
    std::size_t size = 0;
};

struct Block {
    int x = 0, y = 0, z = 0;
    int threads = 0;
    char* shared = nullptr;
    std::size_t shared_bytes = 0;
    std::vector<Fiber> fibers;
    std::vector<int> arrived;  // of each warp, at its collective; one more at the end: the block's
    Scheduler scheduler;
    void (*call)(void*) = nullptr;
    void* closure = nullptr;
    bool failed = false;
};

inline Block* block = nullptr;
inline Fiber* running = nullptr;

#ifdef G2R_SWITCH
// Saves what a function keeps for its caller, takes the other stack, goes on there.
G2R_OPAQUE __attribute__((naked)) inline void switch_stack(void** /*from*/, void* /*to*/) {
    asm volatile(
        "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

G2R_UNSEEN inline void to_scheduler(bool for_good) {
    Fiber& fiber = *running;
    (void)for_good;
#ifdef G2R_EMULATED_ASAN
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, block->scheduler.bottom,
                                   block->scheduler.size);
#endif
#ifdef G2R_SWITCH
    switch_stack(&fiber.pointer, block->scheduler.pointer);
#else
    swapcontext(&fiber.context, &block->scheduler.context);
#endif
#ifdef G2R_EMULATED_ASAN
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &block->scheduler.bottom,
                                    &block->scheduler.size);
#endif
}

G2R_UNSEEN inline void to_fiber(Fiber& fiber) {
    running = &fiber;
#ifdef G2R_EMULATED_ASAN
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, kStack);
#endif
#ifdef G2R_SWITCH
    switch_stack(&block->scheduler.pointer, fiber.pointer);
#else
    swapcontext(&block->scheduler.context, &fiber.context);
#endif
#ifdef G2R_EMULATED_ASAN
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
    running = nullptr;
}

inline void end_thread();  // in emulated_warpgroup.h

G2R_UNSEEN inline void entry() {
#ifdef G2R_EMULATED_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &block->scheduler.bottom, &block->scheduler.size);
#endif
    try {
        block->call(block->closure);
        end_thread();
        running->wait = Wait::finished;
    } catch (const Failed&) {
        running->wait = Wait::failed;
    }
    to_scheduler(true);
    __builtin_trap();
}

G2R_UNSEEN inline void prepare(Fiber& fiber) {
    fiber.wait = Wait::none;
    fiber.group = 0;
    fiber.copies.clear();
#ifdef G2R_SWITCH
    auto* top = reinterpret_cast<void**>(fiber.stack + kStack);
    for (int i = 1; i <= 8; ++i) top[-i] = nullptr;
    top[-2] = reinterpret_cast<void*>(&entry);  // what `ret` finds behind six registers
    fiber.pointer = top - 8;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
#endif
}

}  // namespace g2r::gpu::emulated
