// Elementary functions of one number, for rules that run on the CPU and on the GPU. On the CPU the float32
// forms are made of arithmetic alone, so that loops over them vectorise; packs have math.h.
#pragma once

#include <cmath>

#include "common/dtype.h"

NG_NAMESPACE_BEGIN

// e^x for x <= 0.
NG_HOST_DEVICE double decaying_exp(double x) { return std::exp(x); }

NG_HOST_DEVICE float decaying_exp(float x) {
#if defined(__CUDA_ARCH__)
    return expf(x);
#else
    // x = n ln 2 + t; e^t - 1 = t + t^2 q(t), minimax in relative error on |t| < 0.35 (1.4e-8).
    constexpr float to_integer = 0x1.8p23f;          // adding it rounds to an integer
    const float bounded = x >= -87.0f ? x : -87.0f;  // NaN too: it has no integer
    const float n = (bounded * 0x1.715476p+0f + to_integer) - to_integer;
    const float t = (bounded - n * 0x1.63p-1f) - n * -0x1.bd0106p-13f;
    const float q = (((0x1.6beb2cp-10f * t + 0x1.122d00p-7f) * t + 0x1.555680p-5f) * t + 0x1.5554aap-3f) * t +
                    0x1.fffffep-2f;
    const float fraction = (t + t * t * q) + 1.0f;
    const uint32_t exponent = static_cast<uint32_t>(static_cast<int32_t>(n)) << 23;
    const float power = bit_cast<float>(bit_cast<uint32_t>(fraction) + exponent);
    return x < -87.0f ? 0.0f : x != x ? x : power;
#endif
}

// The angle of (x, y) for x >= 0, in [-pi/2, pi/2]; 0 where both are 0.
NG_HOST_DEVICE double right_angle(double y, double x) { return std::atan2(y, x); }

NG_HOST_DEVICE float right_angle(float y, float x) {
#if defined(__CUDA_ARCH__)
    return atan2f(y, x);
#else
    // atan on [0, 1] is brought to |t| <= tan(pi/8); the polynomial is that of Cephes (Moshier, 1989).
    const float magnitude = y < 0.0f ? -y : y;
    const bool steep = magnitude > x;
    const float low = steep ? x : magnitude, high = steep ? magnitude : x;
    const bool both_infinite = low > 3.0e38f;
    const float ratio = high > 0.0f ? (both_infinite ? 1.0f : low / high) : 0.0f;
    const bool far = ratio > 0.41421356f;
    const float t = far ? (ratio - 1.0f) / (ratio + 1.0f) : ratio, z = t * t;
    float angle =
        (((8.05374449538e-2f * z - 1.38776856032e-1f) * z + 1.99777106478e-1f) * z - 3.33329491539e-1f) * z *
            t +
        t;
    angle = far ? angle + 0.78539816f : angle;
    angle = steep ? 1.57079633f - angle : angle;
    angle = y < 0.0f ? -angle : angle;
    return x != x || y != y ? x + y : angle;
#endif
}

NG_NAMESPACE_END
