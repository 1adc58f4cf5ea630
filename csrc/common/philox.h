// Counter-based random bits (Philox-4x32-10, Salmon et al., SC 2011) and the stochastic rounding built on
// them.
//
// Element i of a draw depends on (seed, offset, i) alone: never on the thread, the block or the shard.
#pragma once

#include "common/dtype.h"

NG_NAMESPACE_BEGIN

struct Philox {
    uint64_t seed, offset;

    struct Words {
        uint32_t word[4];
    };

    // The four words that serve elements 4 * group ... 4 * group + 3.
    NG_HOST_DEVICE Words group(uint64_t group) const {
        uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
        uint32_t c0 = static_cast<uint32_t>(group), c1 = static_cast<uint32_t>(group >> 32);
        uint32_t c2 = static_cast<uint32_t>(offset), c3 = static_cast<uint32_t>(offset >> 32);
        for (int round = 0; round < 10; ++round) {
            const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
            c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
            c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
            c1 = static_cast<uint32_t>(p1);
            c3 = static_cast<uint32_t>(p0);
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        return {{c0, c1, c2, c3}};
    }

    NG_HOST_DEVICE uint32_t word(uint64_t element) const { return group(element >> 2).word[element & 3]; }
};

// words.word[index], without an array indexed at run time, which would not be held in registers.
NG_HOST_DEVICE uint32_t pick(const Philox::Words& words, int index) {
    const uint32_t even = index & 2 ? words.word[2] : words.word[0],
                   odd = index & 2 ? words.word[3] : words.word[1];
    return index & 1 ? odd : even;
}

// A word as a number in [0, 1) with 24 bits.
NG_HOST_DEVICE float uniform(uint32_t word) {
    return static_cast<float>(static_cast<int32_t>(word >> 8)) * 0x1p-24f;
}

// float32 to bfloat16: the magnitude goes up when the word's high half is below the dropped bits; NaN and Inf
// pass.
NG_HOST_DEVICE bf16 stochastic_bf16(float x, uint32_t word) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    const uint32_t up = finite && (word >> 16) < (bits & 0xffffu) ? 1u : 0u;
    return finite ? bf16{static_cast<uint16_t>((bits >> 16) + up)} : from_float<bf16>(x);
}

NG_NAMESPACE_END
