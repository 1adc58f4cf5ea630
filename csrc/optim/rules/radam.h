// RAdam (Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", arXiv 1908.03265), in the
// form of torch.optim.
#pragma once

#include "optim/rule.h"

NG_NAMESPACE_BEGIN

namespace radam {

constexpr int variants = 2;  // 1: decoupled weight decay
constexpr int options = 4;   // beta1, beta2, eps, weight_decay

template <int Variant>
struct Rule : RuleDefaults {
    static constexpr int states = 2;  // exp_avg, exp_avg_sq
    static constexpr bool heavy = true;
    static NG_HOST_DEVICE constexpr bool is_signed(int state) { return state == 0; }

    template <class T>
    struct Scalars {
        T decay, first_keep, first_weight, second_keep, second_weight, eps, step_size, adapts;
    };

    // While too few gradients are known to estimate the variance, the step does not adapt to it.
    template <class T>
    static NG_HOST_DEVICE Scalars<T> scalars(const double* option, double lr, uint32_t step, const double*) {
        const double faded = integer_power(option[1], step), correction = 1.0 - faded;
        const double longest = 2.0 / (1.0 - option[1]) - 1.0;
        const double length = longest - 2.0 * step * faded / correction;
        const bool adapts = length > 5.0;
        const double rectified = (length - 4.0) * (length - 2.0) * longest /
                                 ((longest - 4.0) * (longest - 2.0) * length) * correction;
        const double rate = lr / (1.0 - integer_power(option[0], step));
        Scalars<T> k;
        k.decay = static_cast<T>(Variant ? 1.0 - lr * option[3] : option[3]);
        k.first_keep = static_cast<T>(option[0]);
        k.first_weight = static_cast<T>(1.0 - option[0]);
        k.second_keep = static_cast<T>(option[1]);
        k.second_weight = static_cast<T>(1.0 - option[1]);
        k.eps = static_cast<T>(option[2]);
        k.step_size = static_cast<T>(adapts ? rate * std::sqrt(rectified) : rate);
        k.adapts = T(adapts);
        return k;
    }

    template <class T>
    static NG_HOST_DEVICE void update(T& p, T g, T* state, const Scalars<T>& k) {
        if constexpr (Variant == 0) g = g + k.decay * p;
        const T m = interpolate(state[0], g, k.first_keep, k.first_weight);
        const T v = state[1] * k.second_keep + k.second_weight * g * g;
        state[0] = m;
        state[1] = v;
        if constexpr (Variant == 1) p = p * k.decay;
        const T denominator = std::sqrt(v) + k.eps;
        p = p - k.step_size * m / (k.adapts != T(0) ? denominator : T(1));
    }
};

}  // namespace radam

NG_NAMESPACE_END
