// Element types: the run-time tag `DType`, and the narrow storage types with their conversions.
//
// The conversions are branch-free bit manipulation, so that compilers vectorise them, and give the same bits
// on the host and on every GPU: round half to even, NaN stays NaN, the fp8 types saturate at their largest
// finite value.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/config.h"

namespace narrowgauge {

enum class DType : int32_t {
    float32,
    float64,
    bfloat16,
    float16,
    int8,
    uint8,
    int64,
    int32,
    e4m3,
    e5m2,
    int16,
    boolean
};

inline int64_t size_of(DType dtype) {
    switch (dtype) {
        case DType::float64:
        case DType::int64:
            return 8;
        case DType::float32:
        case DType::int32:
            return 4;
        case DType::bfloat16:
        case DType::float16:
        case DType::int16:
            return 2;
        default:
            return 1;
    }
}

inline const char* name_of(DType dtype) {
    constexpr const char* names[] = {"float32", "float64", "bfloat16",      "float16",     "int8",  "uint8",
                                     "int64",   "int32",   "float8_e4m3fn", "float8_e5m2", "int16", "bool"};
    return names[static_cast<int>(dtype)];
}

}  // namespace narrowgauge

NG_NAMESPACE_BEGIN

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};
struct e4m3 {
    uint8_t bits;
};
struct e5m2 {
    uint8_t bits;
};

template <class To, class From>
NG_HOST_DEVICE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

// --- to float: exact -----------------------------------------------------------------------------

NG_HOST_DEVICE float to_float(float x) { return x; }
NG_HOST_DEVICE float to_float(double x) { return static_cast<float>(x); }
NG_HOST_DEVICE float to_float(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

NG_HOST_DEVICE float to_float(f16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
    const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
    const uint32_t rebias =
        magnitude >= 0x7c00u ? 224u << 23 : 112u << 23;  // infinity and NaN move to exponent 255
    const uint32_t normal = (magnitude << 13) + rebias;
    return bit_cast<float>(sign | (magnitude < 0x0400u ? bit_cast<uint32_t>(subnormal) : normal));
}

NG_HOST_DEVICE float to_float(e5m2 x) { return to_float(f16{static_cast<uint16_t>(x.bits << 8)}); }

NG_HOST_DEVICE float to_float(e4m3 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x80u) << 24, magnitude = x.bits & 0x7fu;
    const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-9f;
    uint32_t bits = magnitude < 8u ? bit_cast<uint32_t>(subnormal) : (magnitude << 20) + (120u << 23);
    bits = magnitude == 0x7fu ? 0x7fc00000u : bits;
    return bit_cast<float>(sign | bits);
}

// --- from float: round half to even --------------------------------------------------------------

template <class T>
NG_HOST_DEVICE T from_float(float x);

template <>
NG_HOST_DEVICE float from_float<float>(float x) {
    return x;
}

template <>
NG_HOST_DEVICE double from_float<double>(float x) {
    return static_cast<double>(x);
}

template <>
NG_HOST_DEVICE bf16 from_float<bf16>(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return {static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : rounded)};
}

// The steps every small float format shares: `Drop` mantissa bits are rounded away, exponents move by
// `Rebias`, and below `MinNormal` adding `Magic` lets the adder itself round to the format's subnormal grid.
template <int Drop, uint32_t Rebias, uint32_t MinNormal>
NG_HOST_DEVICE uint32_t round_magnitude(uint32_t magnitude, float magic) {
    const uint32_t normal = ((magnitude + ((1u << (Drop - 1)) - 1u) + ((magnitude >> Drop) & 1u)) >> Drop) -
                            (Rebias << (23 - Drop));
    const uint32_t subnormal =
        bit_cast<uint32_t>(bit_cast<float>(magnitude) + magic) - bit_cast<uint32_t>(magic);
    return magnitude < MinNormal ? subnormal : normal;
}

template <>
NG_HOST_DEVICE f16 from_float<f16>(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
    uint32_t code = round_magnitude<13, 112, 0x38800000u>(magnitude, 0.5f);
    code = magnitude >= 0x477ff000u ? 0x7c00u : code;  // 65520 and above round to infinity
    code = magnitude > 0x7f800000u ? 0x7e00u : code;
    return {static_cast<uint16_t>(code | ((bits >> 16) & 0x8000u))};
}

template <>
NG_HOST_DEVICE e4m3 from_float<e4m3>(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
    const uint32_t finite = magnitude < 0x43e00000u ? magnitude : 0x43e00000u;  // 448
    uint32_t code = round_magnitude<20, 120, 0x3c800000u>(finite, 16384.0f);
    code = magnitude > 0x7f800000u ? 0x7fu : code;
    return {static_cast<uint8_t>(code | ((bits >> 24) & 0x80u))};
}

template <>
NG_HOST_DEVICE e5m2 from_float<e5m2>(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
    const uint32_t finite = magnitude < 0x47600000u ? magnitude : 0x47600000u;  // 57344
    uint32_t code = round_magnitude<21, 112, 0x38800000u>(finite, 128.0f);
    code = magnitude > 0x7f800000u ? 0x7fu : code;
    return {static_cast<uint8_t>(code | ((bits >> 24) & 0x80u))};
}

// The type in which `T` is computed: float, or double for double.
template <class T>
struct Compute {
    using type = float;
};
template <>
struct Compute<double> {
    using type = double;
};
template <class T>
using compute_t = typename Compute<T>::type;

template <class T>
NG_HOST_DEVICE compute_t<T> to_compute(T x) {
    return to_float(x);
}
template <>
NG_HOST_DEVICE double to_compute<double>(double x) {
    return x;
}

template <class T>
NG_HOST_DEVICE T from_compute(compute_t<T> x) {
    return from_float<T>(x);
}
template <>
NG_HOST_DEVICE double from_compute<double>(double x) {
    return x;
}

NG_NAMESPACE_END
