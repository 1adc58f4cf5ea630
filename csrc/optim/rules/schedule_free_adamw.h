// Schedule-free AdamW (Defazio et al., "The Road Less Scheduled", arXiv 2405.15682). The parameter is the
// point y where gradients are taken; z takes the steps, and their average follows from both.
#pragma once

#include "optim/rule.h"

NG_NAMESPACE_BEGIN

namespace schedule_free_adamw {

constexpr int variants = 1;
constexpr int options = 4;  // beta1, beta2, weight_decay, eps

template <int Variant>
struct Rule : RuleDefaults {
    static constexpr int states = 2;  // z, exp_avg_sq
    static constexpr int given = 3;   // the rate, the average's weight, the second moment's correction
    static NG_HOST_DEVICE constexpr bool is_signed(int state) { return state == 0; }

    template <class T>
    struct Scalars {
        T second_keep, second_weight, correction, eps, decay, average_keep, average_weight, step_size, rate;
    };

    template <class T>
    static NG_HOST_DEVICE Scalars<T> scalars(const double* option, double, uint32_t, const double* given) {
        Scalars<T> k;
        k.second_keep = static_cast<T>(option[1]);
        k.second_weight = static_cast<T>(1.0 - option[1]);
        k.correction = static_cast<T>(given[2]);
        k.eps = static_cast<T>(option[3]);
        k.decay = static_cast<T>(option[2]);
        k.average_keep = static_cast<T>(1.0 - given[1]);
        k.average_weight = static_cast<T>(given[1]);
        k.step_size = static_cast<T>(given[0] * (1.0 - option[0] * (1.0 - given[1])));
        k.rate = static_cast<T>(given[0]);
        return k;
    }

    template <class T>
    static NG_HOST_DEVICE void update(T& p, T g, T* state, const Scalars<T>& k) {
        const T z = state[0], v = state[1] * k.second_keep + k.second_weight * g * g;
        const T direction = g / (std::sqrt(v) / k.correction + k.eps) + k.decay * p;
        p = interpolate(p, z, k.average_keep, k.average_weight) - k.step_size * direction;
        state[0] = z - k.rate * direction;
        state[1] = v;
    }
};

}  // namespace schedule_free_adamw

NG_NAMESPACE_END
