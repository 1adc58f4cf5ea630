// What every update rule needs, and what it may have.
//
// A rule is one file in rules/: the namespace named after it holds `variants`, `options` (how many numbers
// the step takes) and `Rule<variant>`, the arithmetic of one element, shared by the CPU and the CUDA
// skeleton. adamw.h is the example, adamp.h the one with a reduction. Python's record
// (narrowgauge/optim/elementwise.py) says the same in PyTorch.
//
//   states                     how many numbers it keeps per element
//   is_signed(k)               whether state k takes negative values, which its 8-bit map must know
//   Scalars<T>                 what is the same for all elements of a parameter, computed once
//   scalars<T>(options, lr, step, given)
//   given                      how many numbers it is given beside the options, per parameter
//   update(p, g, state, k)     the step of one element; rules with `rows` take the number of its row as well
//
// A rule whose step depends on sums over a parameter (or over its rows) has
//
//   sums                       how many
//   sum_reads                  what they are made of: param_bit | grad_bit | state_bit(k)
//   terms(p, g, state, k, sum) what one element adds to each
//
// Sums never change anything: Python turns them into what the rule is `given`, then the step runs.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/config.h"

NG_NAMESPACE_BEGIN

constexpr unsigned param_bit = 1, grad_bit = 2;
NG_HOST_DEVICE constexpr unsigned state_bit(int k) { return 4u << k; }

struct RuleDefaults {
    static constexpr int states = 0, sums = 0, given = 0;
    static constexpr bool rows = false;
    static constexpr bool heavy = false;  // needs more registers than others with as many states
    static constexpr unsigned sum_reads = 0;
    static NG_HOST_DEVICE constexpr bool is_signed(int) { return true; }
};

// base^exponent by squaring. Multiplications round alike everywhere; pow does not.
NG_HOST_DEVICE double integer_power(double base, uint32_t exponent) {
    double power = 1.0;
    for (; exponent != 0; exponent >>= 1, base *= base) {
        if (exponent & 1u) power *= base;
    }
    return power;
}

// (1 - weight) a + weight b, exact at both ends. `keep` is 1 - weight, rounded on its own.
template <class T>
NG_HOST_DEVICE T interpolate(T a, T b, T keep, T weight) {
    const T difference = b - a;
    return weight < T(0.5) ? a + weight * difference : b - keep * difference;
}

NG_NAMESPACE_END
