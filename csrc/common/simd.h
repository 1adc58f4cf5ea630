// Fixed-width vectors for CPU kernels, written with the compiler's vector extension. Intrinsics only to widen
// and narrow 16-bit elements, where GCC 12 makes four instructions of what the processor has one for.
//
// A Pack always holds 32 bytes (8 floats or 4 doubles), whatever the instruction set: the compiler maps it to
// one AVX register, two SSE or NEON registers, or half an AVX-512 one. Sums over packs therefore have the
// same order, and the same bits, on every instruction set.
#pragma once

#include "common/dtype.h"

#if defined(__AVX2__) && defined(__F16C__)
#include <immintrin.h>
#define NG_X86_V3 1
#else
#define NG_X86_V3 0
#endif

NG_NAMESPACE_BEGIN

using F32x8 = float __attribute__((vector_size(32)));
using F64x4 = double __attribute__((vector_size(32)));
using I32x8 = int32_t __attribute__((vector_size(32)));
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
NG_HOST_DEVICE U32x8 load_wide(const void* p) {
#if NG_X86_V3
    return bit_cast<U32x8>(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#else
    U16x8 narrow;
    memcpy(&narrow, p, sizeof(narrow));
    return __builtin_convertvector(narrow, U32x8);
#endif
}
// Stores the low halves of elements below 2^16.
NG_HOST_DEVICE void store_narrow(void* p, U32x8 wide) {
#if NG_X86_V3
    const __m256i pairs = _mm256_packus_epi32(bit_cast<__m256i>(wide), bit_cast<__m256i>(wide));
    const __m256i packed = _mm256_permute4x64_epi64(pairs, 0x08);
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
#else
    const U16x8 narrow = __builtin_convertvector(wide, U16x8);
    memcpy(p, &narrow, sizeof(narrow));
#endif
}

NG_HOST_DEVICE F32x8 load_pack(const bf16* p) { return bit_cast<F32x8>(load_wide(p) << 16); }
NG_HOST_DEVICE U32x8 choose(U32x8 mask, U32x8 yes, U32x8 no) { return (yes & mask) | (no & ~mask); }

// As to_float(f16), eight at a time.
NG_HOST_DEVICE F32x8 load_pack(const f16* p) {
#if NG_X86_V3
    return bit_cast<F32x8>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    const U32x8 wide = load_wide(p), magnitude = wide & 0x7fffu;
    const F32x8 subnormal = __builtin_convertvector(bit_cast<I32x8>(magnitude), F32x8) * 0x1p-24f;
    const U32x8 special = bit_cast<U32x8>(magnitude >= 0x7c00u) & (112u << 23);
    const U32x8 normal = (magnitude << 13) + (112u << 23) + special;
    const U32x8 bits = choose(bit_cast<U32x8>(magnitude < 0x0400u), bit_cast<U32x8>(subnormal), normal);
    return bit_cast<F32x8>(bits | (wide & 0x8000u) << 16);
#endif
}

NG_HOST_DEVICE void store_pack(float* p, F32x8 pack) { memcpy(p, &pack, sizeof(pack)); }
NG_HOST_DEVICE void store_pack(double* p, F64x4 pack) { memcpy(p, &pack, sizeof(pack)); }
NG_HOST_DEVICE void store_pack(bf16* p, F32x8 pack) {
    const U32x8 bits = bit_cast<U32x8>(pack);
    const U32x8 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const U32x8 nan = bit_cast<U32x8>(pack != pack);  // all ones where NaN
    store_narrow(p, choose(nan, (bits >> 16) | 0x40u, rounded));
}
// As from_float<f16>, eight at a time.
NG_HOST_DEVICE void store_pack(f16* p, F32x8 pack) {
#if NG_X86_V3
    const __m128i narrow = _mm256_cvtps_ph(bit_cast<__m256>(pack), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow);
#else
    const U32x8 bits = bit_cast<U32x8>(pack), magnitude = bits & 0x7fffffffu;
    const F32x8 magic = F32x8{} + 0.5f;
    const U32x8 normal = ((magnitude + 0xfffu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
    const U32x8 subnormal = bit_cast<U32x8>(bit_cast<F32x8>(magnitude) + magic) - bit_cast<U32x8>(magic);
    U32x8 code = choose(bit_cast<U32x8>(magnitude < 0x38800000u), subnormal, normal);
    code = choose(bit_cast<U32x8>(magnitude >= 0x477ff000u), U32x8{} + 0x7c00u, code);
    code = choose(bit_cast<U32x8>(magnitude > 0x7f800000u), U32x8{} + 0x7e00u, code);
    store_narrow(p, code | ((bits >> 16) & 0x8000u));
#endif
}

// The sum of the lanes, as a fixed tree.
NG_HOST_DEVICE float sum_lanes(F32x8 v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}
NG_HOST_DEVICE double sum_lanes(F64x4 v) { return (v[0] + v[2]) + (v[1] + v[3]); }

NG_NAMESPACE_END
