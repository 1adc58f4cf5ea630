// Adagrad (Duchi, Hazan and Singer, JMLR 12, 2011), in the form of torch.optim.
#pragma once

#include "optim/rule.h"

NG_NAMESPACE_BEGIN

namespace adagrad {

constexpr int variants = 1;
constexpr int options = 3;  // lr_decay, weight_decay, eps

template <int Variant>
struct Rule : RuleDefaults {
    static constexpr int states = 1;  // sum
    static NG_HOST_DEVICE constexpr bool is_signed(int) { return false; }

    template <class T>
    struct Scalars {
        T decay, eps, step_size;
    };

    template <class T>
    static NG_HOST_DEVICE Scalars<T> scalars(const double* option, double lr, uint32_t step, const double*) {
        Scalars<T> k;
        k.decay = static_cast<T>(option[1]);
        k.eps = static_cast<T>(option[2]);
        k.step_size = static_cast<T>(lr / (1.0 + (step - 1.0) * option[0]));
        return k;
    }

    template <class T>
    static NG_HOST_DEVICE void update(T& p, T g, T* state, const Scalars<T>& k) {
        g = g + k.decay * p;
        const T sum = state[0] + g * g;
        state[0] = sum;
        p = p - k.step_size * g / (std::sqrt(sum) + k.eps);
    }
};

}  // namespace adagrad

NG_NAMESPACE_END
