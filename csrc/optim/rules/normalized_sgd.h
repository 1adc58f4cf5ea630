// Gradient descent along the gradient times a number per row, one over a norm.
#pragma once

#include "optim/rule.h"

NG_NAMESPACE_BEGIN

namespace normalized_sgd {

constexpr int variants = 2;  // 1: with momentum
constexpr int options = 1;   // momentum

template <int Variant>
struct Rule : RuleDefaults {
    static constexpr int states = Variant;  // momentum_buffer
    static constexpr bool rows = true;

    template <class T>
    struct Scalars {
        T lr, momentum;
    };

    template <class T>
    static NG_HOST_DEVICE Scalars<T> scalars(const double* option, double lr, uint32_t, const double*) {
        return {static_cast<T>(lr), static_cast<T>(option[0])};
    }

    template <class T>
    static NG_HOST_DEVICE void update(T& p, T g, T* state, const Scalars<T>& k, T factor) {
        T direction = g * factor;
        if constexpr (Variant == 1) {
            direction = k.momentum * state[0] + direction;
            state[0] = direction;
        }
        p = p - k.lr * direction;
    }

    static constexpr int sums = 1;
    static constexpr unsigned sum_reads = grad_bit;

    template <class T>
    static NG_HOST_DEVICE void terms(T, T g, const T*, const Scalars<T>&, T* sum) {
        sum[0] = g * g;
    }
};

}  // namespace normalized_sgd

NG_NAMESPACE_END
