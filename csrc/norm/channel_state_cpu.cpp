// CPU kernels of the steps that PowerNorm and UnifiedNorm make between their passes over tokens.
#include "norm/channel_rules.h"

NG_NAMESPACE_BEGIN
namespace {

template <class A>
void power_norm(const PowerNormUpdate& args) {
    const A* squares = static_cast<const A*>(args.squares);
    const A count = *static_cast<const A*>(args.count);
    A *phi = static_cast<A*>(args.phi), *factors = static_cast<A*>(args.factors);
    const int64_t t = *args.step + 1, channels = args.channels, warmup = args.warmup;
    const A alpha = static_cast<A>(args.alpha), rest = static_cast<A>(1 - args.alpha),
            eps = static_cast<A>(args.eps);
    for (int64_t c = 0; c < channels; ++c) {
        PowerNormStep<A> step{squares[c], phi[c], 0, 0};
        step.run(count, t, warmup, alpha, rest, eps);
        phi[c] = step.phi;
        factors[c] = step.z_factor;
        factors[channels + c] = step.q_factor;
    }
}

template <class A>
void unified_norm(const UnifiedNormUpdate& args) {
    const A* squares = static_cast<const A*>(args.squares);
    const A count = *static_cast<const A*>(args.count);
    A *variance = static_cast<A*>(args.variance), *window = static_cast<A*>(args.window);
    A* factors = static_cast<A*>(args.factors);
    const int64_t t = *args.step + 1, channels = args.channels, size = args.window_size;
    const A momentum = static_cast<A>(args.momentum), rest = static_cast<A>(1 - args.momentum),
            eps = static_cast<A>(args.eps);
    const UnifiedNormPhase phase(args, t);
    args.decisions[0] = args.decisions[1] = 0;
    args.decisions[2] = phase.backward_slot;
    if (!(count > 0)) {
        for (int64_t c = 0; c < channels; ++c) {
            factors[c] = A(1) / std::sqrt(variance[c] + eps);
            factors[channels + c] = 1;
        }
        return;
    }

    bool outlier = false;
    if (phase.filtering) {
        A sum = 0, deviations = 0;
        for (int64_t i = 0; i < size * channels; ++i) sum += std::sqrt(window[i]);
        const A mean = sum / static_cast<A>(size * channels);
        for (int64_t i = 0; i < size * channels; ++i) {
            const A deviation = std::sqrt(window[i]) - mean;
            deviations += deviation * deviation;
        }
        const A threshold = static_cast<A>(size) * (deviations / static_cast<A>(size * channels - 1));
        for (int64_t c = 0; c < channels && !outlier; ++c) {
            UnifiedNormStep<A> step{squares[c] / count, variance[c], 0, 0, 0, 0};
            step.average(size, phase.slot, [=](int64_t k) { return window[k * channels + c]; });
            outlier = step.arithmetic - step.geometric > threshold;
        }
        if (outlier) *args.skips += 1;
    }
    const bool skip = size <= 1 || outlier, direct = phase.warm || skip;
    args.decisions[0] = skip;
    args.decisions[1] = direct || t <= args.backward_window;
    const bool ratio_is_one = skip || t <= args.warmup || t <= args.first_ratio;
    for (int64_t c = 0; c < channels; ++c) {
        UnifiedNormStep<A> step{squares[c] / count, variance[c], 0, 0, 0, 0};
        A v = step.q;
        if (!direct && t > size) {
            step.average(size, phase.slot, [=](int64_t k) { return window[k * channels + c]; });
            v = step.geometric;
        }
        window[phase.slot * channels + c] = outlier ? step.variance : step.q;
        step.finish(v, ratio_is_one, momentum, rest, eps);
        variance[c] = step.variance;
        factors[c] = step.inverse;
        factors[channels + c] = step.ratio;
    }
}

}  // namespace

void power_norm_update_channels(const PowerNormUpdate& args) {
    if (args.type == DType::float64) return power_norm<double>(args);
    power_norm<float>(args);
}

void unified_norm_update_channels(const UnifiedNormUpdate& args) {
    if (args.type == DType::float64) return unified_norm<double>(args);
    unified_norm<float>(args);
}

NG_NAMESPACE_END
