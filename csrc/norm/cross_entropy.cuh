// CUDA kernels of cross-entropy.
//
// Bytes: the logits are read once and stay in registers, and dlogits is written once; a longer row (Vectors =
// 0) is read twice. In place, each thread overwrites only what it has read itself, and the target's logit is
// read before the first barrier.
#pragma once

#include "norm/cross_entropy.h"
#include "norm/exponentials.cuh"

namespace narrowgauge {

template <class X, int Width, int Vectors>
__global__ void __launch_bounds__(512, 1) cross_entropy_kernel(CrossEntropy args, int threads_per_row) {
    using A = compute_t<X>;
    SharedArena arena;
    const Shared<A> partials = arena.template take<A>(max_warps);

    const int64_t columns = args.columns, row = row_of_group(threads_per_row), base = row * columns;
    const RowSlice<Width> slice(row, args.rows, columns, threads_per_row);
    const auto logits = global<const X>(args.logits, "logits");
    const auto dlogits = global<X>(args.dlogits, "dlogits");
    const Beside weights{args.weight, args.weight_type, "weight"};
    const A cap = static_cast<A>(args.softcap);

    const int64_t k = slice.active ? static_cast<int64_t>(global<const int64_t>(args.target, "target")[row])
                                   : args.ignore_index;
    const bool ignored = k == args.ignore_index, valid = k >= 0 && k < columns;
    A z_k[1] = {A(NAN)}, w_k[1] = {A(1)};  // NaN for a target that is no class
    if (!ignored && valid) {
        load_row<1>(logits, base + k, z_k);
        if (cap > 0) z_k[0] = cap * tanh(z_k[0] / cap);
        if (weights) weights.load(k, w_k);
    }

    const auto load_capped = [&](int64_t j, A(&values)[Width]) {
        load_row<Width>(logits, base + j, values);
        if (cap > 0) {
#pragma unroll
            for (int i = 0; i < Width; ++i) values[i] = cap * tanh(values[i] / cap);
        }
    };
    RowValues<A, Width, Vectors> held;
    held.load_once(slice, load_capped);
    const auto visit = [&](auto&& f) { held.visit(slice, load_capped, f); };
    const auto weights_at = [&](int64_t j, A(&w)[Width]) {
#pragma unroll
        for (int i = 0; i < Width; ++i) w[i] = 1;
        if (weights) weights.load(j, w);
    };
    const ShiftedSum<A> sum = shifted_sum<Width, (Vectors > 0), A>(visit, threads_per_row, partials);
    const A lse = sum.logarithm();

    const A s = static_cast<A>(args.label_smoothing), per_class = s / static_cast<A>(columns);
    // The terms that count are differences from the maximum, which a common shift of the logits leaves alone.
    A loss =
        (1 - s) * w_k[0] * (log(sum.sum) - (z_k[0] - sum.shift)) + static_cast<A>(args.z_loss) * lse * lse;
    A weight_sum = static_cast<A>(columns);
    if (s > 0) {
        const A shift = finite_shift(sum.shift);
        A weighted = 0, total = 0;
        visit([&](int64_t j, const A(&z)[Width]) {
            A w[Width];
            weights_at(j, w);
#pragma unroll
            for (int i = 0; i < Width; ++i) {
                weighted += w[i] * (z[i] - shift);
                total += w[i];
            }
        });
        weighted = group_sum(weighted, threads_per_row, partials);
        weight_sum = group_sum(total, threads_per_row, partials);
        loss += per_class * (weight_sum * (lse - shift) - weighted);
    }
    if (slice.active && slice.lane == 0) {
        global<A>(args.loss, "loss")[row] = ignored ? A(0) : loss;
        global<A>(args.lse, "lse")[row] = ignored ? A(0) : lse;
    }
    if (args.dlogits == nullptr) return;

    const A scale = args.scale ? A(global<const A>(args.scale, "scale")[0]) : A(1);
    const A factor =
        valid ? (1 - s) * w_k[0] + per_class * weight_sum + 2 * static_cast<A>(args.z_loss) * lse : z_k[0];
    const A inverse = sum.shift == -minus_infinity<A>() ? A(NAN) : A(1) / sum.sum;
    visit([&](int64_t j, const A(&z)[Width]) {
        A d[Width], w[Width];
        if (s > 0) weights_at(j, w);
#pragma unroll
        for (int i = 0; i < Width; ++i) {
            d[i] = exp(z[i] - sum.shift) * inverse * factor;
            if (s > 0) d[i] -= per_class * w[i];
            if (j + i == k) d[i] -= (1 - s) * w_k[0];
            d[i] *= scale;
            if (cap > 0) d[i] *= 1 - (z[i] / cap) * (z[i] / cap);
            if (ignored) d[i] = 0;
        }
        store_row<Width>(dlogits, base + j, d);
    });
}

template <class X, int Width>
__global__ void __launch_bounds__(512, 1) scale_rows_kernel(ScaleRows args, int threads_per_row) {
    using A = compute_t<X>;
    const int64_t row = row_of_group(threads_per_row), base = row * args.columns;
    const RowSlice<Width> slice(row, args.rows, args.columns, threads_per_row);
    if (!slice.active) return;
    const A factor = global<const A>(args.factor, "factor")[args.one_factor ? 0 : row];
    if (factor == A(1)) return;
    const auto x = global<X>(args.x, "x");
    const auto source = global<const X>(args.x, "x");
    slice.template visit<0>([&](int64_t j, int) {
        A values[Width];
        load_row<Width>(source, base + j, values);
#pragma unroll
        for (int i = 0; i < Width; ++i) values[i] *= factor;
        store_row<Width>(x, base + j, values);
    });
}

}  // namespace narrowgauge
