// RMSprop (Tieleman and Hinton, lecture 6.5 of "Neural Networks for Machine Learning", 2012; centered:
// Graves, arXiv 1308.0850), in the form of torch.optim.
#pragma once

#include "optim/rule.h"

NG_NAMESPACE_BEGIN

namespace rmsprop {

constexpr int variants = 4;  // momentum + 2 centered
constexpr int options = 4;   // alpha, eps, weight_decay, momentum

template <int Variant>
struct Rule : RuleDefaults {
    static constexpr bool momentum = Variant & 1, centered = Variant & 2;
    static constexpr int average = momentum ? 2 : 1;        // where grad_avg is
    static constexpr int states = 1 + momentum + centered;  // square_avg, momentum_buffer, grad_avg
    static NG_HOST_DEVICE constexpr bool is_signed(int state) { return state > 0; }

    template <class T>
    struct Scalars {
        T keep, weight, eps, decay, momentum, lr;
    };

    template <class T>
    static NG_HOST_DEVICE Scalars<T> scalars(const double* option, double lr, uint32_t, const double*) {
        Scalars<T> k;
        k.keep = static_cast<T>(option[0]);
        k.weight = static_cast<T>(1.0 - option[0]);
        k.eps = static_cast<T>(option[1]);
        k.decay = static_cast<T>(option[2]);
        k.momentum = static_cast<T>(option[3]);
        k.lr = static_cast<T>(lr);
        return k;
    }

    template <class T>
    static NG_HOST_DEVICE void update(T& p, T g, T* state, const Scalars<T>& k) {
        g = g + k.decay * p;
        T spread = state[0] * k.keep + k.weight * g * g;
        state[0] = spread;
        if constexpr (centered) {
            const T mean = interpolate(state[average], g, k.keep, k.weight);
            state[average] = mean;
            spread = spread - mean * mean;
        }
        const T denominator = std::sqrt(spread) + k.eps;
        if constexpr (momentum) {
            const T buffer = state[1] * k.momentum + g / denominator;
            state[1] = buffer;
            p = p - k.lr * buffer;
        } else {
            p = p - k.lr * g / denominator;
        }
    }
};

}  // namespace rmsprop

NG_NAMESPACE_END
