// Adamax (Kingma and Ba, arXiv 1412.6980, section 7), in the form of torch.optim.
#pragma once

#include "optim/rule.h"

NG_NAMESPACE_BEGIN

namespace adamax {

constexpr int variants = 1;
constexpr int options = 4;  // beta1, beta2, eps, weight_decay

template <int Variant>
struct Rule : RuleDefaults {
    static constexpr int states = 2;  // exp_avg, exp_inf
    static NG_HOST_DEVICE constexpr bool is_signed(int state) { return state == 0; }

    template <class T>
    struct Scalars {
        T keep, weight, norm_keep, eps, decay, step_size;
    };

    template <class T>
    static NG_HOST_DEVICE Scalars<T> scalars(const double* option, double lr, uint32_t step, const double*) {
        Scalars<T> k;
        k.keep = static_cast<T>(option[0]);
        k.weight = static_cast<T>(1.0 - option[0]);
        k.norm_keep = static_cast<T>(option[1]);
        k.eps = static_cast<T>(option[2]);
        k.decay = static_cast<T>(option[3]);
        k.step_size = static_cast<T>(lr / (1.0 - integer_power(option[0], step)));
        return k;
    }

    template <class T>
    static NG_HOST_DEVICE void update(T& p, T g, T* state, const Scalars<T>& k) {
        g = g + k.decay * p;
        const T m = interpolate(state[0], g, k.keep, k.weight);
        const T faded = state[1] * k.norm_keep, magnitude = std::abs(g) + k.eps;
        const T norm = faded > magnitude || faded != faded ? faded : magnitude;
        state[0] = m;
        state[1] = norm;
        p = p - k.step_size * m / norm;
    }
};

}  // namespace adamax

NG_NAMESPACE_END
