// SAM (Foret et al., arXiv 2010.01412) and its scale-invariant form (Kwon et al., arXiv 2102.11600): the
// climb along the gradient. The state takes the value from before it.
#pragma once

#include "optim/rule.h"

NG_NAMESPACE_BEGIN

namespace sam {

constexpr int variants = 2;  // 1: adaptive, gradients are weighted with |p|
constexpr int options = 0;

template <int Variant>
struct Rule : RuleDefaults {
    static constexpr bool adaptive = Variant == 1;
    static constexpr int states = 1;
    static constexpr int given = 1;  // rho over the norm of all weighted gradients

    template <class T>
    struct Scalars {
        T factor;
    };

    template <class T>
    static NG_HOST_DEVICE Scalars<T> scalars(const double*, double, uint32_t, const double* given) {
        return {static_cast<T>(given[0])};
    }

    template <class T>
    static NG_HOST_DEVICE void update(T& p, T g, T* state, const Scalars<T>& k) {
        const T old = p;
        if constexpr (adaptive) g = old * old * g;
        p = k.factor != T(0) ? old + k.factor * g : old;  // also where g is not finite
        state[0] = old;
    }

    static constexpr int sums = 1;
    static constexpr unsigned sum_reads = grad_bit | (adaptive ? param_bit : 0);

    template <class T>
    static NG_HOST_DEVICE void terms(T p, T g, const T*, const Scalars<T>&, T* sum) {
        if constexpr (adaptive) g = p * g;
        sum[0] = g * g;
    }
};

}  // namespace sam

NG_NAMESPACE_END
