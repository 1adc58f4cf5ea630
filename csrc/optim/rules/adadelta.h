// Adadelta (Zeiler, arXiv 1212.5701), in the form of torch.optim.
#pragma once

#include "optim/rule.h"

NG_NAMESPACE_BEGIN

namespace adadelta {

constexpr int variants = 1;
constexpr int options = 3;  // rho, eps, weight_decay

template <int Variant>
struct Rule : RuleDefaults {
    static constexpr int states = 2;  // square_avg, acc_delta
    static NG_HOST_DEVICE constexpr bool is_signed(int) { return false; }

    template <class T>
    struct Scalars {
        T keep, weight, eps, decay, lr;
    };

    template <class T>
    static NG_HOST_DEVICE Scalars<T> scalars(const double* option, double lr, uint32_t, const double*) {
        Scalars<T> k;
        k.keep = static_cast<T>(option[0]);
        k.weight = static_cast<T>(1.0 - option[0]);
        k.eps = static_cast<T>(option[1]);
        k.decay = static_cast<T>(option[2]);
        k.lr = static_cast<T>(lr);
        return k;
    }

    template <class T>
    static NG_HOST_DEVICE void update(T& p, T g, T* state, const Scalars<T>& k) {
        g = g + k.decay * p;
        const T square = state[0] * k.keep + k.weight * g * g;
        const T delta = std::sqrt(state[1] + k.eps) / std::sqrt(square + k.eps) * g;
        state[0] = square;
        state[1] = state[1] * k.keep + k.weight * delta * delta;
        p = p - k.lr * delta;
    }
};

}  // namespace adadelta

NG_NAMESPACE_END
