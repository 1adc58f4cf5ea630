// LARS (You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", arXiv 1708.03888).
#pragma once

#include "optim/rule.h"

NG_NAMESPACE_BEGIN

namespace lars {

constexpr int variants = 3;  // 1: nesterov, 2: no momentum
constexpr int options = 2;   // momentum, dampening

template <int Variant>
struct Rule : RuleDefaults {
    static constexpr bool nesterov = Variant == 1;
    static constexpr int states = Variant == 2 ? 0 : 1;  // momentum_buffer
    static constexpr int given = 2;                      // trust ratio, weight decay

    template <class T>
    struct Scalars {
        T trust, weight_decay, keep, weight, lr;
    };

    template <class T>
    static NG_HOST_DEVICE Scalars<T> scalars(const double* option, double lr, uint32_t, const double* given) {
        return {static_cast<T>(given[0]), static_cast<T>(given[1]), static_cast<T>(option[0]),
                static_cast<T>(1.0 - option[1]), static_cast<T>(lr)};
    }

    template <class T>
    static NG_HOST_DEVICE void update(T& p, T g, T* state, const Scalars<T>& k) {
        T u = (g + k.weight_decay * p) * k.trust;
        if constexpr (states > 0) {
            state[0] = state[0] * k.keep + k.weight * u;
            u = nesterov ? u + k.keep * state[0] : state[0];
        }
        p = p - k.lr * u;
    }

    static constexpr int sums = 2;
    static constexpr unsigned sum_reads = param_bit | grad_bit;

    template <class T>
    static NG_HOST_DEVICE void terms(T p, T g, const T*, const Scalars<T>&, T* sum) {
        sum[0] = p * p;
        sum[1] = g * g;
    }
};

}  // namespace lars

NG_NAMESPACE_END
