// LAMB (You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", ICLR 2020,
// arXiv 1904.00962), as timm has it.
#pragma once

#include "optim/rule.h"

NG_NAMESPACE_BEGIN

namespace lamb {

constexpr int variants = 1;
constexpr int options =
    7;  // beta1, beta2, first_weight, weight_decay, decoupled weight decay, eps, bias_correction

template <int Variant>
struct Rule : RuleDefaults {
    static constexpr int states = 2;  // exp_avg, exp_avg_sq
    static constexpr int given = 2;   // factors on the gradient and on the step
    static NG_HOST_DEVICE constexpr bool is_signed(int state) { return state == 0; }

    template <class T>
    struct Scalars {
        T clip, first_keep, first_weight, second_keep, second_weight, first_factor, correction, eps, coupled,
            decay, step_size;
    };

    template <class T>
    static NG_HOST_DEVICE Scalars<T> scalars(const double* option, double lr, uint32_t step,
                                             const double* given) {
        const bool corrects = option[6] != 0.0;
        Scalars<T> k;
        k.clip = static_cast<T>(given[0]);
        k.first_keep = static_cast<T>(option[0]);
        k.first_weight = static_cast<T>(option[2]);
        k.second_keep = static_cast<T>(option[1]);
        k.second_weight = static_cast<T>(1.0 - option[1]);
        k.first_factor = static_cast<T>(corrects ? 1.0 / (1.0 - integer_power(option[0], step)) : 1.0);
        k.correction = static_cast<T>(corrects ? std::sqrt(1.0 - integer_power(option[1], step)) : 1.0);
        k.eps = static_cast<T>(option[5]);
        k.coupled = static_cast<T>(option[3]);
        k.decay = static_cast<T>(1.0 - lr * option[4]);
        k.step_size = static_cast<T>(lr * given[1]);
        return k;
    }

    // The step before it is scaled; advances the states.
    template <class T>
    static NG_HOST_DEVICE T direction(T p, T g, T& first, T& second, const Scalars<T>& k) {
        g = g * k.clip;
        first = first * k.first_keep + k.first_weight * g;
        second = second * k.second_keep + k.second_weight * g * g;
        return first * k.first_factor / (std::sqrt(second) / k.correction + k.eps) + k.coupled * p;
    }

    template <class T>
    static NG_HOST_DEVICE void update(T& p, T g, T* state, const Scalars<T>& k) {
        const T u = direction(p, g, state[0], state[1], k);
        p = p * k.decay - k.step_size * u;
    }

    static constexpr int sums = 2;
    static constexpr unsigned sum_reads = param_bit | grad_bit | state_bit(0) | state_bit(1);

    template <class T>
    static NG_HOST_DEVICE void terms(T p, T g, const T* state, const Scalars<T>& k, T* sum) {
        T first = state[0], second = state[1];
        const T u = direction(p, g, first, second, k);
        sum[0] = p * p;
        sum[1] = u * u;
    }
};

}  // namespace lamb

NG_NAMESPACE_END
