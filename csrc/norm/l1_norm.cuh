// CUDA kernels of L1 LayerNorm. How rows lie on threads: common/row.cuh.
//
// Bytes per element of size e: forward 2e (x, y), backward 3e (dy, x, dx); a row beyond the registers is read
// again for each of its sums.
#pragma once

#include "common/row.cuh"
#include "norm/l1_norm.h"

namespace narrowgauge {

template <class X, int Width, int Vectors>
__global__ void __launch_bounds__(512, 1) l1_norm_forward_kernel(L1NormForward args, int threads_per_row) {
    using A = compute_t<X>;
    SharedArena arena;
    const Shared<A> partials = arena.template take<A>(max_warps);

    const int64_t row = row_of_group(threads_per_row), base = row * args.columns;
    const A per_column = static_cast<A>(args.per_column);
    const RowSlice<Width> slice(row, args.rows, args.columns, threads_per_row);
    const auto x = global<const X>(args.x, "x");
    const auto y = global<X>(args.y, "y");
    const Beside weight{args.weight, args.weight_type, "weight"};
    const Beside bias{args.bias, args.bias_type, "bias"};

    const auto load_x = [&](int64_t j, A(&values)[Width]) { load_row<Width>(x, base + j, values); };
    RowValues<A, Width, Vectors> held;
    held.load_once(slice, load_x);
    const auto mean_of = [&](auto&& term) {
        A sum = 0;
        held.visit(slice, load_x, [&](int64_t, const A(&values)[Width]) {
#pragma unroll
            for (int k = 0; k < Width; ++k) sum += term(values[k]);
        });
        return group_sum(sum, threads_per_row, partials) * per_column;
    };
    A mean = mean_of([](A value) { return value; });
    mean += mean_of([&](A value) { return value - mean; });  // a constant row has exactly its own mean
    const A deviation = mean_of([&](A value) { return value < mean ? mean - value : value - mean; }) *
                            static_cast<A>(args.factor) +
                        static_cast<A>(args.eps);
    const A inverse = deviation > 0 ? A(1) / deviation : A(0);

    if (slice.active && slice.lane == 0) {
        if (args.mean) global<A>(args.mean, "mean")[row] = mean;
        if (args.inverse) global<A>(args.inverse, "inverse")[row] = inverse;
    }
    held.visit(slice, load_x, [&](int64_t j, const A(&values)[Width]) {
        A scale[Width], shift[Width], result[Width];
        if (weight) weight.load(j, scale);
        if (bias) bias.load(j, shift);
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            result[k] = (values[k] - mean) * inverse;
            if (weight) result[k] *= scale[k];
            if (bias) result[k] += shift[k];
        }
        store_row<Width>(y, base + j, result);
    });
}

// dx, and the partial sums of dweight and dbias: as norm_backward_kernel (norm.cuh).
template <class X, int Width, int Vectors>
__global__ void __launch_bounds__(512, 1) l1_norm_backward_kernel(L1NormBackward args, int threads_per_row) {
    using A = compute_t<X>;
    SharedArena arena;
    const Shared<A> partials = arena.template take<A>(max_warps);

    const int groups = blockDim.x / threads_per_row, group = threadIdx.x / threads_per_row;
    const int64_t chunk = static_cast<int64_t>(blockIdx.x) * groups + group;
    const int64_t chunks = static_cast<int64_t>(gridDim.x) * groups, columns = args.columns;
    const A per_column = static_cast<A>(args.per_column), factor = static_cast<A>(args.factor);
    constexpr bool in_registers = Vectors > 0;
    constexpr int held = in_registers ? Vectors : 1;

    const auto x = global<const X>(args.x, "x");
    const auto dy = global<const X>(args.dy, "dy");
    const auto dx = global<X>(args.dx, "dx");
    const Beside weights{args.weight, args.weight_type, "weight"};
    const auto means = global<const A>(args.mean, "mean"),
               inverses = global<const A>(args.inverse, "inverse");

    A dweight[held][Width] = {}, dbias[held][Width] = {};
    A p[held][Width], g[held][Width];

    // All groups of a block make the same number of rounds, so that they meet at the barriers.
    for (int64_t first_row = chunk - group; first_row < args.rows; first_row += chunks) {
        const int64_t row = first_row + group, base = row * columns;
        const RowSlice<Width> slice(row, args.rows, columns, threads_per_row);
        const A mean = slice.active ? A(means[row]) : A(0);
        const A inverse = slice.active ? A(inverses[row]) : A(0);

        const auto load_terms = [&](int64_t j, int v) {
            load_row<Width>(x, base + j, p[v]);
            load_row<Width>(dy, base + j, g[v]);
#pragma unroll
            for (int k = 0; k < Width; ++k) p[v][k] -= mean;
        };
        if constexpr (in_registers) slice.template visit<Vectors>(load_terms);
        // f(j, v, h): the gradient of x_hat, h = dy * weight
        const auto visit = [&](auto&& function) {
            slice.template visit<Vectors>([&](int64_t j, int v) {
                if constexpr (!in_registers) load_terms(j, v);
                A h[Width];
                if (weights) weights.load(j, h);
#pragma unroll
                for (int k = 0; k < Width; ++k) h[k] = weights ? g[v][k] * h[k] : g[v][k];
                function(j, v, h);
            });
        };
        const auto sign = [](A value) { return A(value > 0) - A(value < 0); };

        A dot = 0, sum = 0, signs = 0;
        visit([&](int64_t, int v, const A(&h)[Width]) {
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                dot += h[k] * p[v][k];
                sum += h[k];
                signs += sign(p[v][k]);
            }
        });
        const A pull = factor * (group_sum(dot, threads_per_row, partials) * inverse * per_column);
        const A mean_sum = group_sum(sum, threads_per_row, partials) * per_column;
        const A mean_sign = group_sum(signs, threads_per_row, partials) * per_column;

        visit([&](int64_t j, int v, const A(&h)[Width]) {
            A d[Width];
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                d[k] = (h[k] - mean_sum - (sign(p[v][k]) - mean_sign) * pull) * inverse;
                if constexpr (in_registers) {
                    dweight[v][k] += g[v][k] * (p[v][k] * inverse);
                    dbias[v][k] += g[v][k];
                }
            }
            store_row<Width>(dx, base + j, d);
        });
    }

    if constexpr (in_registers) {
        const RowSlice<Width> slice(0, 1, columns, threads_per_row);
        const auto store_sums = [&](void* partial, const char* name, const A(&sums)[held][Width]) {
            if (!partial) return;
            slice.template visit<Vectors>([&](int64_t j, int v) {
                store_row<Width>(global<A>(partial, name), chunk * columns + j, sums[v]);
            });
        };
        store_sums(args.dweight_partial, "dweight_partial", dweight);
        store_sums(args.dbias_partial, "dbias_partial", dbias);
    }
}

}  // namespace narrowgauge
