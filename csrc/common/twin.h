// Two packs as one: 64 bytes, a single AVX-512 register where there are any. As for packs, what is computed
// lane by lane, or summed with sum_lanes, has the same bits on every instruction set.
#pragma once

#include "common/row_cpu.h"

#if NG_X86_V3 && defined(__AVX512F__) && defined(__AVX512BW__)
#define NG_X86_V4 1
#else
#define NG_X86_V4 0
#endif

NG_NAMESPACE_BEGIN

template <class P, class A>
struct Halves {
    P low, high;
};

#if NG_X86_V4
using F32x16 = float __attribute__((vector_size(64)));
using F64x8 = double __attribute__((vector_size(64)));
using U32x16 = uint32_t __attribute__((vector_size(64)));

// The masked forms of the intrinsics, because GCC 12 warns of its own unmasked ones.
constexpr uint16_t all_sixteen = 0xffff;

NG_HOST_DEVICE U32x16 load_wide_twin(const void* p) {
    return bit_cast<U32x16>(
        _mm512_maskz_cvtepu16_epi32(all_sixteen, _mm256_loadu_si256(static_cast<const __m256i*>(p))));
}
NG_HOST_DEVICE F32x16 load_twin(const bf16* p) { return bit_cast<F32x16>(load_wide_twin(p) << 16); }
NG_HOST_DEVICE F32x16 load_twin(const f16* p) {
    return bit_cast<F32x16>(
        _mm512_maskz_cvtph_ps(all_sixteen, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
NG_HOST_DEVICE F32x16 load_twin(const float* p) {
    F32x16 twin;
    memcpy(&twin, p, sizeof(twin));
    return twin;
}
NG_HOST_DEVICE F64x8 load_twin(const double* p) {
    F64x8 twin;
    memcpy(&twin, p, sizeof(twin));
    return twin;
}
NG_HOST_DEVICE void store_pack(float* p, F32x16 twin) { memcpy(p, &twin, sizeof(twin)); }
NG_HOST_DEVICE void store_pack(double* p, F64x8 twin) { memcpy(p, &twin, sizeof(twin)); }
NG_HOST_DEVICE void store_pack(bf16* p, F32x16 twin) {
    const U32x16 bits = bit_cast<U32x16>(twin);
    const U32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const U32x16 wide = twin == twin ? rounded : (bits >> 16) | 0x40u;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_maskz_cvtepi32_epi16(all_sixteen, bit_cast<__m512i>(wide)));
}
NG_HOST_DEVICE void store_pack(f16* p, F32x16 twin) {
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(p),
        _mm512_maskz_cvtps_ph(all_sixteen, bit_cast<__m512>(twin), _MM_FROUND_TO_NEAREST_INT));
}
NG_HOST_DEVICE Halves<F32x8, float> halves(F32x16 twin) { return bit_cast<Halves<F32x8, float>>(twin); }
NG_HOST_DEVICE Halves<F64x4, double> halves(F64x8 twin) { return bit_cast<Halves<F64x4, double>>(twin); }

#else
using F32x16 = Halves<F32x8, float>;
using F64x8 = Halves<F64x4, double>;

#define NG_TWIN_OPERATOR(op)                                                                \
    template <class P, class A>                                                             \
    NG_HOST_DEVICE Halves<P, A> operator op(const Halves<P, A>& a, const Halves<P, A>& b) { \
        return {a.low op b.low, a.high op b.high};                                          \
    }                                                                                       \
    template <class P, class A>                                                             \
    NG_HOST_DEVICE Halves<P, A> operator op(const Halves<P, A>& a, A b) {                   \
        return {a.low op b, a.high op b};                                                   \
    }                                                                                       \
    template <class P, class A, class B>                                                    \
    NG_HOST_DEVICE Halves<P, A>& operator op## = (Halves<P, A> & a, const B& b) {           \
        return a = a op b;                                                                  \
    }
NG_TWIN_OPERATOR(+)
NG_TWIN_OPERATOR(-)
NG_TWIN_OPERATOR(*)
#undef NG_TWIN_OPERATOR

NG_HOST_DEVICE F64x8 load_twin(const double* p) { return {load_pack(p), load_pack(p + 4)}; }
template <class T>
NG_HOST_DEVICE F32x16 load_twin(const T* p) {
    return {load_pack(p), load_pack(p + 8)};
}
template <class T, class P, class A>
NG_HOST_DEVICE void store_pack(T* p, const Halves<P, A>& twin) {
    store_pack(p, twin.low);
    store_pack(p + sizeof(P) / sizeof(A), twin.high);
}
template <class P, class A>
NG_HOST_DEVICE const Halves<P, A>& halves(const Halves<P, A>& twin) {
    return twin;
}
#endif

template <class A>
struct Twin;
template <>
struct Twin<float> {
    using type = F32x16;
    static constexpr int lanes = 16;
};
template <>
struct Twin<double> {
    using type = F64x8;
    static constexpr int lanes = 8;
};

NG_HOST_DEVICE float sum_lanes(const F32x16& twin) { return sum_lanes(halves(twin).low + halves(twin).high); }
NG_HOST_DEVICE double sum_lanes(const F64x8& twin) { return sum_lanes(halves(twin).low + halves(twin).high); }

// How a body loads: its argument `as` makes as(p) a twin, a pack or a scalar.
struct AsTwin {
    template <class T>
    NG_HOST_DEVICE auto operator()(const T* p) const {
        return load_twin(p);
    }
};
struct AsPack {
    template <class T>
    NG_HOST_DEVICE auto operator()(const T* p) const {
        return load_pack(p);
    }
};
struct AsScalar {
    template <class T>
    NG_HOST_DEVICE auto operator()(const T* p) const {
        return to_compute(*p);
    }
};
NG_HOST_DEVICE void store_pack(double* p, double value) { *p = value; }
template <class T>
NG_HOST_DEVICE void store_pack(T* p, float value) {
    *p = from_float<T>(value);
}

// body(j, as) for a whole row: twins, then a pack, then scalars.
template <class A, class Body>
NG_HOST_DEVICE void for_twins(int64_t columns, Body body) {
    constexpr int twin = Twin<A>::lanes, pack = Simd<A>::lanes;
    int64_t j = 0;
    for (; j + twin <= columns; j += twin) body(j, AsTwin{});
    for (; j + pack <= columns; j += pack) body(j, AsPack{});
    for (; j < columns; ++j) body(j, AsScalar{});
}

// The sum of term(j, as) over a row, two twins in flight.
template <class A, class Term>
NG_HOST_DEVICE A sum_twins(int64_t columns, Term term) {
    constexpr int lanes = Twin<A>::lanes;
    typename Twin<A>::type even = {}, odd = {};
    int64_t j = 0;
    for (; j + 2 * lanes <= columns; j += 2 * lanes) {
        even += term(j, AsTwin{});
        odd += term(j + lanes, AsTwin{});
    }
    for (; j + lanes <= columns; j += lanes) even += term(j, AsTwin{});
    A sum = sum_lanes(even + odd);
    for (; j < columns; ++j) sum += term(j, AsScalar{});
    return sum;
}

// row_moments over twins: blocks of four.
template <class A, class Term>
NG_HOST_DEVICE Moments<A> twin_moments(int64_t columns, Term term) {
    constexpr int lanes = Twin<A>::lanes, depth = 4;
    using T = typename Twin<A>::type;
    if (columns == 0) return {std::numeric_limits<A>::quiet_NaN(), 0};  // 0 / 0
    T mean = {}, squares = {};
    A count = 0;  // of each lane
    int64_t j = 0;
    for (; j + depth * lanes <= columns; j += depth * lanes) {
        T values[depth];
        for (int k = 0; k < depth; ++k) values[k] = term(j + k * lanes, AsTwin{});
        const T centre = ((values[0] + values[1]) + (values[2] + values[3])) * (A(1) / depth);
        for (int k = 0; k < depth; ++k) values[k] -= centre;
        const T block =
            (values[0] * values[0] + values[1] * values[1]) + (values[2] * values[2] + values[3] * values[3]);
        const A share = depth / (count + depth);
        const T delta = centre - mean;
        mean += delta * share;
        squares += block + delta * delta * (count * share);
        count += depth;
    }
    A total = count * lanes;
    Moments<A> row{sum_lanes(mean) / lanes, 0};
    const T apart = mean - row.mean;
    row.sum_of_squares = sum_lanes(squares) + count * sum_lanes(apart * apart);
    for (; j < columns; ++j) {
        const A delta = term(j, AsScalar{}) - row.mean;
        total += 1;
        row.mean += delta / total;
        row.sum_of_squares += delta * (delta - delta / total);
    }
    return row;
}

NG_NAMESPACE_END
