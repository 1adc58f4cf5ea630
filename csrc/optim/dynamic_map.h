// The dynamic 8-bit maps of blockwise optimizer states (Dettmers et al., "8-bit Optimizers via Block-wise
// Quantization", ICLR 2022), and a table that finds the nearest entry in one look.
//
// A map has 256 sorted values: per decade twice as many as in the decade below, plus 0 and 1. The lookup
// table is indexed by the leading bits of the float to encode. Its buckets are so narrow that at most one
// midpoint between neighbouring values lies in each, so an entry packs the code at the bucket's lower end
// (high 8 bits) and where in the bucket the next code begins (low 24 bits).
#pragma once

#include <cstdint>

#include "common/dtype.h"

NG_NAMESPACE_BEGIN

template <bool Signed>
struct DynamicMap {
    static constexpr int low_bits = Signed ? 17 : 16;  // of a float that the index leaves out
    static constexpr uint32_t low_mask = (1u << low_bits) - 1;
    static constexpr uint32_t first = (127u - 23u) << 23;  // 2^-23, below the smallest midpoint
    static constexpr uint32_t last = 127u << 23;           // 1
    static constexpr uint32_t half = ((last - first) >> low_bits) + 1;
    static constexpr int buckets =
        static_cast<int>(Signed ? 2 * half : half);  // negative numbers come second

    float values[256];
    uint32_t lookup[buckets];

    // Where a number lies: the bucket in the high bits, how far into it in the low ones.
    static NG_HOST_DEVICE uint32_t place(float x) {
        const uint32_t bits = bit_cast<uint32_t>(x);
        // Signed comparisons are the cheap ones; they also make negative numbers 0 in the unsigned map.
        int32_t magnitude = static_cast<int32_t>(Signed ? bits & 0x7fffffffu : bits);
        magnitude = magnitude < static_cast<int32_t>(first) ? static_cast<int32_t>(first) : magnitude;
        magnitude = magnitude > static_cast<int32_t>(last) ? static_cast<int32_t>(last) : magnitude;
        const uint32_t negative = Signed ? 0u - (bits >> 31) : 0u;
        const uint32_t place = static_cast<uint32_t>(magnitude) - first;
        return (place ^ (negative & low_mask)) + (negative & (half << low_bits));
    }
};

// The bits of x in [2^-126, 2); the mantissa is rounded down, or up.
constexpr uint32_t float_bits(double x, bool up) {
    uint32_t exponent = 127;
    for (; x < 1.0; x *= 2.0) --exponent;
    const double mantissa = (x - 1.0) * 8388608.0;
    const uint32_t whole = static_cast<uint32_t>(mantissa);
    return (exponent << 23) + whole + (up && whole < mantissa ? 1u : 0u);
}

template <bool Signed>
constexpr DynamicMap<Signed> make_dynamic_map() {
    using Map = DynamicMap<Signed>;
    Map map{};

    // Each decade holds the midpoints of equal bins of [0.1, 1], whose edges are those of a float32 linspace.
    constexpr float decades[] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
    constexpr int zero = Signed ? 127 : 0;
    int code = zero + 1;
    for (int decade = 0; decade < 7; ++decade) {
        const int bins = (Signed ? 1 : 2) << decade;
        const float width = (1.0f - 0.1f) / static_cast<float>(bins);
        float edge = 0.1f;
        for (int bin = 1; bin <= bins; ++bin) {
            const double from_below = static_cast<double>(0.1f) + static_cast<double>(width) * bin;
            const double from_above = 1.0 - static_cast<double>(width) * (bins - bin);
            const float next = static_cast<float>(bin < (bins + 1) / 2 ? from_below : from_above);
            const float value = decades[decade] * ((edge + next) / 2.0f);
            if (Signed) map.values[2 * zero - code] = -value;
            map.values[code++] = value;
            edge = next;
        }
    }
    map.values[255] = 1.0f;

    // Where each code begins on the positive side, as the bits of the smallest float that rounds to it.
    uint32_t next = map.first;
    code = zero;
    for (uint32_t bucket = 0; bucket < map.half; ++bucket) {
        const uint32_t begin = map.first + (bucket << map.low_bits);
        while (code < 255 &&
               (next = float_bits((static_cast<double>(map.values[code]) + map.values[code + 1]) / 2,
                                  true)) <= begin)
            ++code;
        const bool crossed = code < 255 && next - begin <= map.low_mask;
        map.lookup[bucket] = static_cast<uint32_t>(code) << 24 | (crossed ? next - begin : map.low_mask + 1);
    }
    // The same for negative numbers, whose low bits are flipped so that they too grow with the number.
    if (Signed) {
        code = zero;
        for (uint32_t bucket = 0; bucket < map.half; ++bucket) {
            const uint32_t end = map.first + ((bucket + 1) << map.low_bits) - 1;
            uint32_t edge = 0;
            bool crossed = false;
            while (code > 0 &&
                   (edge = float_bits(-(static_cast<double>(map.values[code]) + map.values[code - 1]) / 2,
                                      false)) < end) {
                crossed = true;
                next = edge;
                --code;
            }
            map.lookup[map.half + bucket] =
                static_cast<uint32_t>(code) << 24 | (crossed ? end - next : map.low_mask + 1);
        }
    }
    return map;
}

// The code of the map's entry nearest to x in [-1, 1], the upper one when two are equally near.
template <bool Signed, class Lookup>
NG_HOST_DEVICE uint32_t encode(const Lookup& lookup, float x) {
    using Map = DynamicMap<Signed>;
    const uint32_t place = Map::place(x), entry = lookup[place >> Map::low_bits];
    return (entry >> 24) + ((place & Map::low_mask) >= (entry & 0xffffffu) ? 1u : 0u);
}

NG_NAMESPACE_END
