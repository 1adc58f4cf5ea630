// Parameters of 16 bits that still follow small updates (python/narrowgauge/optim/master.py is the
// definition): a float32 master weight split into bfloat16 and the rest, and Kahan sums.
#pragma once

#include "common/dtype.h"

NG_NAMESPACE_BEGIN

// Half the distance between a bfloat16 number and the next larger magnitude.
NG_HOST_DEVICE float half_gap(bf16 narrow) {
    const uint32_t exponent = static_cast<uint32_t>(narrow.bits & 0x7f80u) << 16;
    return bit_cast<float>(exponent < 0x00800000u ? 0x00800000u : exponent) * 0x1p-8f;
}

// The largest rest: of 8 or 16 bits.
NG_HOST_DEVICE float largest_rest(int bits) { return bits == 8 ? 127.0f : 32767.0f; }

NG_HOST_DEVICE void split_master(float p, int bits, bf16& narrow, int& rest) {
    narrow = from_float<bf16>(p);
    float share = (p - to_float(narrow)) / half_gap(narrow);
    share = share < -1.0f ? -1.0f : share;
    share = share > 1.0f ? 1.0f : share;
    // The adder rounds: at 1.5 * 2^23 floats are whole numbers, and the low bits are in two's complement.
    const uint32_t rounded = bit_cast<uint32_t>(share * largest_rest(bits) + 0x1.8p23f);
    const bool finite = (narrow.bits & 0x7f80u) != 0x7f80u;
    rest = finite ? static_cast<int32_t>(rounded - bit_cast<uint32_t>(0x1.8p23f)) : 0;
}

NG_HOST_DEVICE float join_master(bf16 narrow, int rest, int bits) {
    const float correction = static_cast<float>(rest) / largest_rest(bits) * half_gap(narrow);
    return to_float(narrow) + (rest == 0 ? 0.0f : correction);
}

// p += update, where `comp` is what earlier additions dropped. For bf16 and f16.
template <class Narrow>
NG_HOST_DEVICE void kahan_add(Narrow& p, Narrow& comp, float update) {
    const float old = to_float(p), c = to_float(from_float<Narrow>(to_float(comp) + update));
    p = from_float<Narrow>(old + c);
    comp = from_float<Narrow>(c + to_float(from_float<Narrow>(old - to_float(p))));
}

NG_NAMESPACE_END
