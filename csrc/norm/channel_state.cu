// CUDA kernels of the steps that PowerNorm and UnifiedNorm make between their passes over tokens: a thread
// for each channel, and a single block where channels decide together.
#include "common/reduce.cuh"
#include "norm/channel_rules.h"

namespace narrowgauge {
namespace {

template <class A>
__global__ void __launch_bounds__(256) power_norm_update_kernel(PowerNormUpdate args) {
    const int64_t c = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (c >= args.channels) return;
    const auto phi = global<A>(args.phi, "running_phi");
    const auto factors = global<A>(args.factors, "factors");
    PowerNormStep<A> step{A(global<const A>(args.squares, "squares")[c]), A(phi[c]), 0, 0};
    step.run(A(global<const A>(args.count, "count")[0]),
             int64_t(global<const int64_t>(args.step, "num_batches_tracked")[0]) + 1, args.warmup,
             static_cast<A>(args.alpha), static_cast<A>(1 - args.alpha), static_cast<A>(args.eps));
    phi[c] = step.phi;
    factors[c] = step.z_factor;
    factors[args.channels + c] = step.q_factor;
}

constexpr int unified_threads = 512;

template <class A>
__global__ void __launch_bounds__(unified_threads, 1) unified_norm_update_kernel(UnifiedNormUpdate args) {
    SharedArena arena;
    const Shared<A> partials = arena.template take<A>(max_warps);
    const int threads = blockDim.x;
    const int64_t channels = args.channels, size = args.window_size, entries = size * channels;
    const auto squares = global<const A>(args.squares, "squares");
    const auto variance = global<A>(args.variance, "running_var");
    const auto window = global<A>(args.window, "buffer_x2");
    const auto factors = global<A>(args.factors, "factors");
    const auto decisions = global<int64_t>(args.decisions, "decisions");
    const auto skips = global<int64_t>(args.skips, "skip_counter");
    const A count = global<const A>(args.count, "count")[0];
    const int64_t t = int64_t(global<const int64_t>(args.step, "num_batches_tracked")[0]) + 1;
    const A momentum = static_cast<A>(args.momentum), rest = static_cast<A>(1 - args.momentum),
            eps = static_cast<A>(args.eps);
    const UnifiedNormPhase phase(args, t);
    if (!(count > 0)) {
        for (int64_t c = threadIdx.x; c < channels; c += threads) {
            factors[c] = A(1) / sqrt(A(variance[c]) + eps);
            factors[channels + c] = A(1);
        }
        if (threadIdx.x == 0) {
            decisions[0] = decisions[1] = 0;
            decisions[2] = phase.backward_slot;
        }
        return;
    }

    const auto averaged = [&](int64_t c) {
        UnifiedNormStep<A> step{A(squares[c]) / count, A(variance[c]), 0, 0, 0, 0};
        step.average(size, phase.slot, [&](int64_t k) { return A(window[k * channels + c]); });
        return step;
    };
    bool outlier = false;
    if (phase.filtering) {
        A sum = 0, deviations = 0, outliers = 0;
        for (int64_t i = threadIdx.x; i < entries; i += threads) sum += sqrt(A(window[i]));
        const A mean = group_sum(sum, threads, partials) / static_cast<A>(entries);
        for (int64_t i = threadIdx.x; i < entries; i += threads) {
            const A deviation = sqrt(A(window[i])) - mean;
            deviations += deviation * deviation;
        }
        deviations = group_sum(deviations, threads, partials);
        const A threshold = static_cast<A>(size) * (deviations / static_cast<A>(entries - 1));
        for (int64_t c = threadIdx.x; c < channels; c += threads) {
            const UnifiedNormStep<A> step = averaged(c);
            if (step.arithmetic - step.geometric > threshold) outliers = 1;
        }
        outlier = group_sum(outliers, threads, partials) > 0;
    }
    const bool skip = size <= 1 || outlier, direct = phase.warm || skip;
    if (threadIdx.x == 0) {
        decisions[0] = skip;
        decisions[1] = direct || t <= args.backward_window;
        decisions[2] = phase.backward_slot;
        if (outlier) skips[0] = skips[0] + 1;
    }
    const bool ratio_is_one = skip || t <= args.warmup || t <= args.first_ratio;
    for (int64_t c = threadIdx.x; c < channels; c += threads) {
        UnifiedNormStep<A> step{A(squares[c]) / count, A(variance[c]), 0, 0, 0, 0};
        A v = step.q;
        if (!direct && t > size) v = averaged(c).geometric;
        window[phase.slot * channels + c] = outlier ? step.variance : step.q;
        step.finish(v, ratio_is_one, momentum, rest, eps);
        variance[c] = step.variance;
        factors[c] = step.inverse;
        factors[channels + c] = step.ratio;
    }
}

template <class A>
void run(const PowerNormUpdate& args, Stream stream) {
    constexpr int threads = 256;
    const LaunchConfig config{dim3(static_cast<unsigned>((args.channels + threads - 1) / threads)),
                              dim3(threads), 0, 1, stream};
    launch(config, power_norm_update_kernel<A>, args);
}

template <class A>
void run(const UnifiedNormUpdate& args, Stream stream) {
    const LaunchConfig config{dim3(1), dim3(unified_threads), max_warps * sizeof(A), 1, stream};
    launch(config, unified_norm_update_kernel<A>, args);
}

}  // namespace

void launch_channel_update(const PowerNormUpdate& args, Stream stream) {
    args.type == DType::float64 ? run<double>(args, stream) : run<float>(args, stream);
}

void launch_channel_update(const UnifiedNormUpdate& args, Stream stream) {
    args.type == DType::float64 ? run<double>(args, stream) : run<float>(args, stream);
}

}  // namespace narrowgauge
