// Blocks of 64 bytes of floats or doubles, as one register where the instruction set has such registers and
// as two packs elsewhere: the lanes of a block, and so the order of a sum, are the same on both.
//
// For loops whose time is arithmetic (exponentials), not memory; simd.h is enough for the others.
#pragma once

#include "common/math.h"

NG_NAMESPACE_BEGIN

#if defined(__AVX512F__)
constexpr int register_bytes = 64;
#else
constexpr int register_bytes = 32;
#endif

template <class T, int Bytes>
struct VectorOf {
    typedef T type __attribute__((vector_size(Bytes)));
};

template <class A>
struct Wide {
    using Pack = typename VectorOf<A, register_bytes>::type;
    static constexpr int lanes = register_bytes / sizeof(A);  // of a pack
    static constexpr int packs = 64 / register_bytes;         // of a block
    static constexpr int block = lanes * packs;
};

template <class A>
using WidePack = typename Wide<A>::Pack;

// --- memory --------------------------------------------------------------------------------------

NG_HOST_DEVICE WidePack<float> load_vector(const float* p) {
    WidePack<float> pack;
    memcpy(&pack, p, sizeof(pack));
    return pack;
}
NG_HOST_DEVICE WidePack<double> load_vector(const double* p) {
    WidePack<double> pack;
    memcpy(&pack, p, sizeof(pack));
    return pack;
}
NG_HOST_DEVICE void store_vector(float* p, WidePack<float> pack) { memcpy(p, &pack, sizeof(pack)); }
NG_HOST_DEVICE void store_vector(double* p, WidePack<double> pack) { memcpy(p, &pack, sizeof(pack)); }

#if defined(__AVX512F__)
using WideU32 = VectorOf<uint32_t, 64>::type;

// As load_pack and store_pack in simd.h, sixteen at a time. (The masked forms, with all lanes wanted, because
// GCC 12 warns of uninitialised registers in the plain ones.)
NG_HOST_DEVICE WidePack<float> load_vector(const bf16* p) {
    const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return bit_cast<WidePack<float>>(bit_cast<WideU32>(_mm512_maskz_cvtepu16_epi32(0xffff, narrow)) << 16);
}
NG_HOST_DEVICE WidePack<float> load_vector(const f16* p) {
    return bit_cast<WidePack<float>>(
        _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
NG_HOST_DEVICE void store_vector(bf16* p, WidePack<float> pack) {
    const WideU32 bits = bit_cast<WideU32>(pack);
    const WideU32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const WideU32 code = pack != pack ? (bits >> 16) | 0x40u : rounded;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_maskz_cvtepi32_epi16(0xffff, bit_cast<__m512i>(code)));
}
NG_HOST_DEVICE void store_vector(f16* p, WidePack<float> pack) {
    const __m256i narrow = _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(pack), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow);
}
#else
NG_HOST_DEVICE F32x8 load_vector(const bf16* p) { return load_pack(p); }
NG_HOST_DEVICE F32x8 load_vector(const f16* p) { return load_pack(p); }
NG_HOST_DEVICE void store_vector(bf16* p, F32x8 pack) { store_pack(p, pack); }
NG_HOST_DEVICE void store_vector(f16* p, F32x8 pack) { store_pack(p, pack); }
#endif

// The first `count` of a pack, the others `rest`; reads and writes nothing beyond.
template <class A, class T>
NG_HOST_DEVICE WidePack<A> load_part(const T* p, int count, T rest) {
#if defined(__AVX512F__)
    const unsigned lanes = (1u << count) - 1;
    if constexpr (std::is_same_v<T, float>) {
        return bit_cast<WidePack<A>>(
            _mm512_mask_loadu_ps(_mm512_set1_ps(rest), static_cast<__mmask16>(lanes), p));
    } else if constexpr (std::is_same_v<T, double>) {
        return bit_cast<WidePack<A>>(
            _mm512_mask_loadu_pd(_mm512_set1_pd(rest), static_cast<__mmask8>(lanes), p));
    } else {
        T values[16];
        const __m256i others = _mm256_set1_epi16(static_cast<int16_t>(rest.bits));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(values),
                            _mm256_mask_loadu_epi16(others, static_cast<__mmask16>(lanes), p));
        return load_vector(values);
    }
#else
    T values[Wide<A>::lanes];
    for (int i = 0; i < Wide<A>::lanes; ++i) values[i] = i < count ? p[i] : rest;
    return load_vector(values);
#endif
}
template <class A, class T>
NG_HOST_DEVICE void store_part(T* p, int count, WidePack<A> pack) {
#if defined(__AVX512F__)
    const unsigned lanes = (1u << count) - 1;
    if constexpr (std::is_same_v<T, float>) {
        _mm512_mask_storeu_ps(p, static_cast<__mmask16>(lanes), bit_cast<__m512>(pack));
    } else if constexpr (std::is_same_v<T, double>) {
        _mm512_mask_storeu_pd(p, static_cast<__mmask8>(lanes), bit_cast<__m512d>(pack));
    } else {
        T values[16];
        store_vector(values, pack);
        _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(lanes),
                                 _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
    }
#else
    T values[Wide<A>::lanes];
    store_vector(values, pack);
    for (int i = 0; i < Wide<A>::lanes; ++i) {
        if (i < count) p[i] = values[i];
    }
#endif
}

// --- a block -------------------------------------------------------------------------------------

// One value per lane of a block.
template <class A>
struct Block {
    WidePack<A> packs[Wide<A>::packs];

    static NG_HOST_DEVICE Block all(A value) {
        Block block;
        for (auto& pack : block.packs) pack = WidePack<A>{} + value;
        return block;
    }
};

// Combines the lanes by a fixed tree, halves with halves; combine takes vectors and scalars.
template <class A, class Combine>
NG_HOST_DEVICE A fold_lanes(const Block<A>& block, Combine combine) {
    using Half = typename VectorOf<A, 32>::type;
    using Quarter = typename VectorOf<A, 16>::type;
    Half halves[2];
    memcpy(halves, &block, sizeof(halves));
    const Half half = combine(halves[0], halves[1]);
    Quarter quarters[2];
    memcpy(quarters, &half, sizeof(quarters));
    const Quarter last = combine(quarters[0], quarters[1]);
    if constexpr (sizeof(A) == 8) {
        return combine(A(last[0]), A(last[1]));
    } else {
        return combine(combine(A(last[0]), A(last[2])), combine(A(last[1]), A(last[3])));
    }
}

// Calls body(j, p, count) for every pack of [0, count): j is where it starts, p its place in the block, count
// how many of its elements exist; `whole` is true at compile time where all do.
template <class A, class Body>
NG_HOST_DEVICE void for_wide(int64_t columns, Body body) {
    constexpr int lanes = Wide<A>::lanes, packs = Wide<A>::packs;
    int64_t j = 0;
    for (; j + Wide<A>::block <= columns; j += Wide<A>::block) {
        for (int p = 0; p < packs; ++p) body(std::true_type{}, j + p * lanes, p, lanes);
    }
    for (int p = 0; p < packs && j < columns; ++p, j += lanes) {
        const int64_t count = columns - j < lanes ? columns - j : lanes;
        if (count == lanes) {
            body(std::true_type{}, j, p, lanes);
        } else {
            body(std::false_type{}, j, p, static_cast<int>(count));
        }
    }
}

NG_NAMESPACE_END
