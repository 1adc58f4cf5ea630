// What one channel goes through in a step of PowerNorm and of UnifiedNorm: written once for CPU and CUDA.
#pragma once

#include <cmath>

#include "norm/channel_state.h"

NG_NAMESPACE_BEGIN

template <class A>
struct PowerNormStep {
    A squares, phi;        // in
    A z_factor, q_factor;  // out: of u in z, and 1 / sqrt(q + eps)

    // t counts from 1, and rest is 1 - alpha. With no token the statistics in use are the running ones, and
    // these stay.
    NG_HOST_DEVICE void run(A count, int64_t t, int64_t warmup, A alpha, A rest, A eps) {
        const A q = count > 0 ? squares / count : phi;
        q_factor = A(1) / std::sqrt(q + eps);
        z_factor = t <= warmup ? q_factor : A(1) / std::sqrt(phi + eps);
        if (!(count > 0)) return;
        const A steps = static_cast<A>(t);
        const A mean = t < warmup ? phi * (steps - 1) / steps + q / steps : phi;
        phi = alpha * mean + rest * q;
    }
};

// The decisions of UnifiedNorm that are the same for all channels.
struct UnifiedNormPhase {
    bool warm, filtering;
    int64_t slot, backward_slot;

    NG_HOST_DEVICE UnifiedNormPhase(const UnifiedNormUpdate& args, int64_t t)
        : warm(t < args.warmup),
          filtering(args.filtration && t >= args.warmup),
          slot(t % args.window_size),
          backward_slot(t % args.backward_window) {}
};

template <class A>
struct UnifiedNormStep {
    A q, variance;            // in
    A inverse, ratio;         // out: 1 / sqrt(v + eps), and the scale of the gradient
    A arithmetic, geometric;  // means of the window with q in its slot

    template <class Window>  // Window(k): the entry of this channel in row k
    NG_HOST_DEVICE void average(int64_t size, int64_t slot, Window window) {
        A sum = 0, logarithms = 0;
        for (int64_t k = 0; k < size; ++k) {
            const A value = k == slot ? q : A(window(k));
            sum += value;
            logarithms += std::log(value);
        }
        arithmetic = sum / static_cast<A>(size);
        geometric = std::exp(logarithms / static_cast<A>(size));
    }

    NG_HOST_DEVICE void finish(A v, bool ratio_is_one, A momentum, A rest, A eps) {
        inverse = A(1) / std::sqrt(v + eps);
        const A quotient = std::sqrt(v + eps) / std::sqrt(variance + eps);
        const A clamped = quotient < A(0.2) ? A(0.2) : quotient > A(5) ? A(5) : quotient;
        ratio = ratio_is_one ? A(1) : clamped;
        variance = momentum * variance + rest * v;
    }
};

NG_NAMESPACE_END
