// Scales and codes of the quantized formats: what CPU and CUDA kernels compute for one group and one element.
//
// A code type is int8_t, e4m3 or e5m2. Everything is float32, each operation rounded on its own, so the CPU,
// the emulator and the GPU give the same bits.
#pragma once

#include <math.h>

#include "common/philox.h"

NG_NAMESPACE_BEGIN

// `largest` is the code that a group's largest magnitude is scaled to.
template <class Code>
struct Format;
template <>
struct Format<int8_t> {
    static constexpr float largest = 127.0f;
};
template <>
struct Format<e4m3> {
    static constexpr float largest = 448.0f;
    static constexpr int mantissa = 3, bias = 7;
};
template <>
struct Format<e5m2> {
    static constexpr float largest = 57344.0f;
    static constexpr int mantissa = 2, bias = 15;
};

NG_HOST_DEVICE float to_float(int8_t code) { return static_cast<float>(code); }

// The magnitude of a value as an integer: ordered like the magnitudes, with infinity and then NaN on top. Its
// maximum does not depend on the order of evaluation and finds every value that is not finite.
NG_HOST_DEVICE uint32_t magnitude_bits(float x) { return bit_cast<uint32_t>(x) & 0x7fffffffu; }
NG_HOST_DEVICE uint16_t magnitude_bits(bf16 x) { return x.bits & 0x7fffu; }
NG_HOST_DEVICE uint16_t magnitude_bits(f16 x) { return x.bits & 0x7fffu; }

template <class T>
NG_HOST_DEVICE float magnitude_to_float(uint32_t bits) {
    if constexpr (sizeof(T) == 4) {
        return bit_cast<float>(bits);
    } else {
        return to_float(T{static_cast<uint16_t>(bits)});
    }
}

// NaN for a group that holds a NaN or an infinity; 1 where the quotient is 0, so that no code divides by it.
template <class Code>
NG_HOST_DEVICE float scale_of(float amax) {
    const float scale = amax / Format<Code>::largest;
    const bool finite = bit_cast<uint32_t>(amax) < 0x7f800000u;
    return finite ? (scale > 0.0f ? scale : 1.0f) : bit_cast<float>(0x7fc00000u);
}

template <class Code>
NG_HOST_DEVICE float clamp_to(float v) {
    constexpr float largest = Format<Code>::largest;
    v = v == v ? v : 0.0f;  // the scale is NaN
    v = v < -largest ? -largest : v;
    return v > largest ? largest : v;
}

// --- round half to even --------------------------------------------------------------------------

template <class Code>
NG_HOST_DEVICE Code round_nearest(float v) {
    return from_float<Code>(clamp_to<Code>(v));
}

template <>
NG_HOST_DEVICE int8_t round_nearest<int8_t>(float v) {
    // The adder rounds: at 1.5 * 2^23 floats are whole numbers, and the low byte is the code in two's
    // complement.
    return static_cast<int8_t>(bit_cast<uint32_t>(clamp_to<int8_t>(v) + 12582912.0f));
}

// --- stochastic rounding -------------------------------------------------------------------------

// What decides one rounding: a number in [0, 1) for integers, 32 random bits for float formats.
template <class Code>
struct Draw {
    using type = uint32_t;
    static NG_HOST_DEVICE uint32_t of_word(uint32_t word) { return word; }
    static NG_HOST_DEVICE uint32_t of_noise(float noise) { return static_cast<uint32_t>(noise * 0x1p32f); }
};
template <>
struct Draw<int8_t> {
    using type = float;
    static NG_HOST_DEVICE float of_word(uint32_t word) { return uniform(word); }
    static NG_HOST_DEVICE float of_noise(float noise) { return noise; }
};

// The magnitude goes up when the draw is below the dropped bits. The significand stands in 64 bits: what lies
// above the low 32 is kept by the format, the low 32 are dropped. Subnormals round on their own grid.
template <class Code>
NG_HOST_DEVICE Code round_stochastic(float v, uint32_t draw) {
    using F = Format<Code>;
    v = clamp_to<Code>(v);
    const uint32_t magnitude = magnitude_bits(v);
    const int exponent = magnitude < 0x800000u ? 1 : static_cast<int>(magnitude >> 23);
    const uint32_t significand = (magnitude & 0x7fffffu) | (magnitude < 0x800000u ? 0u : 0x800000u);
    const int grid = exponent < 128 - F::bias ? 128 - F::bias : exponent;
    const int distance = grid - exponent + 23 - F::mantissa, dropped = distance < 56 ? distance : 56;
    const uint64_t fixed = (static_cast<uint64_t>(significand) << 32) >> dropped;
    const uint32_t steps =
        static_cast<uint32_t>(fixed >> 32) + (draw < static_cast<uint32_t>(fixed) ? 1u : 0u);
    const float spacing = bit_cast<float>(static_cast<uint32_t>(grid - F::mantissa) << 23);
    const float rounded = static_cast<float>(static_cast<int32_t>(steps)) * spacing;
    return from_float<Code>(
        bit_cast<float>(bit_cast<uint32_t>(rounded) | (bit_cast<uint32_t>(v) & 0x80000000u)));
}

template <class Code>
NG_HOST_DEVICE Code round_stochastic(float v, float u) {
    v = v == v ? v : 0.0f;
    const float below = floorf(v);
    return static_cast<Code>(
        static_cast<int32_t>(clamp_to<Code>(below + (u >= 1.0f - (v - below) ? 1.0f : 0.0f))));
}

NG_NAMESPACE_END
