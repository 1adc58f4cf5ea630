// The error function of packs, beside the elementary functions in math.h and on their terms.
#pragma once

#include "common/math.h"

NG_NAMESPACE_BEGIN

template <class T>
struct ErfConstants;
// erf(x) = x + x p(x^2) up to 1, and 1 - e^q(x - 1) from there to `saturated`, where it rounds to 1.
// Minimax in relative error of erf: 1.2e-9 and 1.1e-9; 7.3e-18 and 3.1e-17.
template <>
struct ErfConstants<float> {
    static constexpr int p_degree = 6, q_degree = 6;
    static constexpr float p[] = {0x1.06eba8p-3f, -0x1.81273ep-2f,  0x1.ce2cf8p-4f, -0x1.b7f910p-6f,
                                  0x1.5405bep-8f, -0x1.a3f71ep-11f, 0x1.496a12p-14f};
    static constexpr float q[] = {-0x1.d97fc0p+0f, -0x1.51c9aap+1f,  -0x1.afad1cp-1f, -0x1.53ff24p-5f,
                                  0x1.444122p-7f,  -0x1.df8fcep-10f, 0x1.86dd86p-13f};
    static constexpr float saturated = 4.0f;
};
template <>
struct ErfConstants<double> {
    static constexpr int p_degree = 11, q_degree = 16;
    static constexpr double p[] = {0x1.06eba8214db68p-3,   -0x1.812746b0379bdp-2,  0x1.ce2f21a040d21p-4,
                                   -0x1.b82ce311fab6fp-6,  0x1.565bccf92eaadp-8,   -0x1.c02db03e3cd72p-11,
                                   0x1.f9a2bab00ed8ep-14,  -0x1.f4ca4dbca9a02p-17, 0x1.b97fd5d5cea58p-20,
                                   -0x1.5c072df7c0e9ep-23, 0x1.d71b21cf3dcd1p-27,  -0x1.abae353b8c9f6p-31};
    static constexpr double q[] = {-0x1.d97fbf27aa2a2p+0,  -0x1.51c9b0006c1b8p+1,  -0x1.afabc11a305bfp-1,
                                   -0x1.5477f09282e3dp-5,  0x1.48c9d2446808cp-7,   -0x1.033f3a50a42a8p-9,
                                   0x1.f1a816ecc7081p-13,  0x1.b9e5553c1e58ap-16,  -0x1.c9ba88f9572c2p-16,
                                   0x1.48799444ea546p-17,  -0x1.2e5a61549a912p-19, 0x1.3cfa0dfcdbcf2p-22,
                                   0x1.2c1585db42cf1p-27,  -0x1.e480cc746b72dp-27, 0x1.bec7263f9e874p-29,
                                   -0x1.953c6a5c3a7e2p-32, 0x1.377822c5d0fc5p-36};
    static constexpr double saturated = 6.0;
};

// Within 2 units in the last place. NaN for NaN; keeps the sign of zero.
template <class V>
NG_HOST_DEVICE V erf_pack(V x) {
    using C = ErfConstants<Lane<V>>;
    using I = Mask<V>;
    const V square = x * x;
    V p = V{} + C::p[C::p_degree];
#pragma GCC unroll 16
    for (int i = C::p_degree - 1; i >= 0; --i) p = p * square + C::p[i];

    const V magnitude = abs_pack(x);
    const V far = (magnitude > V{} + C::saturated ? V{} + C::saturated : magnitude) - 1;
    V q = V{} + C::q[C::q_degree];
#pragma GCC unroll 32
    for (int i = C::q_degree - 1; i >= 0; --i) q = q * far + C::q[i];
    // Between -38 and 0 in the region where it is used; elsewhere any number will do.
    const auto [fraction, exponent] = exp_parts(clamp_pack(q, Lane<V>(-80), Lane<V>(0)));
    const V tail = 1 - (fraction + 1) * power_of_two(exponent);
    const I sign = bit_cast<I>(x) & (I{} + std::numeric_limits<Lane<I>>::min());
    return magnitude > V{} + 1 ? bit_cast<V>(bit_cast<I>(tail) | sign) : x + x * p;
}

NG_NAMESPACE_END
