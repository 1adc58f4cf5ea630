// Schedule-free SGD (Defazio et al., "The Road Less Scheduled", arXiv 2405.15682), and the move between the
// point where gradients are taken and the average.
#pragma once

#include "optim/rule.h"

NG_NAMESPACE_BEGIN

namespace schedule_free_sgd {

constexpr int variants = 2;  // 1: moves p towards g by a weight, and that is all
constexpr int options = 2;   // momentum, weight_decay

template <int Variant>
struct Rule : RuleDefaults {
    static constexpr bool moves = Variant == 1;
    static constexpr int states = moves ? 0 : 1;  // z
    static constexpr int given = moves ? 1 : 2;   // the weight, or the learning rate and the average's weight

    template <class T>
    struct Scalars {
        T decay, average_keep, average_weight, step_size, rate;
    };

    template <class T>
    static NG_HOST_DEVICE Scalars<T> scalars(const double* option, double, uint32_t, const double* given) {
        Scalars<T> k{};
        const double weight = moves ? given[0] : given[1];
        k.average_keep = static_cast<T>(1.0 - weight);
        k.average_weight = static_cast<T>(weight);
        k.decay = static_cast<T>(option[1]);
        k.step_size = static_cast<T>(given[0] * (1.0 - option[0] * (1.0 - weight)));
        k.rate = static_cast<T>(given[0]);
        return k;
    }

    template <class T>
    static NG_HOST_DEVICE void update(T& p, T g, [[maybe_unused]] T* state, const Scalars<T>& k) {
        if constexpr (moves) {
            p = interpolate(p, g, k.average_keep, k.average_weight);
        } else {
            const T direction = g + k.decay * p, z = state[0];
            p = interpolate(p, z, k.average_keep, k.average_weight) - k.step_size * direction;
            state[0] = z - k.rate * direction;
        }
    }
};

}  // namespace schedule_free_sgd

NG_NAMESPACE_END
