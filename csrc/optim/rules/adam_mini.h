// Adam-mini (Zhang et al., "Adam-mini: Use Fewer Learning Rates To Gain More", ICLR 2025, arXiv 2406.16793).
// One second moment per row, which Python keeps (optim/adam_mini.py).
#pragma once

#include "optim/rule.h"

NG_NAMESPACE_BEGIN

namespace adam_mini {

constexpr int variants = 1;
constexpr int options = 2;  // beta1, weight_decay

template <int Variant>
struct Rule : RuleDefaults {
    static constexpr int states = 1;  // m
    static constexpr bool rows = true;

    template <class T>
    struct Scalars {
        T decay, keep, weight;
    };

    template <class T>
    static NG_HOST_DEVICE Scalars<T> scalars(const double* option, double lr, uint32_t, const double*) {
        return {static_cast<T>(1.0 - lr * option[1]), static_cast<T>(option[0]),
                static_cast<T>(1.0 - option[0])};
    }

    template <class T>
    static NG_HOST_DEVICE void update(T& p, T g, T* state, const Scalars<T>& k, T step_size) {
        state[0] = state[0] * k.keep + k.weight * g;
        p = p * k.decay - step_size * state[0];
    }

    static constexpr int sums = 1;
    static constexpr unsigned sum_reads = grad_bit;

    template <class T>
    static NG_HOST_DEVICE void terms(T, T g, const T*, const Scalars<T>&, T* sum) {
        sum[0] = g * g;
    }
};

}  // namespace adam_mini

NG_NAMESPACE_END
