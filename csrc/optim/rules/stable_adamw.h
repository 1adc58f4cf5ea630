// StableAdamW (Wortsman et al., "Stable and low-precision training for large-scale vision-language models",
// NeurIPS 2023, arXiv 2304.13013): AdamW with the step clipped as in Adafactor.
#pragma once

#include "optim/rule.h"

NG_NAMESPACE_BEGIN

namespace stable_adamw {

constexpr int variants = 1;
constexpr int options = 4;  // beta1, beta2, weight_decay, eps

template <int Variant>
struct Rule : RuleDefaults {
    static constexpr int states = 2;  // exp_avg, exp_avg_sq
    static constexpr int given = 1;   // factor on the learning rate
    static NG_HOST_DEVICE constexpr bool is_signed(int state) { return state == 0; }

    template <class T>
    struct Scalars {
        T decay, first_keep, first_weight, second_keep, second_weight, lr, eps, least;
    };

    template <class T>
    static NG_HOST_DEVICE Scalars<T> scalars(const double* option, double lr, uint32_t step,
                                             const double* given) {
        const double first = (1.0 - option[0]) * (1.0 / (1.0 - integer_power(option[0], step))),
                     second = (1.0 - option[1]) * (1.0 / (1.0 - integer_power(option[1], step))),
                     rate = lr * given[0];
        Scalars<T> k;
        k.decay = static_cast<T>(1.0 - rate * option[2]);
        k.first_keep = static_cast<T>(1.0 - first);
        k.first_weight = static_cast<T>(first);
        k.second_keep = static_cast<T>(1.0 - second);
        k.second_weight = static_cast<T>(second);
        k.lr = static_cast<T>(rate);
        k.eps = static_cast<T>(option[3]);
        k.least = static_cast<T>(option[3] * option[3]);
        return k;
    }

    template <class T>
    static NG_HOST_DEVICE void update(T& p, T g, T* state, const Scalars<T>& k) {
        state[0] = state[0] * k.first_keep + k.first_weight * g;
        state[1] = state[1] * k.second_keep + k.second_weight * g * g;
        p = p * k.decay - k.lr * state[0] / (std::sqrt(state[1]) + k.eps);
    }

    static constexpr int sums = 1;
    static constexpr unsigned sum_reads = grad_bit | state_bit(1);

    template <class T>
    static NG_HOST_DEVICE void terms(T, T g, const T* state, const Scalars<T>& k, T* sum) {
        const T v = state[1] * k.second_keep + k.second_weight * g * g;
        sum[0] = g * g / (v > k.least ? v : k.least);
    }
};

}  // namespace stable_adamw

NG_NAMESPACE_END
