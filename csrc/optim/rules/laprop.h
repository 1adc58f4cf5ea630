// LaProp (Ziyin et al., "LaProp: Separating Momentum and Adaptivity in Adam", arXiv 2002.04839): the momentum
// averages steps that are already normalized, and that contain the learning rate of their time.
#pragma once

#include "optim/rule.h"

NG_NAMESPACE_BEGIN

namespace laprop {

constexpr int variants = 1;
constexpr int options = 4;  // beta1, beta2, weight_decay, eps

template <int Variant>
struct Rule : RuleDefaults {
    static constexpr int states = 2;  // exp_avg, exp_avg_sq
    static constexpr bool heavy = true;
    static constexpr int given = 1;  // factor of the momentum, which corrects its start
    static NG_HOST_DEVICE constexpr bool is_signed(int state) { return state == 0; }

    template <class T>
    struct Scalars {
        T decay, first_keep, first_weight, second_keep, second_weight, least, eps, step_size;
    };

    template <class T>
    static NG_HOST_DEVICE Scalars<T> scalars(const double* option, double lr, uint32_t step,
                                             const double* given) {
        const double correction = std::sqrt(1.0 - integer_power(option[1], step));
        Scalars<T> k;
        k.decay = static_cast<T>(1.0 - lr * option[2]);
        k.first_keep = static_cast<T>(option[0]);
        k.first_weight = static_cast<T>((1.0 - option[0]) * lr * correction);
        k.second_keep = static_cast<T>(option[1]);
        k.second_weight = static_cast<T>(1.0 - option[1]);
        k.least = static_cast<T>(1e-15);
        k.eps = static_cast<T>(option[3]);
        k.step_size = static_cast<T>(given[0]);
        return k;
    }

    template <class T>
    static NG_HOST_DEVICE void update(T& p, T g, T* state, const Scalars<T>& k) {
        const T v = state[1] * k.second_keep + k.second_weight * g * g;
        const T m = state[0] * k.first_keep + k.first_weight * g / (std::sqrt(v + k.least) + k.eps);
        state[0] = m;
        state[1] = v;
        p = (p - k.step_size * m) * k.decay;
    }
};

}  // namespace laprop

NG_NAMESPACE_END
