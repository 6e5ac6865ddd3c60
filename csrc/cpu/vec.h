// Vectors of one instruction set, in the compiler's own vector types.
//
// Included once per instruction set, with G2R_NS (its namespace), G2R_WIDTH (floats per register),
// G2R_VECTORS (registers per row of a product's tile) and G2R_BF16 (products of bfloat16 pairs)
// defined. Nothing here or in the headers above it may instantiate a template or inline function
// of the standard library: the linker could keep the copy that only a newer processor can run.
#pragma once

#include <stdlib.h>

#include <cstdint>
#include <cstring>

#if G2R_WIDTH >= 8
#include <immintrin.h>
#endif

#include "kernels.h"

#define G2R_INLINE inline __attribute__((always_inline))

namespace g2r::G2R_NS {

using i64 = int64_t;

constexpr int kWidth = G2R_WIDTH;

typedef float vf __attribute__((vector_size(kWidth * 4)));
typedef int32_t vi __attribute__((vector_size(kWidth * 4)));
typedef uint32_t vu __attribute__((vector_size(kWidth * 4)));
typedef uint16_t vh __attribute__((vector_size(kWidth * 2)));

struct bf16 {
    uint16_t bits;
};

template <class T>
G2R_INLINE T smaller(T a, T b) {
    return b < a ? b : a;
}

template <class T>
G2R_INLINE T larger(T a, T b) {
    return a < b ? b : a;
}

G2R_INLINE i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
G2R_INLINE i64 round_up(i64 a, i64 b) { return ceil_div(a, b) * b; }

G2R_INLINE vf splat(float x) { return x - vf{}; }

template <class To, class From>
G2R_INLINE To bit_cast(From x) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To y;
    std::memcpy(&y, &x, sizeof(y));
    return y;
}

G2R_INLINE vf load(const float* p) {
    vf v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}

G2R_INLINE vf load(const bf16* p) {
    vh h;
    std::memcpy(&h, p, sizeof(h));
    return bit_cast<vf>(__builtin_convertvector(h, vu) << 16);
}

G2R_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof(v)); }

// To nearest even; NaN stays NaN.
G2R_INLINE void store(bf16* p, vf v) {
#if G2R_BF16
    const __m256bh h = _mm512_cvtneps_pbh(v);
    std::memcpy(p, &h, sizeof(h));
#else
    vu bits = bit_cast<vu>(v);
    bits += 0x7fff + ((bits >> 16) & 1);
    const vi nan = v != v;
    bits = (bits & ~bit_cast<vu>(nan)) | (bit_cast<vu>(nan) & 0x7fc00000u);
    const vh h = __builtin_convertvector(bits >> 16, vh);
    std::memcpy(p, &h, sizeof(h));
#endif
}

G2R_INLINE float widen(float x) { return x; }
G2R_INLINE float widen(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

template <class T>
G2R_INLINE T narrow(float x);
template <>
G2R_INLINE float narrow<float>(float x) {
    return x;
}
template <>
G2R_INLINE bf16 narrow<bf16>(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    if (x != x) return bf16{0x7fc0};
    return bf16{uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <class T, class S>
G2R_INLINE T convert(S x) {
    if constexpr (sizeof(T) == sizeof(S)) {
        return x;
    } else {
        return narrow<T>(widen(x));
    }
}

// Two vectors as pairs of neighbours along k, (even, odd) in every lane; null: zeros.
G2R_INLINE vu halves_of(const bf16* p) {
    vh h = {};
    if (p != nullptr) std::memcpy(&h, p, sizeof(h));
    return __builtin_convertvector(h, vu);
}

G2R_INLINE vu halves_of(const float* p) {
    bf16 rounded[kWidth] = {};
    if (p != nullptr) store(rounded, load(p));
    return halves_of(rounded);
}

template <class S>
G2R_INLINE void store_pairs(bf16* out, const S* even, const S* odd) {
    const vu pairs = halves_of(even) | (halves_of(odd) << 16);
    std::memcpy(out, &pairs, sizeof(pairs));
}

// The sum of the lanes, by halves.
G2R_INLINE float sum(vf v) {
    float x[kWidth];
    std::memcpy(x, &v, sizeof(v));
    for (int step = kWidth / 2; step > 0; step /= 2)
        for (int i = 0; i < step; i++) x[i] += x[i + step];
    return x[0];
}

G2R_INLINE float largest(vf v) {
    float x[kWidth];
    std::memcpy(x, &v, sizeof(v));
    for (int step = kWidth / 2; step > 0; step /= 2)
        for (int i = 0; i < step; i++) x[i] = larger(x[i], x[i + step]);
    return x[0];
}

// a * b + c, rounded once wherever the instruction set can. Said in so many words, as a compiler
// may round twice where it finds that faster (GCC 13 does, in a tile of one row): a row's sums must
// not depend on how many rows there are.
G2R_INLINE vf multiply_add(vf a, vf b, vf c) {
#if G2R_WIDTH == 16
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif G2R_WIDTH == 8
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

G2R_INLINE vf choose(vi where, vf yes, vf no) { return where ? yes : no; }

G2R_INLINE vf maximum(vf a, vf b) { return a > b ? a : b; }

// exp to about one unit in the last place; results below the smallest normal number may be 0.
G2R_INLINE vf exp(vf x) {
    const vf low = splat(-104.0f), high = splat(89.0f);
#if G2R_WIDTH == 16
    const vf clamped = _mm512_min_ps(high, _mm512_max_ps(low, x));  // NaN comes through
    const vf n = _mm512_roundscale_ps(clamped * 1.44269504088896341f, 0);
#else
    const vi under = x<low, over = x> high;
    const vf clamped = choose(under, low, choose(over, high, x));
    // To the nearest whole number by adding and taking away 1.5 * 2^23.
    const vf shift = splat(12582912.0f);
    const vf shifted = clamped * 1.44269504088896341f + shift;
    const vf n = shifted - shift;
#endif
    vf r = clamped - n * 0.693145751953125f;  // ln 2, its leading bits
    r = r - n * 1.42860682030941723e-6f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
#if G2R_WIDTH == 16
    return _mm512_scalef_ps(p, n);
#else
    // 2^n in two factors: one alone could leave the range of normal numbers.
    const vi whole = bit_cast<vi>(shifted) - bit_cast<vi>(shift);
    const vi half = whole >> 1;
    const vf scaled =
        p * bit_cast<vf>((half + 127) << 23) * bit_cast<vf>((whole - half + 127) << 23);
    return choose(under, vf{}, choose(over, splat(__builtin_inff()), scaled));
#endif
}

// A thread's memory for the calls to come: fresh pages from the system would cost as much as some
// of the work done in them. Grown to what was once needed, up to a limit, while nothing is in use.
class Arena {
 public:
    Arena() = default;
    ~Arena() { __builtin_free(base_); }
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    // Null where it does not fit. Taken and given back as a stack.
    char* take(i64 bytes) {
        needed_ += bytes;
        most_ = larger(most_, needed_);
        if (needed_ == bytes && most_ > size_ && most_ <= kLimit) {
            __builtin_free(base_);
            base_ = static_cast<char*>(__builtin_malloc(size_t(most_)));
            size_ = base_ == nullptr ? 0 : most_;
        }
        if (used_ + bytes > size_) return nullptr;
        used_ += bytes;
        return base_ + used_ - bytes;
    }
    void give_back(i64 bytes, bool was_taken) {
        needed_ -= bytes;
        if (was_taken) used_ -= bytes;
    }

 private:
    static constexpr i64 kLimit = i64(64) << 20;
    char* base_ = nullptr;
    i64 size_ = 0, used_ = 0, needed_ = 0, most_ = 0;
};

inline Arena& arena() {
    static thread_local Arena mine;
    return mine;
}

// Memory of one call, aligned to a cache line and not initialised.
class Scratch {
 public:
    explicit Scratch(i64 bytes) : bytes_(round_up(bytes, kLine) + kLine) {
#if G2R_EXACT_SCRATCH  // not one byte more, for tests that look for overruns
        void* exact = nullptr;
        if (posix_memalign(&exact, kLine, size_t(larger<i64>(bytes, 1))) == 0)
            data_ = static_cast<char*>(exact);
#else
        data_ = arena().take(bytes_);
        taken_ = data_ != nullptr;
        if (!taken_) data_ = static_cast<char*>(__builtin_malloc(size_t(bytes_)));
#endif
        if (data_ != nullptr) return;
#if !G2R_EXACT_SCRATCH
        arena().give_back(bytes_, false);
#endif
        out_of_memory(bytes);
    }
    ~Scratch() {
        if (!taken_) __builtin_free(data_);
#if !G2R_EXACT_SCRATCH
        arena().give_back(bytes_, taken_);
#endif
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    template <class T>
    T* as() const {
        const uintptr_t at = reinterpret_cast<uintptr_t>(data_);
        return reinterpret_cast<T*>((at + kLine - 1) / kLine * kLine);
    }

 private:
    static constexpr i64 kLine = 64;
    char* data_ = nullptr;
    i64 bytes_;
    bool taken_ = false;
};

template <class T>
class Array : public Scratch {
 public:
    explicit Array(i64 count) : Scratch(count * i64(sizeof(T))), count_(count) {}
    T* data() const { return as<T>(); }
    operator T*() const { return data(); }
    i64 size() const { return count_; }

 private:
    i64 count_;
};

// While one of these lives, its thread shares no work with others.
inline bool& is_alone() {
    static thread_local bool alone = false;
    return alone;
}

class Alone {
 public:
    Alone() : before_(is_alone()) { is_alone() = true; }
    ~Alone() { is_alone() = before_; }
    Alone(const Alone&) = delete;
    Alone& operator=(const Alone&) = delete;

 private:
    bool before_;
};

// body(index) for every index below `tasks`, on the pool; what the tasks write must be disjoint.
template <class Body>
void parallel(i64 tasks, const Body& body) {
    if (tasks <= 1 || is_alone()) {
        for (i64 index = 0; index < tasks; index++) body(index);
    } else {
        pool().run(
            tasks,
            [](void* context, int64_t index) { (*static_cast<const Body*>(context))(index); },
            const_cast<Body*>(&body));
    }
}

}  // namespace g2r::G2R_NS
