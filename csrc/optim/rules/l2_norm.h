// Squared norms, and scaling parameters by a number each.
#pragma once

#include "optim/rule.h"

NG_NAMESPACE_BEGIN

namespace l2_norm {

constexpr int variants = 2;  // 1: of p g instead of g
constexpr int options = 0;

template <int Variant>
struct Rule : RuleDefaults {
    static constexpr int given = 1;

    template <class T>
    struct Scalars {
        T factor;
    };

    template <class T>
    static NG_HOST_DEVICE Scalars<T> scalars(const double*, double, uint32_t, const double* given) {
        return {static_cast<T>(given[0])};
    }

    template <class T>
    static NG_HOST_DEVICE void update(T& p, T, T*, const Scalars<T>& k) {
        p = p * k.factor;
    }

    static constexpr int sums = 1;
    static constexpr unsigned sum_reads = grad_bit | (Variant ? param_bit : 0);

    template <class T>
    static NG_HOST_DEVICE void terms(T p, T g, const T*, const Scalars<T>&, T* sum) {
        const T x = Variant ? p * g : g;
        sum[0] = x * x;
    }
};

}  // namespace l2_norm

NG_NAMESPACE_END
