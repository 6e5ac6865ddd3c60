// bfloat16 and float16, rounded to the nearest, ties to even, as a GPU rounds.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace g2r::gpu {

struct bf16 {
    std::uint16_t bits;
};
struct f16 {
    std::uint16_t bits;
};
namespace emulated {

inline float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline std::uint16_t to_bf16(float value) {
    const std::uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline std::uint16_t to_f16(float value) {
    const std::uint32_t bits = bits_of(value);
    const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
    const std::uint32_t size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return 0x7fff;
    if (size >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // from 65520 on
    // Below 2 ** -14 the distance of neighbours is 2 ** -24: adding 0.5 rounds a float to that.
    if (size < 0x38800000u)
        return static_cast<std::uint16_t>(sign | (bits_of(float_of(size) + 0.5f) - 0x3f000000u));
    const std::uint32_t rounded = size + 0xfffu + ((size >> 13) & 1u);
    return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

inline float from_f16(std::uint16_t half) {
    static const std::vector<float> table = [] {
        std::vector<float> values(65536);
        for (std::uint32_t i = 0; i < 65536; ++i) {
            const int exponent = static_cast<int>((i >> 10) & 31u);
            const auto fraction = static_cast<float>(i & 1023u);
            float size = exponent == 0 ? std::ldexp(fraction, -24)
                                       : std::ldexp(1024.0f + fraction, exponent - 25);
            if (exponent == 31)
                size = (i & 1023u) != 0 ? float_of(0x7fc00000u) : float_of(0x7f800000u);
            values[i] = (i & 0x8000u) != 0 ? -size : size;
        }
        return values;
    }();
    return table[half];
}

template <class T>
float widen(std::uint16_t bits) {
    if constexpr (std::is_same_v<T, bf16>) {
        return float_of(static_cast<std::uint32_t>(bits) << 16);
    } else {
        return from_f16(bits);
    }
}

}  // namespace emulated
}  // namespace g2r::gpu
