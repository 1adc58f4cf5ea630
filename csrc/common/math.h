// Elementary functions of packs: the same bits on every instruction set, because they are made of additions,
// multiplications and bit operations alone. For CPU kernels; device code has CUDA's own.
//
// `V` is a pack of floats or doubles of any size (GCC's vector extension). The scalar forms take one lane of
// a pack, so the end of a row is computed like the rest of it.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>

#include "common/simd.h"

NG_NAMESPACE_BEGIN

template <class V>
using Lane = std::remove_reference_t<decltype(std::declval<V&>()[0])>;
template <class V>
using Mask = decltype(std::declval<V>() < std::declval<V>());  // integers of the size of a lane, 0 or -1

// NaN where x is NaN.
template <class V>
NG_HOST_DEVICE V clamp_pack(V x, Lane<V> low, Lane<V> high) {
    x = x < V{} + low ? V{} + low : x;
    return x > V{} + high ? V{} + high : x;
}
// b where one is NaN.
template <class V>
NG_HOST_DEVICE V max_pack(V a, V b) {
#if defined(__AVX512F__)  // GCC 12 makes a comparison and a blend of it
    if constexpr (sizeof(V) == 64 && std::is_same_v<Lane<V>, float>) {
        return bit_cast<V>(_mm512_maskz_max_ps(0xffff, bit_cast<__m512>(a), bit_cast<__m512>(b)));
    } else if constexpr (sizeof(V) == 64) {
        return bit_cast<V>(_mm512_maskz_max_pd(0xff, bit_cast<__m512d>(a), bit_cast<__m512d>(b)));
    }
#endif
    return a > b ? a : b;
}
template <class V>
NG_HOST_DEVICE V abs_pack(V x) {
    using I = Mask<V>;
    return bit_cast<V>(bit_cast<I>(x) & ~(I{} + std::numeric_limits<Lane<I>>::min()));
}

template <class T>
struct ExpConstants;
// q(t) with e^t - 1 = t + t^2 q(t), minimax in relative error on |t| < 0.35 (1.4e-8 and 2e-17). ln 2 is cut
// so that n * ln2_high is exact, for |n| < 2^15 and 2^20.
template <>
struct ExpConstants<float> {
    static constexpr int degree = 4, mantissa_bits = 23, bias = 127;
    static constexpr float q[] = {0x1.fffffep-2f, 0x1.5554aap-3f, 0x1.555680p-5f, 0x1.122d00p-7f,
                                  0x1.6beb2cp-10f};
    static constexpr float log2_e = 0x1.715476p+0f, ln2_high = 0x1.63p-1f, ln2_low = -0x1.bd0106p-13f;
    static constexpr float to_integer = 0x1.8p23f;  // adding it rounds to an integer, kept in the low bits
    static constexpr float lowest = -104, highest = 89;  // beyond: 0, and infinity
};
template <>
struct ExpConstants<double> {
    static constexpr int degree = 9, mantissa_bits = 52, bias = 1023;
    static constexpr double q[] = {0x1.0000000000005p-1,  0x1.5555555555537p-3,  0x1.5555555551e97p-5,
                                   0x1.1111111119a03p-7,  0x1.6c16c17ffefe1p-10, 0x1.a01a017278954p-13,
                                   0x1.a019a3d22f652p-16, 0x1.71de8b221623bp-19, 0x1.28a5a025d78cap-22,
                                   0x1.ae6bd27723520p-26};
    static constexpr double log2_e = 0x1.71547652b82fep+0, ln2_high = 0x1.62e42feep-1,
                            ln2_low = 0x1.a39ef35793c76p-33;
    static constexpr double to_integer = 0x1.8p52;
    static constexpr double lowest = -746, highest = 710;
};

// e^x = (1 + fraction) * 2^exponent with fraction in [-0.3, 0.42] and an integral exponent, which neither
// overflows nor underflows. NaN for NaN; x must be finite, and its exponent within the range above.
template <class V>
struct ExpParts {
    V fraction, exponent;
};

template <class V>
NG_HOST_DEVICE ExpParts<V> exp_parts(V x) {
    using C = ExpConstants<Lane<V>>;
    const V exponent = (x * C::log2_e + C::to_integer) - C::to_integer;
    const V t = (x - exponent * C::ln2_high) - exponent * C::ln2_low;
    V q = V{} + C::q[C::degree];
#pragma GCC unroll 16
    for (int i = C::degree - 1; i >= 0; --i) q = q * t + C::q[i];
    return {t * t * q + t, exponent};
}

// 2^n for integral n up to the largest finite power; 0 for -127 (-1023) and below, and for NaN anything
// finite.
template <class V>
NG_HOST_DEVICE V power_of_two(V n) {
    using C = ExpConstants<Lane<V>>;
    using I = Mask<V>;
    const V biased = max_pack(n, V{} - C::bias) + (C::bias + C::to_integer);
    return bit_cast<V>(bit_cast<I>(biased) << C::mantissa_bits);
}

// Within 1 unit in the last place, subnormal results included; exact limits; NaN for NaN.
template <class V>
NG_HOST_DEVICE V exp_pack(V x) {
    using C = ExpConstants<Lane<V>>;
    using I = Mask<V>;
    const auto [fraction, exponent] = exp_parts(clamp_pack(x, C::lowest, C::highest));
    // Two factors, as 2^exponent itself may be beyond the range of finite numbers.
    const I n = bit_cast<I>(exponent + C::to_integer) - bit_cast<I>(V{} + C::to_integer), half = n >> 1;
    const V first = bit_cast<V>((half + C::bias) << C::mantissa_bits);
    const V second = bit_cast<V>((n - half + C::bias) << C::mantissa_bits);
    return (fraction + 1) * first * second;
}

// e^x for x <= 0, with 0 for results below the smallest normal number; NaN for NaN.
template <class V>
NG_HOST_DEVICE V exp_below(V x) {
    using C = ExpConstants<Lane<V>>;
    using I = Mask<V>;
    // Where the exponent rounds to -bias, whose power is 0: power_of_two need not look again.
    const V low = V{} - C::bias * Lane<V>(0x1.62e42fefa39efp-1);
    const auto [fraction, exponent] = exp_parts(max_pack(low, x));
    const V biased = exponent + (C::bias + C::to_integer);
    return (fraction + 1) * bit_cast<V>(bit_cast<I>(biased) << C::mantissa_bits);
}

// 1 / (1 + e^-x), from e^-|x| so that nothing overflows.
template <class V>
NG_HOST_DEVICE V sigmoid_pack(V x) {
    const V e = exp_below(-abs_pack(x));
    return (x < V{} ? e : V{} + 1) / (e + 1);
}

// (e^2x - 1) / (e^2x + 1) without cancellation, about 2 units in the last place. Keeps the sign of zero.
template <class V>
NG_HOST_DEVICE V tanh_pack(V x) {
    using I = Mask<V>;
    const I sign = bit_cast<I>(x) & (I{} + std::numeric_limits<Lane<I>>::min());
    V magnitude = abs_pack(x);
    magnitude = magnitude > V{} + 20 ? V{} + 20 : magnitude;
    const auto [fraction, exponent] = exp_parts(magnitude * 2);
    const V scale = power_of_two(exponent), minus_one = scale * fraction + (scale - 1);
    return bit_cast<V>(bit_cast<I>(minus_one / (minus_one + 2)) | sign);
}

// A pack of any size, or a scalar.
template <class V, class Function>
NG_HOST_DEVICE V elementwise(V x, Function function) {
    if constexpr (std::is_floating_point_v<V>) {
        return function(x - typename Simd<V>::Pack{})[0];  // a difference keeps -0
    } else {
        return function(x);
    }
}
template <class V>
NG_HOST_DEVICE V exp(V x) {
    return elementwise(x, [](auto pack) { return exp_pack(pack); });
}
template <class V>
NG_HOST_DEVICE V sigmoid(V x) {
    return elementwise(x, [](auto pack) { return sigmoid_pack(pack); });
}
template <class V>
NG_HOST_DEVICE V tanh(V x) {
    return elementwise(x, [](auto pack) { return tanh_pack(pack); });
}

using std::log;  // once per row, not once per element

NG_NAMESPACE_END
