// Normalize-and-project (Lyle et al., arXiv 2407.01800): squared norms of parameters or of their rows, and
// scaling those by a number each.
#pragma once

#include "optim/rule.h"

NG_NAMESPACE_BEGIN

namespace nap {

constexpr int variants = 1;
constexpr int options = 0;

template <int Variant>
struct Rule : RuleDefaults {
    static constexpr bool rows = true;

    template <class T>
    struct Scalars {};

    template <class T>
    static NG_HOST_DEVICE Scalars<T> scalars(const double*, double, uint32_t, const double*) {
        return {};
    }

    template <class T>
    static NG_HOST_DEVICE void update(T& p, T, T*, const Scalars<T>&, T factor) {
        p = p * factor;
    }

    static constexpr int sums = 1;
    static constexpr unsigned sum_reads = param_bit;

    template <class T>
    static NG_HOST_DEVICE void terms(T p, T, const T*, const Scalars<T>&, T* sum) {
        sum[0] = p * p;
    }
};

}  // namespace nap

NG_NAMESPACE_END
