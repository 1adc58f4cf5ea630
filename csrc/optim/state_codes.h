// One element of each state format that is computed, the same arithmetic on the CPU and on the GPU. (The
// 8-bit map is in dynamic_map.h.)
//
// A codec has `Stored`, the type of the stored scales, `columns` of them per block; `Decoder` and `Encoder`,
// what the elements of a block share; and `limit`: a block whose largest magnitude, as an integer, is not
// below it is stored as scale NaN and codes 0, so the functions here never see NaN or infinity while
// encoding.
#pragma once

#include <math.h>

#include "optim/state_format.h"

NG_NAMESPACE_BEGIN

constexpr int32_t infinity_bits = 0x7f800000;

NG_HOST_DEVICE float at_least(float x, float low) { return x > low ? x : low; }

// Towards minus infinity; floorf does not vectorise without SSE4.1. For |x| < 2^31.
NG_HOST_DEVICE int32_t floor_to_int(float x) {
    const int32_t toward_zero = static_cast<int32_t>(x);
    return toward_zero - (static_cast<float>(toward_zero) > x ? 1 : 0);
}

template <StateFormat, bool Signed>
struct StateCodec;

// --- int4: a map of 16 values -----------------------------------------------------------------------

struct FourBitMap {
    float values[16];
};
// The signed map, made like the 8-bit one but with three decades.
constexpr FourBitMap four_bit_map{{-0x1.c66666p-1f, -0x1.533334p-1f, -0x1.cp-2f, -0x1.b33332p-3f,
                                   -0x1.3d70a4p-4f, -0x1.0a3d72p-5f, -0x1.6872b0p-8f, 0.0f, 0x1.6872b0p-8f,
                                   0x1.0a3d72p-5f, 0x1.3d70a4p-4f, 0x1.b33332p-3f, 0x1.cp-2f, 0x1.533334p-1f,
                                   0x1.c66666p-1f, 1.0f}};

template <bool Signed>
struct StateCodec<StateFormat::int4, Signed> {
    using Stored = float;
    static constexpr int block = 128, columns = 1;
    static constexpr int32_t limit = infinity_bits;
    static constexpr bool needs_smallest = false;
    struct Encoder {
        float divisor;
    };

    static NG_HOST_DEVICE Encoder encoder(float largest, float, Stored* stored) {
        stored[0] = largest;
        return {at_least(largest, 1e-12f)};
    }

    static NG_HOST_DEVICE uint32_t encode(float x, Encoder encoder) {
        const float u = x / encoder.divisor;
        if constexpr (Signed) {
            // Counts where the next codes begin: at the smallest floats that are not below the midpoints.
            return static_cast<uint32_t>(
                (u >= -0x1.8ccccc0p-1f) + (u >= -0x1.19999a0p-1f) + (u >= -0x1.4ccccc0p-2f) +
                (u >= -0x1.28f5c20p-3f) + (u >= -0x1.c28f5c0p-5f) + (u >= -0x1.374bc80p-6f) +
                (u >= -0x1.6872b00p-9f) + (u >= 0x1.6872b00p-9f) + (u >= 0x1.374bc80p-6f) +
                (u >= 0x1.c28f5e0p-5f) + (u >= 0x1.28f5c20p-3f) + (u >= 0x1.4cccce0p-2f) +
                (u >= 0x1.19999a0p-1f) + (u >= 0x1.8cccce0p-1f) + (u >= 0x1.e333340p-1f));
        } else {
            const int32_t above = static_cast<int32_t>(at_least(u * 16.0f, 0.0f) + 0.5f) - 1;
            return static_cast<uint32_t>(above > 0 ? above : 0);
        }
    }
};

// --- fp8: E4M3, the largest magnitude at 448 ----------------------------------------------------------

template <bool Signed>
struct StateCodec<StateFormat::fp8, Signed> {
    using Stored = float;
    static constexpr int block = 256, columns = 1;
    static constexpr int32_t limit = infinity_bits;
    static constexpr bool needs_smallest = false;
    struct Decoder {
        float scale;
    };
    struct Encoder {
        float divisor;
    };

    static NG_HOST_DEVICE Decoder decoder(const Stored* stored) { return {stored[0]}; }
    static NG_HOST_DEVICE Encoder encoder(float largest, float, Stored* stored) {
        stored[0] = largest / 448.0f;
        return {at_least(largest, 1e-12f) / 448.0f};
    }
    static NG_HOST_DEVICE float decode(uint8_t code, Decoder decoder) {
        return to_float(e4m3{code}) * decoder.scale;
    }
    static NG_HOST_DEVICE uint32_t encode(float x, Encoder encoder) {
        return from_float<e4m3>(x / encoder.divisor).bits;
    }
};

// --- int8_companded: FlashOptim (arXiv 2602.23349) ------------------------------------------------------

// First moments: y = 2 n / (1 + |n|) of n = x / largest, in steps of 1/127.
template <>
struct StateCodec<StateFormat::int8_companded, true> {
    using Stored = f16;
    static constexpr int block = 32, columns = 1;
    static constexpr int32_t limit = 0x477ff000;  // 65520 rounds to infinity in float16
    static constexpr bool needs_smallest = false;
    struct Decoder {
        float scale;
    };
    struct Encoder {
        float divisor;
    };

    static NG_HOST_DEVICE Decoder decoder(const Stored* stored) { return {to_float(stored[0])}; }
    static NG_HOST_DEVICE Encoder encoder(float largest, float, Stored* stored) {
        stored[0] = from_float<f16>(largest);
        return {at_least(largest, 1e-12f)};
    }
    static NG_HOST_DEVICE float decode(uint8_t code, Decoder decoder) {
        const float y = static_cast<float>(static_cast<int8_t>(code));
        return y / (254.0f - (y < 0.0f ? -y : y)) * decoder.scale;  // y / 127 undone: n = y / (2 - |y|)
    }
    static NG_HOST_DEVICE uint32_t encode(float x, Encoder encoder) {
        const float n = x / encoder.divisor;
        return static_cast<uint32_t>(floor_to_int(127.0f * (2.0f * n / (1.0f + (n < 0.0f ? -n : n))) + 0.5f));
    }
};

// Second moments: square roots in steps of 1/255.
template <>
struct StateCodec<StateFormat::int8_companded, false> {
    using Stored = f16;
    static constexpr int block = 32, columns = 1;
    static constexpr int32_t limit = 0x4f7fe001;  // the square of 65520
    static constexpr bool needs_smallest = false;
    struct Decoder {
        float scale;
    };
    struct Encoder {
        float divisor;
    };

    static NG_HOST_DEVICE Decoder decoder(const Stored* stored) { return {to_float(stored[0])}; }
    static NG_HOST_DEVICE Encoder encoder(float largest, float, Stored* stored) {
        const float root = sqrtf(largest);
        stored[0] = from_float<f16>(root);
        return {at_least(root, 1e-12f)};
    }
    static NG_HOST_DEVICE float decode(uint8_t code, Decoder decoder) {
        const float root = static_cast<float>(static_cast<int32_t>(code)) / 255.0f * decoder.scale;
        return root * root;
    }
    static NG_HOST_DEVICE uint32_t encode(float x, Encoder encoder) {
        const float root = sqrtf(at_least(x, 0.0f));
        return static_cast<uint32_t>(static_cast<int32_t>(255.0f * (root / encoder.divisor) + 0.5f));
    }
};

// --- fp8_expanded: COAT (arXiv 2410.19313) --------------------------------------------------------------

// x^(high + low) for normal x > 0; 0 where it is below 2^-126. `high` has at most 12 significant bits, so its
// product with the exponent of x is exact, and the error is that of a logarithm near 0: about 1e-7.
NG_HOST_DEVICE float positive_power(float x, float high, float low) {
    const int32_t bits = bit_cast<int32_t>(x), exponent = (bits - 0x3f3504f3) >> 23;  // split at sqrt(1/2)
    const float e = static_cast<float>(exponent);
    const float m = bit_cast<float>(
        static_cast<int32_t>(static_cast<uint32_t>(bits) - (static_cast<uint32_t>(exponent) << 23)));
#if defined(__CUDA_ARCH__)
    const float log2_m = log2f(m);
#else
    // log2(m) = s q(s^2), s = (m - 1) / (m + 1): minimax in relative error, 7e-10.
    const float s = (m - 1.0f) / (m + 1.0f), z = s * s;
    const float log2_m =
        (((0x1.ba233ap-2f * z + 0x1.2746e8p-1f) * z + 0x1.ec70e6p-1f) * z + 0x1.715476p+1f) * s;
#endif
    const float whole = e * high, rest = e * low + (high + low) * log2_m, sum = whole + rest;
    constexpr float to_integer = 0x1.8p23f;  // adding it rounds to an integer, kept in the low bits
    const float n = (sum + to_integer) - to_integer, f = (whole - n) + rest;
#if defined(__CUDA_ARCH__)
    const float fraction = exp2f(f);
#else
    // 2^f = 1 + f r(f) for |f| < 0.501: minimax in relative error, 4e-9.
    const float r =
        ((((0x1.446de8p-13f * f + 0x1.5f0a22p-10f) * f + 0x1.3b29e2p-7f) * f + 0x1.c6af6ap-5f) * f +
         0x1.ebfbe0p-3f) *
            f +
        0x1.62e430p-1f;
    const float fraction = r * f + 1.0f;
#endif
    const uint32_t shift = bit_cast<uint32_t>(n + to_integer) << 23;
    const float power = bit_cast<float>(bit_cast<uint32_t>(fraction) + shift);
    return sum < -126.0f ? 0.0f : power;
}

// The exponent that spreads a group over E4M3, in sixteenths: floor(16 log2(448^2 / 2) / log2(range)) / 16.
// Where float32 cannot tell which side of a whole number it is on, float64 decides, as in codec.py.
NG_HOST_DEVICE float expansion(float range) {
    constexpr double fills_e4m3 = 0x1.09d5d9fd5010bp+8;
    float steps = static_cast<float>(fills_e4m3) / log2f(range);
    const float distance = steps - floorf(steps + 0.5f);
    if (steps < 257.0f && distance > -1e-3f && distance < 1e-3f)
        steps = static_cast<float>(floor(fills_e4m3 / log2(static_cast<double>(range))));
    steps = steps < 256.0f ? floorf(steps) : 256.0f;  // infinite where all are equal
    return at_least(steps, 1.0f) / 16.0f;
}

template <bool Signed>
struct StateCodec<StateFormat::fp8_expanded, Signed> {
    using Stored = float;
    static constexpr int block = 128, columns = 3;  // scale, exponent, center
    static constexpr int32_t limit = infinity_bits;
    static constexpr bool needs_smallest = true;
    struct Decoder {
        float scale, high, low, center;  // 1 / exponent in two parts
    };
    struct Encoder {
        float scale, exponent, center;
    };

    static NG_HOST_DEVICE Decoder decoder(const Stored* stored) {
        const float exponent = stored[1], inverse = 1.0f / exponent;
        const float high = bit_cast<float>(bit_cast<uint32_t>(inverse) & 0xfffff000u);
        return {stored[0], high, (1.0f - high * exponent) / exponent, stored[2]};
    }

    // `smallest` is that of the magnitudes above 0.
    static NG_HOST_DEVICE Encoder encoder(float largest, float smallest, Stored* stored) {
        const float top = largest + 1e-30f, bottom = smallest + 1e-30f;
        const float center = sqrtf(top) * sqrtf(bottom), exponent = expansion(top / bottom);
        const float scale = positive_power(top / center, exponent, 0.0f) / 448.0f;
        const bool empty = largest == 0.0f;
        stored[0] = empty ? 0.0f : scale;
        stored[1] = empty ? 0.0f : exponent;
        stored[2] = empty ? 0.0f : center;
        return {scale, exponent, center};
    }

    static NG_HOST_DEVICE float decode(uint8_t code, const Decoder& decoder) {
        const float y = to_float(e4m3{static_cast<uint8_t>(code & 0x7fu)}) * decoder.scale;
        const float magnitude = positive_power(y, decoder.high, decoder.low) * decoder.center;
        const uint32_t sign = (code & 0x80u) << 24;
        return y == 0.0f ? 0.0f : bit_cast<float>(bit_cast<uint32_t>(magnitude) | sign);
    }

    static NG_HOST_DEVICE uint32_t encode(float x, const Encoder& encoder) {
        const uint32_t bits = bit_cast<uint32_t>(x);
        const float magnitude = bit_cast<float>(bits & 0x7fffffffu);
        const float y =
            positive_power(at_least(magnitude / encoder.center, 0x1p-126f), encoder.exponent, 0.0f);
        const uint32_t code = from_float<e4m3>(y / encoder.scale).bits | (bits >> 24 & 0x80u);
        return magnitude == 0.0f ? 0u : code;
    }
};

NG_NAMESPACE_END
