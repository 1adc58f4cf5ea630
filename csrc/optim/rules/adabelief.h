// AdaBelief (Zhuang et al., "AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients",
// NeurIPS 2020, arXiv 2010.07468): steps are short where gradients differ from what the momentum expects.
#pragma once

#include "optim/rule.h"

NG_NAMESPACE_BEGIN

namespace adabelief {

constexpr int variants = 2;  // 1: L2 penalty
constexpr int options = 4;   // beta1, beta2, weight_decay, eps

template <int Variant>
struct Rule : RuleDefaults {
    static constexpr int states = 2;  // exp_avg, exp_avg_var
    static NG_HOST_DEVICE constexpr bool is_signed(int state) { return state == 0; }

    template <class T>
    struct Scalars {
        T decay, first_keep, first_weight, second_keep, second_weight, step_size, eps;
    };

    template <class T>
    static NG_HOST_DEVICE Scalars<T> scalars(const double* option, double lr, uint32_t step, const double*) {
        const double correction = std::sqrt(1.0 - integer_power(option[1], step));
        Scalars<T> k;
        k.decay = static_cast<T>(Variant ? option[2] : 1.0 - lr * option[2]);
        k.first_keep = static_cast<T>(option[0]);
        k.first_weight = static_cast<T>(1.0 - option[0]);
        k.second_keep = static_cast<T>(option[1]);
        k.second_weight = static_cast<T>(1.0 - option[1]);
        k.step_size = static_cast<T>(lr * correction / (1.0 - integer_power(option[0], step)));
        k.eps = static_cast<T>(option[3]);
        return k;
    }

    template <class T>
    static NG_HOST_DEVICE void update(T& p, T g, T* state, const Scalars<T>& k) {
        if constexpr (Variant == 1) g = g + k.decay * p;
        const T m = interpolate(state[0], g, k.first_keep, k.first_weight);
        const T surprise = g - m;
        const T v = state[1] * k.second_keep + k.second_weight * surprise * surprise + k.eps;
        state[0] = m;
        state[1] = v;
        if constexpr (Variant == 0) p = p * k.decay;
        p = p - k.step_size * m / (std::sqrt(v) + k.eps);
    }
};

}  // namespace adabelief

NG_NAMESPACE_END
