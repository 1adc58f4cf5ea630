// AdamP (Heo et al., "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights",
// ICLR 2021, arXiv 2006.08217). Sums by rows; the decision is made in Python (optim/adamp.py).
#pragma once

#include "optim/rule.h"

NG_NAMESPACE_BEGIN

namespace adamp {

constexpr int variants = 2;  // 1: nesterov
constexpr int options = 4;   // beta1, beta2, weight_decay, eps

template <int Variant>
struct Rule : RuleDefaults {
    static constexpr bool nesterov = Variant == 1;
    static constexpr int states = 2;  // exp_avg, exp_avg_sq
    static constexpr bool heavy = true;
    static constexpr int given = 1;  // the ratio of the weight decay
    static constexpr bool rows = true;
    static NG_HOST_DEVICE constexpr bool is_signed(int state) { return state == 0; }

    template <class T>
    struct Scalars {
        T decay, first_keep, first_weight, second_keep, second_weight, step_size, correction, eps;
    };

    template <class T>
    static NG_HOST_DEVICE Scalars<T> scalars(const double* option, double lr, uint32_t step,
                                             const double* given) {
        Scalars<T> k;
        k.decay = static_cast<T>(1.0 - lr * option[2] * given[0]);
        k.first_keep = static_cast<T>(option[0]);
        k.first_weight = static_cast<T>(1.0 - option[0]);
        k.second_keep = static_cast<T>(option[1]);
        k.second_weight = static_cast<T>(1.0 - option[1]);
        k.step_size = static_cast<T>(lr / (1.0 - integer_power(option[0], step)));
        k.correction = static_cast<T>(std::sqrt(1.0 - integer_power(option[1], step)));
        k.eps = static_cast<T>(option[3]);
        return k;
    }

    // The direction before the projection; advances the states.
    template <class T>
    static NG_HOST_DEVICE T direction(T g, T& first, T& second, const Scalars<T>& k) {
        first = first * k.first_keep + k.first_weight * g;
        second = second * k.second_keep + k.second_weight * g * g;
        const T numerator = nesterov ? k.first_keep * first + k.first_weight * g : first;
        return numerator / (std::sqrt(second) / k.correction + k.eps);
    }

    // `radial` times the parameter is the part of the direction that is left out; 0 without a projection.
    template <class T>
    static NG_HOST_DEVICE void update(T& p, T g, T* state, const Scalars<T>& k, T radial) {
        const T u = direction(g, state[0], state[1], k);
        p = p * k.decay - k.step_size * (u - radial * p);
    }

    static constexpr int sums = 4;
    static constexpr unsigned sum_reads = param_bit | grad_bit | state_bit(0) | state_bit(1);

    template <class T>
    static NG_HOST_DEVICE void terms(T p, T g, const T* state, const Scalars<T>& k, T* sum) {
        T first = state[0], second = state[1];
        const T u = direction(g, first, second, k);
        sum[0] = g * p;
        sum[1] = g * g;
        sum[2] = p * p;
        sum[3] = u * p;
    }
};

}  // namespace adamp

NG_NAMESPACE_END
