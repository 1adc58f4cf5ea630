// The error function of packs, beside the elementary functions in math.h and on their terms.
#pragma once

#include "common/math.h"

NG_NAMESPACE_BEGIN

template <class T>
struct ErfConstants;
// erf(x) = x + x p(x^2) up to 1, and 1 - e^q(x - centre) from there to `saturated`, where it rounds to 1.
// Minimax in relative error of erf: 1.2e-9 and 1.1e-9; 7.3e-18 and 1.2e-18.
template <>
struct ErfConstants<float> {
    static constexpr int p_degree = 6, q_degree = 6;
    static constexpr float p[] = {0x1.06eba8p-3f, -0x1.81273ep-2f,  0x1.ce2cf8p-4f, -0x1.b7f910p-6f,
                                  0x1.5405bep-8f, -0x1.a3f71ep-11f, 0x1.496a12p-14f};
    static constexpr float q[] = {-0x1.f3a2e8p+2f, -0x1.56928ap+2f,  -0x1.e344a6p-1f, -0x1.5efc94p-7f,
                                  0x1.43248ap-9f,  -0x1.3eb4c0p-13f, 0x1.86dd86p-13f};
    static constexpr float centre = 2.5f, saturated = 4.0f;
};
template <>
struct ErfConstants<double> {
    static constexpr int p_degree = 11, q_degree = 18;
    static constexpr double p[] = {0x1.06eba8214db68p-3,   -0x1.812746b0379bdp-2,  0x1.ce2f21a040d21p-4,
                                   -0x1.b82ce311fab6fp-6,  0x1.565bccf92eaadp-8,   -0x1.c02db03e3cd72p-11,
                                   0x1.f9a2bab00ed8ep-14,  -0x1.f4ca4dbca9a02p-17, 0x1.b97fd5d5cea58p-20,
                                   -0x1.5c072df7c0e9ep-23, 0x1.d71b21cf3dcd1p-27,  -0x1.abae353b8c9f6p-31};
    static constexpr double q[] = {
        -0x1.c3991652a239ap+3, -0x1.d107c6916253dp+2,  -0x1.eefa41a3db629p-1, -0x1.567800d786250p-8,
        0x1.ca1051d2cfc94p-11, -0x1.34e6aa98d26ffp-13, 0x1.99396ba51c801p-16, -0x1.04c2dba5f01e8p-18,
        0x1.388ed4f9e319dp-21, -0x1.855eca3294ff9p-24, 0x1.34bdc52c9a1a1p-31, -0x1.d8694a9194eb7p-29,
        0x1.2e76519e7d133p-29, 0x1.a7d9dd99acab4p-29,  0x1.e80d4062e2641p-30, 0x1.5bcbf034b52eep-31,
        0x1.325bd026eb7e8p-33, 0x1.3f94e3e1970d1p-36,  0x1.2771dec42cccbp-40};
    static constexpr double centre = 3.5, saturated = 6.0;
};

// About 1 unit in the last place. NaN for NaN; keeps the sign of zero.
template <class V>
NG_HOST_DEVICE V erf_pack(V x) {
    using C = ErfConstants<Lane<V>>;
    using I = Mask<V>;
    const V square = x * x;
    V p = V{} + C::p[C::p_degree];
#pragma GCC unroll 16
    for (int i = C::p_degree - 1; i >= 0; --i) p = p * square + C::p[i];

    const V magnitude = abs_pack(x);
    const V far = (magnitude > V{} + C::saturated ? V{} + C::saturated : magnitude) - C::centre;
    V q = V{} + C::q[C::q_degree];
#pragma GCC unroll 32
    for (int i = C::q_degree - 1; i >= 0; --i) q = q * far + C::q[i];
    // Between -37 and 0 in the region where it is used; elsewhere any number will do.
    const auto [fraction, exponent] = exp_parts(clamp_pack(q, Lane<V>(-80), Lane<V>(0)));
    const V tail = 1 - (fraction + 1) * power_of_two(exponent);
    const I sign = bit_cast<I>(x) & (I{} + std::numeric_limits<Lane<I>>::min());
    return magnitude > V{} + 1 ? bit_cast<V>(bit_cast<I>(tail) | sign) : x + x * p;
}

NG_NAMESPACE_END
