// Lion (Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023, arXiv 2302.06675).
#pragma once

#include "optim/rule.h"

NG_NAMESPACE_BEGIN

namespace lion {

constexpr int variants = 2;  // 1: cautious
constexpr int options = 3;   // beta1, beta2, weight_decay

template <int Variant>
struct Rule : RuleDefaults {
    static constexpr int states = 1;  // exp_avg
    static constexpr int given = Variant;

    template <class T>
    struct Scalars {
        T decay, first_keep, first_weight, second_keep, second_weight, step_size;
    };

    template <class T>
    static NG_HOST_DEVICE Scalars<T> scalars(const double* option, double lr, uint32_t, const double* given) {
        Scalars<T> k;
        k.decay = static_cast<T>(1.0 - lr * option[2]);
        k.first_keep = static_cast<T>(option[0]);
        k.first_weight = static_cast<T>(1.0 - option[0]);
        k.second_keep = static_cast<T>(option[1]);
        k.second_weight = static_cast<T>(1.0 - option[1]);
        k.step_size = static_cast<T>(Variant ? lr * given[0] : lr);
        return k;
    }

    template <class T>
    static NG_HOST_DEVICE void update(T& p, T g, T* state, const Scalars<T>& k) {
        const T direction = interpolate(state[0], g, k.first_keep, k.first_weight);
        state[0] = interpolate(state[0], g, k.second_keep, k.second_weight);
        T step = direction > T(0) ? k.step_size : direction < T(0) ? -k.step_size : direction;
        if constexpr (Variant) step = direction * g <= T(0) ? T(0) : step;
        p = p * k.decay - step;
    }

    // Cautious: how many elements take part.
    static constexpr int sums = Variant;
    static constexpr unsigned sum_reads = grad_bit | state_bit(0);

    template <class T>
    static NG_HOST_DEVICE void terms(T, T g, const T* state, const Scalars<T>& k, T* sum) {
        const T direction = interpolate(state[0], g, k.first_keep, k.first_weight);
        sum[0] = direction * g > T(0) ? T(1) : T(0);
    }
};

}  // namespace lion

NG_NAMESPACE_END
