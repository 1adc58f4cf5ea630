// Narrow parameters that lose nothing: Kahan's compensation, and what a 16-bit number leaves over.
#pragma once

#include <cmath>

#include "common/dtype.h"

NG_NAMESPACE_BEGIN

// Adds `update` to p, both in T, where `rest` carries what earlier roundings lost.
template <class T>
NG_HOST_DEVICE void kahan_add(T& p, T& rest, float update) {
    const T addend = from_float<T>(to_float(rest) + update);
    const T sum = from_float<T>(to_float(p) + to_float(addend));
    const T gained = from_float<T>(to_float(p) - to_float(sum));
    rest = from_float<T>(to_float(addend) + to_float(gained));
    p = sum;
}

// Half the gap between p and the next bf16 number of its binade, which is what `rest` counts in.
NG_HOST_DEVICE float half_gap(bf16 p) {
    const uint32_t exponent = (p.bits >> 7) & 0xffu;
    return exponent > 8 ? bit_cast<float>((exponent - 8) << 23) : bit_cast<float>(1u << (exponent + 14));
}

NG_HOST_DEVICE float join_master(bf16 p, int rest, int bits) {
    const float largest = bits == 8 ? 127.0f : 32767.0f;
    return to_float(p) + static_cast<float>(rest) / largest * half_gap(p);
}

NG_HOST_DEVICE void split_master(float value, int bits, bf16& p, int& rest) {
    const float largest = bits == 8 ? 127.0f : 32767.0f;
    p = from_float<bf16>(value);
    float part = (value - to_float(p)) / half_gap(p);
    part = part > 1.0f ? 1.0f : part < -1.0f ? -1.0f : part;
    rest = static_cast<int>(std::nearbyint(part * largest));
}

NG_NAMESPACE_END
