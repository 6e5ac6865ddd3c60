// Buffers that end where they are said to, and what the tests of the kernels fill them with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kernels.h"

namespace kernels_test {

using g2r::Dtype;

inline std::mt19937 generator(1);
inline int failures = 0;

inline void check(bool fine, const char* what, const char* where) {
    if (fine) return;
    std::fprintf(stderr, "FAILED: %s in %s\n", what, where);
    ++failures;
}

inline int64_t draw(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

// Memory on the heap that ends where its last element does, filled with NaN.
template <class T>
class Buffer {
 public:
    explicit Buffer(int64_t size) : size_(size), data_(new T[static_cast<size_t>(size)]) {
        std::memset(data_.get(), 0xff, sizeof(T) * static_cast<size_t>(size));
    }
    T* get() const { return data_.get(); }
    T& operator[](int64_t i) const { return data_[static_cast<size_t>(i)]; }
    int64_t size() const { return size_; }

 private:
    int64_t size_;
    std::unique_ptr<T[]> data_;
};

// Values in the model's dtype; those used here are exact in bfloat16.
class Stored {
 public:
    Stored(Dtype dtype, int64_t size)
        : dtype_(dtype), size_(size), bytes_(size * (dtype == Dtype::f32 ? 4 : 2)) {}
    void* get() const { return bytes_.get(); }
    int64_t size() const { return size_; }
    void set(int64_t i, float value) const {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        if (dtype_ == Dtype::f32) {
            std::memcpy(bytes_.get() + 4 * i, &bits, 4);
        } else {
            const auto half = static_cast<uint16_t>(bits >> 16);
            std::memcpy(bytes_.get() + 2 * i, &half, 2);
        }
    }
    float operator[](int64_t i) const {
        uint32_t bits = 0;
        if (dtype_ == Dtype::f32) {
            std::memcpy(&bits, bytes_.get() + 4 * i, 4);
        } else {
            uint16_t half;
            std::memcpy(&half, bytes_.get() + 2 * i, 2);
            bits = static_cast<uint32_t>(half) << 16;
        }
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }

 private:
    Dtype dtype_;
    int64_t size_;
    Buffer<unsigned char> bytes_;
};

inline void put(const Stored& values, int64_t i, float value) { values.set(i, value); }
inline void put(const Buffer<float>& values, int64_t i, float value) { values[i] = value; }

template <class Values>
void integers(const Values& values, int64_t most) {
    for (int64_t i = 0; i < values.size(); ++i)
        put(values, i, static_cast<float>(draw(-most, most)));
}

template <class Values>
void constant(const Values& values, float value) {
    for (int64_t i = 0; i < values.size(); ++i) put(values, i, value);
}

// At most `entries` entries of ±1 in every row: products stay small enough for bfloat16.
inline void sparse(const Stored& weight, int64_t rows, int64_t width, int entries) {
    constant(weight, 0.0f);
    for (int64_t r = 0; r < rows; ++r)
        for (int e = 0; e < entries; ++e)
            weight.set(r * width + draw(0, width - 1), draw(0, 1) ? 1.0f : -1.0f);
}

template <class Values>
bool finite(const Values& values) {
    for (int64_t i = 0; i < values.size(); ++i)
        if (!std::isfinite(values[i])) return false;
    return true;
}

inline g2r::Linear linear_of(const Stored& weight, const Stored* bias, int64_t out, int64_t in) {
    g2r::Linear linear;
    linear.weight = weight.get();
    linear.bias = bias != nullptr ? bias->get() : nullptr;
    linear.out = out;
    linear.in = in;
    return linear;
}

struct Sizes {
    int64_t hidden, heads, kv_heads, head_dim, width;
};

}  // namespace kernels_test
