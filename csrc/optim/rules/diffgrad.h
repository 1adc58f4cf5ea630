// diffGrad (Dubey et al., "diffGrad: An Optimization Method for Convolutional Neural Networks", IEEE TNNLS
// 2020, arXiv 1909.11015): Adam, slowed down where the gradient does not change.
#pragma once

#include "common/elementary.h"
#include "optim/rule.h"

NG_NAMESPACE_BEGIN

namespace diffgrad {

constexpr int variants = 4;  // 1: decoupled weight decay; + 2: amsgrad
constexpr int options = 4;   // beta1, beta2, weight_decay, eps

template <int Variant>
struct Rule : RuleDefaults {
    static constexpr bool decoupled = Variant & 1, amsgrad = Variant & 2;
    static constexpr int states = amsgrad ? 4 : 3;  // exp_avg, exp_avg_sq, previous_grad, max_exp_avg_sq
    static constexpr bool heavy = true;
    static NG_HOST_DEVICE constexpr bool is_signed(int state) { return state == 0 || state == 2; }

    template <class T>
    struct Scalars {
        T decay, first_keep, first_weight, second_keep, second_weight, step_size, eps;
    };

    template <class T>
    static NG_HOST_DEVICE Scalars<T> scalars(const double* option, double lr, uint32_t step, const double*) {
        Scalars<T> k;
        k.decay = static_cast<T>(decoupled ? 1.0 - lr * option[2] : option[2]);
        k.first_keep = static_cast<T>(option[0]);
        k.first_weight = static_cast<T>(1.0 - option[0]);
        k.second_keep = static_cast<T>(option[1]);
        k.second_weight = static_cast<T>(1.0 - option[1]);
        k.step_size = static_cast<T>(lr * std::sqrt(1.0 - integer_power(option[1], step)) /
                                     (1.0 - integer_power(option[0], step)));
        k.eps = static_cast<T>(option[3]);
        return k;
    }

    template <class T>
    static NG_HOST_DEVICE void update(T& p, T g, T* state, const Scalars<T>& k) {
        if constexpr (!decoupled) g = g + k.decay * p;
        const T m = interpolate(state[0], g, k.first_keep, k.first_weight);
        const T v = state[1] * k.second_keep + k.second_weight * g * g;
        const T change = state[2] - g, distance = change < T(0) ? change : -change;
        T largest = v;
        if constexpr (amsgrad) {
            largest = v > state[3] || v != v ? v : state[3];
            state[3] = largest;
        }
        state[0] = m;
        state[1] = v;
        state[2] = g;
        const T friction = T(1) / (T(1) + decaying_exp(distance));
        if constexpr (decoupled) p = p * k.decay;
        p = p - k.step_size * (m * friction) / (std::sqrt(largest) + k.eps);
    }
};

}  // namespace diffgrad

NG_NAMESPACE_END
