// ADOPT (Taniguchi et al., "ADOPT: Modified Adam Can Converge with Any beta2 with the Optimal Rate", NeurIPS
// 2024, arXiv 2411.02853): gradients are divided by the second moment of the steps before, and averaged after
// that.
#pragma once

#include "optim/rule.h"

NG_NAMESPACE_BEGIN

namespace adopt {

constexpr int variants = 2;  // 1: decoupled weight decay
constexpr int options = 4;   // beta1, beta2, weight_decay, eps

template <int Variant>
struct Rule : RuleDefaults {
    static constexpr int states = 2;  // exp_avg, exp_avg_sq
    static constexpr int given = 1;   // the largest normalized gradient
    static NG_HOST_DEVICE constexpr bool is_signed(int state) { return state == 0; }

    template <class T>
    struct Scalars {
        T decay, first_keep, first_weight, second_keep, second_weight, lr, eps, clip;
    };

    // The first step only fills the second moment.
    template <class T>
    static NG_HOST_DEVICE Scalars<T> scalars(const double* option, double lr, uint32_t step,
                                             const double* given) {
        const bool first = step == 1;
        Scalars<T> k;
        k.decay = static_cast<T>(Variant ? 1.0 - lr * option[2] : option[2]);
        k.first_keep = static_cast<T>(first ? 1.0 : option[0]);
        k.first_weight = static_cast<T>(first ? 0.0 : 1.0 - option[0]);
        k.second_keep = static_cast<T>(first ? 0.0 : option[1]);
        k.second_weight = static_cast<T>(first ? 1.0 : 1.0 - option[1]);
        k.lr = static_cast<T>(first ? 0.0 : lr);
        k.eps = static_cast<T>(option[3]);
        k.clip = static_cast<T>(given[0]);
        return k;
    }

    template <class T>
    static NG_HOST_DEVICE void update(T& p, T g, T* state, const Scalars<T>& k) {
        if constexpr (Variant == 0) g = g + k.decay * p;
        const T root = std::sqrt(state[1]);
        const T u = g / (root < k.eps ? k.eps : root);  // a NaN passes, here and below
        const T clipped = u > k.clip ? k.clip : (u < -k.clip ? -k.clip : u);
        const T m =
            k.first_weight > T(0) ? interpolate(state[0], clipped, k.first_keep, k.first_weight) : state[0];
        state[0] = m;
        state[1] = state[1] * k.second_keep + k.second_weight * g * g;
        if constexpr (Variant == 1) p = p * k.decay;
        p = p - k.lr * m;
    }
};

}  // namespace adopt

NG_NAMESPACE_END
