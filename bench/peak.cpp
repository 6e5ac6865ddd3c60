// The rate of multiply-adds that a loop over registers reaches: no loads, no stores, nothing else.
//
//   peak THREADS RUNS f32|bf16      one GFLOP/s of all threads together per run and line
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

// Enough independent accumulators to cover the latency of any core so far (at most 6 cycles times 4
// a cycle), few enough for the registers there are: 16 with AVX2, 32 with AVX-512 and NEON.
#if defined(__AVX512F__)
constexpr const char* kName = "avx512";
constexpr int kAccumulators = 24, kWidth = 16;
using Vector = __m512;
inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector fill(float value) { return _mm512_set1_ps(value); }
#elif defined(__AVX2__) && defined(__FMA__)
constexpr const char* kName = "avx2";
constexpr int kAccumulators = 12, kWidth = 8;
using Vector = __m256;
inline Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector fill(float value) { return _mm256_set1_ps(value); }
#elif defined(__aarch64__)
constexpr const char* kName = "neon";
constexpr int kAccumulators = 24, kWidth = 4;
using Vector = float32x4_t;
inline Vector fma(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
inline Vector fill(float value) { return vdupq_n_f32(value); }
#else
constexpr const char* kName = "plain";
constexpr int kAccumulators = 12, kWidth = 4;
typedef float Vector __attribute__((vector_size(16)));
inline Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
inline Vector fill(float value) { return Vector{value, value, value, value}; }
#endif

struct Float32 {
    using Operand = Vector;
    using Sum = Vector;
    static constexpr int accumulators = kAccumulators;
    static constexpr double flops = 2.0 * kWidth;
    static const char* name() { return kName; }
    static Operand operand(float value) { return fill(value); }
    static Sum zero() { return fill(0.0f); }
    static Sum step(Operand a, Operand b, Sum sum) { return fma(a, b, sum); }
};

#if defined(__AVX512BF16__)
#define HAS_BFLOAT16
struct Bfloat16 {
    using Operand = __m512bh;
    using Sum = __m512;
    static constexpr int accumulators = 24;
    static constexpr double flops = 4.0 * 16;
    static const char* name() { return "avx512bf16"; }
    static Operand operand(float value) {
        return _mm512_cvtne2ps_pbh(_mm512_set1_ps(value), _mm512_set1_ps(value));
    }
    static Sum zero() { return _mm512_setzero_ps(); }
    static Sum step(Operand a, Operand b, Sum sum) { return _mm512_dpbf16_ps(sum, a, b); }
};
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define HAS_BFLOAT16
struct Bfloat16 {
    using Operand = bfloat16x8_t;
    using Sum = float32x4_t;
    static constexpr int accumulators = 24;
    static constexpr double flops = 4.0 * 4;
    static const char* name() { return "neon bf16"; }
    static Operand operand(float value) {
        return vcombine_bf16(vcvt_bf16_f32(vdupq_n_f32(value)), vcvt_bf16_f32(vdupq_n_f32(value)));
    }
    static Sum zero() { return vdupq_n_f32(0.0f); }
    static Sum step(Operand a, Operand b, Sum sum) { return vbfdotq_f32(sum, a, b); }
};
#endif

#if defined(__AVX512F__)
#define REGISTER "v"
#elif defined(__x86_64__)
#define REGISTER "x"
#elif defined(__aarch64__)
#define REGISTER "w"
#else
#define REGISTER "m"
#endif

template <class Kind>
void loop(int64_t steps) {
    typename Kind::Sum sums[Kind::accumulators];
#pragma GCC unroll 24
    for (int i = 0; i < Kind::accumulators; i++) sums[i] = Kind::zero();
    auto a = Kind::operand(1e-3f), b = Kind::operand(3e-3f);
    for (int64_t step = 0; step < steps; step++) {
#pragma GCC unroll 24
        for (int i = 0; i < Kind::accumulators; i++) {
            sums[i] = Kind::step(a, b, sums[i]);
            asm volatile("" : "+" REGISTER(sums[i]));  // every step is carried out, in a register
        }
    }
}

// Seconds from the first thread's start to the last one's end.
template <class Kind>
double seconds(int threads, int64_t steps) {
    using Clock = std::chrono::steady_clock;
    std::atomic<int> waiting{threads};
    std::vector<Clock::time_point> starts(threads), stops(threads);
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; t++) {
        pool.emplace_back([&, t] {
            waiting--;
            while (waiting > 0) std::this_thread::yield();
            starts[t] = Clock::now();
            loop<Kind>(steps);
            stops[t] = Clock::now();
        });
    }
    for (auto& thread : pool) thread.join();
    Clock::time_point start = starts[0], stop = stops[0];
    for (int t = 1; t < threads; t++) {
        if (starts[t] < start) start = starts[t];
        if (stops[t] > stop) stop = stops[t];
    }
    return std::chrono::duration<double>(stop - start).count();
}

template <class Kind>
int measure(int threads, int runs) {
    int64_t steps = 1 << 16;
    while (seconds<Kind>(threads, steps) < 0.05) steps *= 2;  // which also warms up
    std::printf("%s\n", Kind::name());
    for (int run = 0; run < runs; run++) {
        const double took = seconds<Kind>(threads, steps);
        std::printf("%.1f\n", Kind::flops * Kind::accumulators * steps * threads / took / 1e9);
    }
    return 0;
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 4) return 2;
    const int threads = std::atoi(arguments[1]), runs = std::atoi(arguments[2]);
    if (std::strcmp(arguments[3], "f32") == 0) return measure<Float32>(threads, runs);
#if defined(HAS_BFLOAT16)
    return measure<Bfloat16>(threads, runs);
#else
    return 3;
#endif
}
