// Adan (Xie et al., "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models", TPAMI
// 2024, arXiv 2208.06677).
#pragma once

#include "optim/rule.h"

NG_NAMESPACE_BEGIN

namespace adan {

constexpr int variants = 2;  // 1: decoupled weight decay
constexpr int options = 5;   // beta1, beta2, beta3, weight_decay, eps

template <int Variant>
struct Rule : RuleDefaults {
    static constexpr int states = 4;  // exp_avg, exp_avg_sq, exp_avg_diff, previous_grad (negated)
    static NG_HOST_DEVICE constexpr bool is_signed(int state) { return state != 1; }

    template <class T>
    struct Scalars {
        T has_previous, first_keep, first_weight, diff_keep, diff_weight, second_keep, second_weight,
            first_size, diff_size, correction, eps, decay;
    };

    template <class T>
    static NG_HOST_DEVICE Scalars<T> scalars(const double* option, double lr, uint32_t step, const double*) {
        Scalars<T> k;
        k.has_previous = static_cast<T>(step > 1 ? 1.0 : 0.0);
        k.first_keep = static_cast<T>(option[0]);
        k.first_weight = static_cast<T>(1.0 - option[0]);
        k.diff_keep = static_cast<T>(option[1]);
        k.diff_weight = static_cast<T>(1.0 - option[1]);
        k.second_keep = static_cast<T>(option[2]);
        k.second_weight = static_cast<T>(1.0 - option[2]);
        k.first_size = static_cast<T>(lr / (1.0 - integer_power(option[0], step)));
        k.diff_size = static_cast<T>(lr * option[1] / (1.0 - integer_power(option[1], step)));
        k.correction = static_cast<T>(std::sqrt(1.0 - integer_power(option[2], step)));
        k.eps = static_cast<T>(option[4]);
        k.decay = static_cast<T>(Variant ? 1.0 - lr * option[3] : 1.0 / (1.0 + lr * option[3]));
        return k;
    }

    template <class T>
    static NG_HOST_DEVICE void update(T& p, T g, T* state, const Scalars<T>& k) {
        const T diff = k.has_previous > T(0) ? g + state[3] : T(0);
        const T ahead = g + k.diff_keep * diff;
        const T m = interpolate(state[0], g, k.first_keep, k.first_weight);
        const T n = interpolate(state[2], diff, k.diff_keep, k.diff_weight);
        const T v = state[1] * k.second_keep + k.second_weight * ahead * ahead;
        state[0] = m;
        state[1] = v;
        state[2] = n;
        state[3] = -g;
        const T step = (k.first_size * m + k.diff_size * n) / (std::sqrt(v) / k.correction + k.eps);
        p = Variant ? p * k.decay - step : (p - step) * k.decay;
    }
};

}  // namespace adan

NG_NAMESPACE_END
