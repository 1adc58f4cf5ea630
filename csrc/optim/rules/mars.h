// MARS-AdamW (Yuan et al., "MARS: Unleashing the Power of Variance Reduction for Training Large Models",
// arXiv 2411.10438): AdamW of gradients that are corrected by how they changed. Vectors take plain AdamW.
#pragma once

#include "optim/rule.h"

NG_NAMESPACE_BEGIN

namespace mars {

constexpr int variants = 1;
// gamma and eps, then of matrices and of vectors: beta1, beta2, weight_decay; then the rate of vectors over
// lr
constexpr int options = 9;

template <int Variant>
struct Rule : RuleDefaults {
    static constexpr int states = 3;  // exp_avg, exp_avg_sq, last_grad
    static constexpr int given =
        2;  // 1 for a matrix, 0 for a vector; the factor that clips the corrected gradient
    static NG_HOST_DEVICE constexpr bool is_signed(int state) { return state != 1; }

    template <class T>
    struct Scalars {
        T gain, clip, decay, first_keep, first_weight, second_keep, second_weight, step_size, least, eps;
    };

    template <class T>
    static NG_HOST_DEVICE Scalars<T> scalars(const double* option, double lr, uint32_t step,
                                             const double* given) {
        const bool matrix = given[0] >= 1.0;
        const double beta1 = matrix ? option[2] : option[5], beta2 = matrix ? option[3] : option[6],
                     weight_decay = matrix ? option[4] : option[7], rate = matrix ? lr : lr * option[8];
        const double correction = std::sqrt(1.0 - integer_power(beta2, step));
        Scalars<T> k;
        k.gain = static_cast<T>(matrix ? option[0] * (beta1 / (1.0 - beta1)) : 0.0);
        k.clip = static_cast<T>(given[1]);
        k.decay = static_cast<T>(1.0 - rate * weight_decay);
        k.first_keep = static_cast<T>(beta1);
        k.first_weight = static_cast<T>(1.0 - beta1);
        k.second_keep = static_cast<T>(beta2);
        k.second_weight = static_cast<T>(1.0 - beta2);
        k.step_size = static_cast<T>(rate * correction / (1.0 - integer_power(beta1, step)));
        k.least = static_cast<T>(1e-15);
        k.eps = static_cast<T>(option[1]);
        return k;
    }

    template <class T>
    static NG_HOST_DEVICE T corrected(T g, const T* state, const Scalars<T>& k) {
        return g + k.gain * (g - state[2]);
    }

    template <class T>
    static NG_HOST_DEVICE void update(T& p, T g, T* state, const Scalars<T>& k) {
        const T c = corrected(g, state, k) * k.clip;
        const T m = interpolate(state[0], c, k.first_keep, k.first_weight);
        const T v = state[1] * k.second_keep + k.second_weight * c * c;
        state[0] = m;
        state[1] = v;
        state[2] = g;
        p = p * k.decay - k.step_size * m / (std::sqrt(v + k.least) + k.eps);
    }

    static constexpr int sums = 1;
    static constexpr unsigned sum_reads = grad_bit | state_bit(2);

    template <class T>
    static NG_HOST_DEVICE void terms(T, T g, const T* state, const Scalars<T>& k, T* sum) {
        const T c = corrected(g, state, k);
        sum[0] = c * c;
    }
};

}  // namespace mars

NG_NAMESPACE_END
