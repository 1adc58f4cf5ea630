// Random words for CPU kernels, several groups of four at a time.
#pragma once

#include "common/philox.h"
#include "common/simd.h"

NG_NAMESPACE_BEGIN

#if defined(__AVX512F__)
constexpr int philox_lanes = 8;
#else
constexpr int philox_lanes = 4;
#endif
// One group per lane, its 32-bit counters in the low halves. What is in the high halves does not matter.
using PhiloxLanes = uint64_t __attribute__((vector_size(8 * philox_lanes)));

// The 64-bit products of the low halves.
NG_HOST_DEVICE PhiloxLanes multiply_low_halves(PhiloxLanes a, PhiloxLanes b) {
#if defined(__AVX512F__)
    return bit_cast<PhiloxLanes>(_mm512_maskz_mul_epu32(0xff, bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif NG_X86_V3
    return bit_cast<PhiloxLanes>(_mm256_mul_epu32(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#else
    return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// The words of the groups first, first + 1, ..., in order: 4 * philox_lanes of them. As Philox::group.
NG_HOST_DEVICE void philox_groups(const Philox& philox, uint64_t first, uint32_t* words) {
    PhiloxLanes index{};
    for (int lane = 0; lane < philox_lanes; ++lane) index[lane] = static_cast<uint64_t>(lane);
    const PhiloxLanes group = index + first, zero{};
    PhiloxLanes c0 = group, c1 = group >> 32, c2 = zero + philox.offset, c3 = c2 >> 32;
    uint32_t k0 = static_cast<uint32_t>(philox.seed), k1 = static_cast<uint32_t>(philox.seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        const PhiloxLanes p0 = multiply_low_halves(c0, zero + 0xD2511F53u),
                          p1 = multiply_low_halves(c2, zero + 0xCD9E8D57u);
        c0 = (p1 >> 32) ^ c1 ^ (zero + k0);
        c2 = (p0 >> 32) ^ c3 ^ (zero + k1);
        c1 = p1;
        c3 = p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    const PhiloxLanes even = (c0 & 0xffffffffu) | c1 << 32, odd = (c2 & 0xffffffffu) | c3 << 32;
    for (int lane = 0; lane < philox_lanes; ++lane) {
        const uint64_t pair[2] = {even[lane], odd[lane]};
        memcpy(words + 4 * lane, pair, sizeof(pair));
    }
}

// Room that fill_words needs beyond the words it is asked for.
constexpr int philox_slack = 4 * philox_lanes + 4;

// The random words of elements first ... first + count - 1, somewhere in `words`.
inline const uint32_t* fill_words(const Philox& philox, int64_t first, int64_t count, uint32_t* words) {
    const int64_t begin = first / 4, groups = (first + count + 3) / 4 - begin;
    for (int64_t g = 0; g < groups; g += philox_lanes) {
        philox_groups(philox, static_cast<uint64_t>(begin + g), words + 4 * g);
    }
    return words + first % 4;
}

NG_NAMESPACE_END
