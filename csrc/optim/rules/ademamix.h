// AdEMAMix (Pagliardini, Ablin, Grangier, ICLR 2025, arXiv 2409.03137): Adam with a second, slow momentum.
#pragma once

#include "optim/rule.h"

NG_NAMESPACE_BEGIN

namespace ademamix {

constexpr int variants = 2;  // 1: weight decay in the gradient
constexpr int options = 4;   // beta1, beta2, weight_decay, eps

template <int Variant>
struct Rule : RuleDefaults {
    static constexpr bool l2 = Variant == 1;
    static constexpr int states = 3;  // exp_avg, exp_avg_sq, exp_avg_slow
    static constexpr int given = 2;   // alpha and beta3 of this step
    static NG_HOST_DEVICE constexpr bool is_signed(int state) { return state != 1; }

    template <class T>
    struct Scalars {
        T decay, first_keep, first_weight, second_keep, second_weight, slow_keep, slow_weight, alpha,
            first_correction, correction, lr, eps;
    };

    template <class T>
    static NG_HOST_DEVICE Scalars<T> scalars(const double* option, double lr, uint32_t step,
                                             const double* given) {
        Scalars<T> k;
        k.decay = static_cast<T>(l2 ? option[2] : 1.0 - lr * option[2]);
        k.first_keep = static_cast<T>(option[0]);
        k.first_weight = static_cast<T>(1.0 - option[0]);
        k.second_keep = static_cast<T>(option[1]);
        k.second_weight = static_cast<T>(1.0 - option[1]);
        k.alpha = static_cast<T>(given[0]);
        k.slow_keep = static_cast<T>(given[1]);
        k.slow_weight = static_cast<T>(1.0 - given[1]);
        k.first_correction = static_cast<T>(1.0 - integer_power(option[0], step));
        k.correction = static_cast<T>(std::sqrt(1.0 - integer_power(option[1], step)));
        k.lr = static_cast<T>(lr);
        k.eps = static_cast<T>(option[3]);
        return k;
    }

    template <class T>
    static NG_HOST_DEVICE void update(T& p, T g, T* state, const Scalars<T>& k) {
        if constexpr (l2) g = g + k.decay * p;
        const T m = interpolate(state[0], g, k.first_keep, k.first_weight);
        const T v = state[1] * k.second_keep + k.second_weight * g * g;
        const T slow = interpolate(state[2], g, k.slow_keep, k.slow_weight);
        state[0] = m;
        state[1] = v;
        state[2] = slow;
        if constexpr (!l2) p = p * k.decay;
        p = p - k.lr * (m / k.first_correction + k.alpha * slow) / (std::sqrt(v) / k.correction + k.eps);
    }
};

}  // namespace ademamix

NG_NAMESPACE_END
