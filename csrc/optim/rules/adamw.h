// AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019) and Adam, in the order of
// torch.optim; cautious: Liang et al., arXiv 2411.16085.
#pragma once

#include "optim/rule.h"

NG_NAMESPACE_BEGIN

namespace adamw {

constexpr int variants = 6;  // amsgrad + 2 l2, then 4 + l2: cautious
constexpr int options = 4;   // beta1, beta2, weight_decay, eps

template <int Variant>
struct Rule : RuleDefaults {
    static constexpr bool cautious = Variant >= 4, amsgrad = !cautious && Variant & 1,
                          l2 = Variant & (cautious ? 1 : 2);
    static constexpr int states = amsgrad ? 3 : 2;  // exp_avg, exp_avg_sq, max_exp_avg_sq
    static constexpr int given = cautious ? 1 : 0;  // by how much the steps that are left grow
    static NG_HOST_DEVICE constexpr bool is_signed(int state) { return state == 0; }

    // What a step computes once per parameter: in float64, then rounded to T.
    template <class T>
    struct Scalars {
        T decay, first_keep, first_weight, second_keep, second_weight, step_size, correction, eps, rescale;
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
        k.step_size = static_cast<T>(lr / (1.0 - integer_power(option[0], step)));
        k.correction = static_cast<T>(std::sqrt(1.0 - integer_power(option[1], step)));
        k.eps = static_cast<T>(option[3]);
        k.rescale = static_cast<T>(cautious ? given[0] : 1.0);
        return k;
    }

    template <class T>
    static NG_HOST_DEVICE void update(T& p, T g, T* state, const Scalars<T>& k) {
        if constexpr (l2) g = g + k.decay * p;
        const T m = interpolate(state[0], g, k.first_keep, k.first_weight);
        const T v = state[1] * k.second_keep + k.second_weight * g * g;
        T largest = v;
        if constexpr (amsgrad) {
            largest = v > state[2] || v != v ? v : state[2];
            state[2] = largest;
        }
        state[0] = m;
        state[1] = v;
        if constexpr (!l2) p = p * k.decay;
        T step = k.step_size * m / (std::sqrt(largest) / k.correction + k.eps);
        if constexpr (cautious) step = step * g <= T(0) ? T(0) : step * k.rescale;  // a NaN passes
        p = p - step;
    }

    // Cautious: how many elements take part, those whose momentum still points along the gradient.
    static constexpr int sums = cautious ? 1 : 0;
    static constexpr unsigned sum_reads = grad_bit | state_bit(0) | (l2 ? param_bit : 0);

    template <class T>
    static NG_HOST_DEVICE void terms(T p, T g, const T* state, const Scalars<T>& k, T* sum) {
        if constexpr (l2) g = g + k.decay * p;
        const T m = interpolate(state[0], g, k.first_keep, k.first_weight);
        sum[0] = m * g > T(0) ? T(1) : T(0);
    }
};

}  // namespace adamw

NG_NAMESPACE_END
