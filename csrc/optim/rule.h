// What every update rule needs.
//
// A rule is a struct with the arithmetic of one element, shared by the CPU and the CUDA skeleton;
// adamw_rule.h is the example. It has `states`, how many numbers it keeps per element; `is_signed(k)`, which
// 8-bit map state k takes; `Scalars<T>` and `scalars(options, lr, step)`, what is the same for all elements
// of a parameter; and `update`.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/config.h"

NG_NAMESPACE_BEGIN

// base^exponent by squaring. Multiplications round alike everywhere; pow does not.
NG_HOST_DEVICE double integer_power(double base, uint32_t exponent) {
    double power = 1.0;
    for (; exponent != 0; exponent >>= 1, base *= base) {
        if (exponent & 1u) power *= base;
    }
    return power;
}

NG_NAMESPACE_END
