// Prodigy (Mishchenko and Defazio, arXiv 2306.06101): Adam whose learning rate d is estimated along the way.
#pragma once

#include "optim/rule.h"

NG_NAMESPACE_BEGIN

namespace prodigy {

constexpr int variants = 4;  // l2 + 2 for the first of the two sums
constexpr int options = 5;   // beta1, beta2, beta3, weight_decay, eps

template <int Variant>
struct Rule : RuleDefaults {
    static constexpr bool l2 = Variant & 1, distance = Variant & 2;
    static constexpr int states = distance ? 1 : 3;  // exp_avg, exp_avg_sq, s; or p0, where p began
    static constexpr bool heavy = true;
    static constexpr int given = distance ? 0 : 4;  // d, the learning rate, the weight of g in s, the next d
    static NG_HOST_DEVICE constexpr bool is_signed(int state) { return state != 1; }

    template <class T>
    struct Scalars {
        T first_keep, first_weight, second_keep, second_weight, s_keep, s_weight, decay, rate, eps;
    };

    template <class T>
    static NG_HOST_DEVICE Scalars<T> scalars(const double* option, double, uint32_t, const double* given) {
        Scalars<T> k;
        const double d = given[0], rate = given[1];
        k.first_keep = static_cast<T>(option[0]);
        k.first_weight = static_cast<T>(d * (1.0 - option[0]));
        k.second_keep = static_cast<T>(option[1]);
        k.second_weight = static_cast<T>(d * d * (1.0 - option[1]));
        k.s_keep = static_cast<T>(option[2]);
        k.s_weight = static_cast<T>(given[2]);
        k.decay = static_cast<T>(l2 ? option[3] : 1.0 - rate * option[3]);
        k.rate = static_cast<T>(rate);
        k.eps = static_cast<T>(given[3] * option[4]);
        return k;
    }

    template <class T>
    static NG_HOST_DEVICE void update(T& p, T g, [[maybe_unused]] T* state, const Scalars<T>& k) {
        if constexpr (!distance) {
            if constexpr (l2) g = g + k.decay * p;
            const T m = state[0] * k.first_keep + k.first_weight * g;
            const T v = state[1] * k.second_keep + k.second_weight * g * g;
            state[0] = m;
            state[1] = v;
            state[2] = state[2] * k.s_keep + k.s_weight * g;
            if constexpr (!l2) p = p * k.decay;
            p = p - k.rate * m / (std::sqrt(v) + k.eps);
        }
    }

    // What d is estimated from: <g, p0 - p>, and the norm |s|_1 that s will have.
    static constexpr int sums = 1;
    static constexpr unsigned sum_reads =
        grad_bit | (distance ? param_bit | state_bit(0) : state_bit(2)) | (l2 ? param_bit : 0);

    template <class T>
    static NG_HOST_DEVICE void terms(T p, T g, const T* state, const Scalars<T>& k, T* sum) {
        if constexpr (l2) g = g + k.decay * p;
        if constexpr (distance) {
            sum[0] = g * (state[0] - p);
        } else {
            const T s = state[2] * k.s_keep + k.s_weight * g;
            sum[0] = s < T(0) ? -s : s;
        }
    }
};

}  // namespace prodigy

NG_NAMESPACE_END
