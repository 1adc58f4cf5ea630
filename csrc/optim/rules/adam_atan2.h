// Adam-atan2 (Everett et al., "Scaling Exponents Across Parameterizations and Optimizers", ICML 2024, arXiv
// 2407.05872): the quotient of the moments through atan2, which needs no eps.
#pragma once

#include "common/elementary.h"
#include "optim/rule.h"

NG_NAMESPACE_BEGIN

namespace adam_atan2 {

constexpr int variants = 1;
constexpr int options = 5;  // beta1, beta2, weight_decay, a, b

template <int Variant>
struct Rule : RuleDefaults {
    static constexpr int states = 2;  // exp_avg, exp_avg_sq
    static NG_HOST_DEVICE constexpr bool is_signed(int state) { return state == 0; }

    template <class T>
    struct Scalars {
        T decay, first_keep, first_weight, second_keep, second_weight, step_size, first_correction,
            correction;
    };

    template <class T>
    static NG_HOST_DEVICE Scalars<T> scalars(const double* option, double lr, uint32_t step, const double*) {
        Scalars<T> k;
        k.decay = static_cast<T>(1.0 - lr * option[2]);
        k.first_keep = static_cast<T>(option[0]);
        k.first_weight = static_cast<T>(1.0 - option[0]);
        k.second_keep = static_cast<T>(option[1]);
        k.second_weight = static_cast<T>(1.0 - option[1]);
        k.step_size = static_cast<T>(lr * option[3]);
        k.first_correction = static_cast<T>(1.0 - integer_power(option[0], step));
        k.correction = static_cast<T>(option[4] / std::sqrt(1.0 - integer_power(option[1], step)));
        return k;
    }

    template <class T>
    static NG_HOST_DEVICE void update(T& p, T g, T* state, const Scalars<T>& k) {
        const T m = interpolate(state[0], g, k.first_keep, k.first_weight);
        const T v = state[1] * k.second_keep + k.second_weight * g * g;
        state[0] = m;
        state[1] = v;
        p = p * k.decay - k.step_size * right_angle(m / k.first_correction, std::sqrt(v) * k.correction);
    }
};

}  // namespace adam_atan2

NG_NAMESPACE_END
