// Fixed-width vectors for CPU kernels, written with the compiler's vector extension instead of intrinsics.
//
// A Pack always holds 32 bytes (8 floats or 4 doubles), whatever the instruction set: the compiler maps it to one AVX
// register, two SSE or NEON registers, or half an AVX-512 one. Sums over packs therefore have the same order, and the
// same bits, on every instruction set.
#pragma once

#include "common/dtype.h"

NG_NAMESPACE_BEGIN

using F32x8 = float __attribute__((vector_size(32)));
using F64x4 = double __attribute__((vector_size(32)));
using U32x8 = uint32_t __attribute__((vector_size(32)));
using U16x8 = uint16_t __attribute__((vector_size(16)));

template <class A>
struct Simd;
template <>
struct Simd<float> {
    using Pack = F32x8;
    static constexpr int lanes = 8;
};
template <>
struct Simd<double> {
    using Pack = F64x4;
    static constexpr int lanes = 4;
};

NG_HOST_DEVICE F32x8 load_pack(const float* p) {
    F32x8 pack;
    memcpy(&pack, p, sizeof(pack));
    return pack;
}
NG_HOST_DEVICE F64x4 load_pack(const double* p) {
    F64x4 pack;
    memcpy(&pack, p, sizeof(pack));
    return pack;
}
NG_HOST_DEVICE F32x8 load_pack(const bf16* p) {
    U16x8 narrow;
    memcpy(&narrow, p, sizeof(narrow));
    const U32x8 wide = __builtin_convertvector(narrow, U32x8) << 16;
    return bit_cast<F32x8>(wide);
}
NG_HOST_DEVICE F32x8 load_pack(const f16* p) {
    F32x8 pack;
    for (int i = 0; i < 8; ++i) pack[i] = to_float(p[i]);
    return pack;
}

NG_HOST_DEVICE void store_pack(float* p, F32x8 pack) { memcpy(p, &pack, sizeof(pack)); }
NG_HOST_DEVICE void store_pack(double* p, F64x4 pack) { memcpy(p, &pack, sizeof(pack)); }
NG_HOST_DEVICE void store_pack(bf16* p, F32x8 pack) {
    const U32x8 bits = bit_cast<U32x8>(pack);
    const U32x8 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const U32x8 nan = bit_cast<U32x8>(pack != pack);  // all ones where NaN
    const U32x8 chosen = (((bits >> 16) | 0x40u) & nan) | (rounded & ~nan);
    const U16x8 narrow = __builtin_convertvector(chosen, U16x8);
    memcpy(p, &narrow, sizeof(narrow));
}
NG_HOST_DEVICE void store_pack(f16* p, F32x8 pack) {
    for (int i = 0; i < 8; ++i) p[i] = from_float<f16>(pack[i]);
}

// The sum of the lanes, as a fixed tree.
NG_HOST_DEVICE float sum_lanes(F32x8 v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}
NG_HOST_DEVICE double sum_lanes(F64x4 v) { return (v[0] + v[2]) + (v[1] + v[3]); }

NG_NAMESPACE_END
