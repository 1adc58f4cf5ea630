// SGDP (Heo et al., "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights",
// ICLR 2021, arXiv 2006.08217). Sums by rows; the decision is made in Python (optim/adamp.py).
#pragma once

#include "optim/rule.h"

NG_NAMESPACE_BEGIN

namespace sgdp {

constexpr int variants = 3;  // 1: nesterov, 2: the buffer keeps its radial part
constexpr int options = 3;   // momentum, dampening, weight_decay

template <int Variant>
struct Rule : RuleDefaults {
    static constexpr bool nesterov = Variant == 1, projects_buffer = Variant == 0;
    static constexpr int states = 1;  // momentum
    static constexpr int given = 1;   // the ratio of the weight decay
    static constexpr bool rows = true;

    template <class T>
    struct Scalars {
        T decay, keep, weight, lr;
    };

    template <class T>
    static NG_HOST_DEVICE Scalars<T> scalars(const double* option, double lr, uint32_t, const double* given) {
        Scalars<T> k;
        k.decay = static_cast<T>(1.0 - lr * option[2] * given[0] / (1.0 - option[0]));
        k.keep = static_cast<T>(option[0]);
        k.weight = static_cast<T>(1.0 - option[1]);
        k.lr = static_cast<T>(lr);
        return k;
    }

    // The direction before the projection; advances the buffer.
    template <class T>
    static NG_HOST_DEVICE T direction(T g, T& buffer, const Scalars<T>& k) {
        buffer = buffer * k.keep + k.weight * g;
        return nesterov ? g + k.keep * buffer : buffer;
    }

    // `radial` times the parameter is the part of the direction that is left out; 0 without a projection.
    template <class T>
    static NG_HOST_DEVICE void update(T& p, T g, T* state, const Scalars<T>& k, T radial) {
        const T u = direction(g, state[0], k) - radial * p;
        if constexpr (projects_buffer) state[0] = u;
        p = p * k.decay - k.lr * u;
    }

    static constexpr int sums = 4;
    static constexpr unsigned sum_reads = param_bit | grad_bit | state_bit(0);

    template <class T>
    static NG_HOST_DEVICE void terms(T p, T g, const T* state, const Scalars<T>& k, T* sum) {
        T buffer = state[0];
        const T u = direction(g, buffer, k);
        sum[0] = g * p;
        sum[1] = g * g;
        sum[2] = p * p;
        sum[3] = u * p;
    }
};

}  // namespace sgdp

NG_NAMESPACE_END
