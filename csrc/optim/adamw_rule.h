// AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019), in the order of
// torch.optim.AdamW.
#pragma once

#include "optim/rule.h"

namespace narrowgauge {

struct AdamWOptions {
    double beta1, beta2, weight_decay, eps;
    bool amsgrad;
};

}  // namespace narrowgauge

NG_NAMESPACE_BEGIN

template <bool Amsgrad>
struct AdamW {
    static constexpr int states = Amsgrad ? 3 : 2;  // exp_avg, exp_avg_sq, max_exp_avg_sq
    static NG_HOST_DEVICE constexpr bool is_signed(int state) { return state == 0; }

    // What a step computes once per parameter: in float64, then rounded to T.
    template <class T>
    struct Scalars {
        T decay, first_keep, first_weight, second_keep, second_weight, step_size, correction, eps;
    };

    template <class T>
    static NG_HOST_DEVICE Scalars<T> scalars(const AdamWOptions& options, double lr, uint32_t step) {
        Scalars<T> k;
        k.decay = static_cast<T>(1.0 - lr * options.weight_decay);
        k.first_keep = static_cast<T>(options.beta1);
        k.first_weight = static_cast<T>(1.0 - options.beta1);
        k.second_keep = static_cast<T>(options.beta2);
        k.second_weight = static_cast<T>(1.0 - options.beta2);
        k.step_size = static_cast<T>(lr / (1.0 - integer_power(options.beta1, step)));
        k.correction = static_cast<T>(std::sqrt(1.0 - integer_power(options.beta2, step)));
        k.eps = static_cast<T>(options.eps);
        return k;
    }

    template <class T>
    static NG_HOST_DEVICE void update(T& p, T g, T* state, const Scalars<T>& k) {
        const T difference = g - state[0];
        // Two forms of the same interpolation: each is exact at its end, beta1 = 1 and beta1 = 0.
        const T m =
            k.first_weight < T(0.5) ? state[0] + k.first_weight * difference : g - k.first_keep * difference;
        const T v = state[1] * k.second_keep + k.second_weight * g * g;
        T largest = v;
        if constexpr (Amsgrad) {
            largest = v > state[2] || v != v ? v : state[2];
            state[2] = largest;
        }
        state[0] = m;
        state[1] = v;
        p = p * k.decay;
        p = p - k.step_size * m / (std::sqrt(largest) / k.correction + k.eps);
    }
};

NG_NAMESPACE_END
