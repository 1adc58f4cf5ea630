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

// Phi(x), the distribution function of the standard normal, to 2e-7 of 1: for a GELU, which multiplies it by
// x, and not for the tails of Phi. One polynomial in x^2 for float, half the price of erf; the last steps
// give exactly 0 and 1 far out. The polynomials of 2 x^2 / limit^2 - 1 are minimax for x p: 1.3e-8 and 6e-8.
struct NormalPolynomial {
    static constexpr int degree = 14;
    static constexpr float limit = 5.2f, scale = 0x1.2ef566p-4f;
    static constexpr float p[] = {0x1.166cf4p-3f,  -0x1.157a88p-4f,  0x1.99d05cp-5f, -0x1.4711a0p-5f,
                                  0x1.05d5dap-5f,  -0x1.95b970p-6f,  0x1.291b30p-6f, -0x1.94cb7ep-7f,
                                  0x1.067982p-7f,  -0x1.4c1852p-8f,  0x1.5cf8bap-9f, -0x1.008316p-10f,
                                  0x1.3af8acp-11f, -0x1.26cd56p-11f, 0x1.a87122p-13f};
};
struct GeluSlopePolynomial {
    static constexpr int degree = 16;
    static constexpr float limit = 5.6f, scale = 0x1.053978p-4f;
    static constexpr float p[] = {
        0x1.02e6bap-3f, -0x1.074ce2p-4f, 0x1.a8692cp-5f, -0x1.a190ecp-5f, 0x1.d05cccp-5f, -0x1.09c208p-4f,
        0x1.25651ap-4f, -0x1.2e15acp-4f, 0x1.10d63ep-4f, -0x1.a724fap-5f, 0x1.5d79f0p-5f, -0x1.389eb6p-5f,
        0x1.4e9af8p-6f, -0x1.542fd4p-9f, 0x1.1242ecp-8f, -0x1.0629f4p-7f, 0x1.9f1c60p-9f};
};

// 1/2 + x p, with x cut off at the limit.
template <class C, class V>
NG_HOST_DEVICE V half_plus_odd(V x) {
    x = clamp_pack(x, -C::limit, C::limit);
    const V t = x * x * C::scale - 1;
    V p = V{} + C::p[C::degree];
#pragma GCC unroll 16
    for (int i = C::degree - 1; i >= 0; --i) p = p * t + C::p[i];
    return x * p + Lane<V>(0.5);
}

template <class V>
NG_HOST_DEVICE V normal_cdf_pack(V x) {
    if constexpr (std::is_same_v<Lane<V>, float>) {
        return clamp_pack(half_plus_odd<NormalPolynomial>(x), 0, 1);
    } else {
        return (erf_pack(x * 0.70710678118654752440) + 1) * 0.5;
    }
}

// The derivative of GELU, Phi(x) + x phi(x), to 5e-7 of 1.
template <class V>
NG_HOST_DEVICE V gelu_slope_pack(V x) {
    if constexpr (std::is_same_v<Lane<V>, float>) {
        return half_plus_odd<GeluSlopePolynomial>(x);
    } else {
        constexpr double peak = 0.39894228040143267794;  // 1 / sqrt(2 pi)
        return normal_cdf_pack(x) + x * (exp_pack(x * x * -0.5) * peak);
    }
}

NG_NAMESPACE_END
