// Adam on a projected gradient (GaLore, Zhao et al., ICML 2024). Variant 0 turns the gradient into what is to
// be subtracted once it is projected back, and writes it where a rule writes the parameter; variant 1
// subtracts.
#pragma once

#include "optim/rule.h"

NG_NAMESPACE_BEGIN

namespace low_rank {

constexpr int variants = 2;
constexpr int options = 4;  // beta1, beta2, eps, weight_decay

template <int Variant>
struct Rule : RuleDefaults {
    static constexpr int states = Variant == 0 ? 2 : 0;  // exp_avg, exp_avg_sq
    static constexpr bool heavy = true;
    static NG_HOST_DEVICE constexpr bool is_signed(int state) { return state == 0; }

    template <class T>
    struct Scalars {
        T first_keep, first_weight, second_keep, second_weight, step_size, eps, decay;
    };

    template <class T>
    static NG_HOST_DEVICE Scalars<T> scalars(const double* option, double lr, uint32_t step, const double*) {
        Scalars<T> k;
        k.first_keep = static_cast<T>(option[0]);
        k.first_weight = static_cast<T>(1.0 - option[0]);
        k.second_keep = static_cast<T>(option[1]);
        k.second_weight = static_cast<T>(1.0 - option[1]);
        k.step_size = static_cast<T>(lr * std::sqrt(1.0 - integer_power(option[1], step)) /
                                     (1.0 - integer_power(option[0], step)));
        k.eps = static_cast<T>(option[2]);
        k.decay = static_cast<T>(1.0 - lr * option[3]);
        return k;
    }

    template <class T>
    static NG_HOST_DEVICE void update(T& p, T g, T* state, const Scalars<T>& k) {
        if constexpr (Variant == 0) {
            state[0] = k.first_keep * state[0] + k.first_weight * g;
            state[1] = k.second_keep * state[1] + k.second_weight * g * g;
            p = k.step_size * state[0] / (std::sqrt(state[1]) + k.eps);
        } else {
            p = (p - g) * k.decay;
        }
    }
};

}  // namespace low_rank

NG_NAMESPACE_END
