// Stochastic gradient descent with momentum (Sutskever et al., "On the importance of initialization and
// momentum in deep learning", ICML 2013), in the form of torch.optim.
#pragma once

#include "optim/rule.h"

NG_NAMESPACE_BEGIN

namespace sgd {

constexpr int variants = 3;  // plain, momentum, Nesterov's momentum
constexpr int options = 3;   // momentum, dampening, weight_decay

template <int Variant>
struct Rule : RuleDefaults {
    static constexpr int states = Variant ? 1 : 0;  // momentum_buffer

    template <class T>
    struct Scalars {
        T decay, keep, weight, momentum, lr;
    };

    // The first gradient enters the buffer undamped.
    template <class T>
    static NG_HOST_DEVICE Scalars<T> scalars(const double* option, double lr, uint32_t step, const double*) {
        Scalars<T> k;
        k.decay = static_cast<T>(option[2]);
        k.keep = static_cast<T>(step == 1 ? 0.0 : option[0]);
        k.weight = static_cast<T>(step == 1 ? 1.0 : 1.0 - option[1]);
        k.momentum = static_cast<T>(option[0]);
        k.lr = static_cast<T>(lr);
        return k;
    }

    template <class T>
    static NG_HOST_DEVICE void update(T& p, T g, T* state, const Scalars<T>& k) {
        g = g + k.decay * p;
        if constexpr (Variant != 0) {
            const T buffer = state[0] * k.keep + k.weight * g;
            state[0] = buffer;
            g = Variant == 2 ? g + k.momentum * buffer : buffer;
        }
        p = p - k.lr * g;
    }
};

}  // namespace sgd

NG_NAMESPACE_END
