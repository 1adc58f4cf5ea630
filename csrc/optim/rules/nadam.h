// NAdam (Dozat, "Incorporating Nesterov Momentum into Adam", ICLR 2016 workshop), in the form of torch.optim.
#pragma once

#include "optim/rule.h"

NG_NAMESPACE_BEGIN

namespace nadam {

constexpr int variants = 2;  // 1: decoupled weight decay
constexpr int options = 4;   // beta1, beta2, eps, weight_decay

template <int Variant>
struct Rule : RuleDefaults {
    static constexpr int states = 2;  // exp_avg, exp_avg_sq
    static constexpr int given = 2;   // shares of the gradient and of the first moment in the step
    static NG_HOST_DEVICE constexpr bool is_signed(int state) { return state == 0; }

    template <class T>
    struct Scalars {
        T decay, first_keep, first_weight, second_keep, second_weight, correction, eps, gradient_size,
            moment_size;
    };

    template <class T>
    static NG_HOST_DEVICE Scalars<T> scalars(const double* option, double lr, uint32_t step,
                                             const double* given) {
        Scalars<T> k;
        k.decay = static_cast<T>(Variant ? 1.0 - lr * option[3] : option[3]);
        k.first_keep = static_cast<T>(option[0]);
        k.first_weight = static_cast<T>(1.0 - option[0]);
        k.second_keep = static_cast<T>(option[1]);
        k.second_weight = static_cast<T>(1.0 - option[1]);
        k.correction = static_cast<T>(std::sqrt(1.0 - integer_power(option[1], step)));
        k.eps = static_cast<T>(option[2]);
        k.gradient_size = static_cast<T>(lr * given[0]);
        k.moment_size = static_cast<T>(lr * given[1]);
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
        p = p - (k.gradient_size * g + k.moment_size * m) / (std::sqrt(v) / k.correction + k.eps);
    }
};

}  // namespace nadam

NG_NAMESPACE_END
