// CUDA kernels of the LayerNorm / RMSNorm family. How rows lie on threads: common/row.cuh.
#pragma once

#include "common/columns.cuh"
#include "common/row.cuh"
#include "norm/norm.h"

namespace narrowgauge {

// --- forward -------------------------------------------------------------------------------------

template <class X, int Width, int Vectors, bool Centred>
__global__ void __launch_bounds__(512, 1) norm_forward_kernel(NormForward args, int threads_per_row) {
    using A = compute_t<X>;
    SharedArena arena;
    const Shared<A> partials = arena.template take<A>(max_warps);

    const int64_t row = row_of_group(threads_per_row);
    const int64_t columns = args.columns, base = row * columns;
    const A per_column = static_cast<A>(args.per_column);
    const RowSlice<Width> slice(row, args.rows, columns, threads_per_row);

    const auto x = global<const X>(args.x, "x");
    const Beside residual{args.residual, args.residual_type, "residual"};
    const Beside weight{args.weight, args.weight_type, "weight"};
    const Beside bias{args.bias, args.bias_type, "bias"};

    const auto load_sum = [&](int64_t j, A(&values)[Width]) {
        load_row<Width>(x, base + j, values);
        if (residual) {
            A added[Width];
            residual.load(base + j, added);
#pragma unroll
            for (int k = 0; k < Width; ++k) values[k] += added[k];
        }
    };

    RowValues<A, Width, Vectors> held;
    held.load_once(slice, load_sum);
    const auto visit = [&](auto&& function) { held.visit(slice, load_sum, function); };

    A mean = 0;
    if constexpr (Centred) {
        A sum = 0;
        visit([&](int64_t, const A(&values)[Width]) {
#pragma unroll
            for (int k = 0; k < Width; ++k) sum += values[k];
        });
        mean = group_sum(sum, threads_per_row, partials) * per_column;
    }
    A sum_of_squares = 0;
    visit([&](int64_t, const A(&values)[Width]) {
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            const A deviation = Centred ? values[k] - mean : values[k];
            sum_of_squares += deviation * deviation;
        }
    });
    sum_of_squares = group_sum(sum_of_squares, threads_per_row, partials);
    const A rstd = A(1) / sqrt(sum_of_squares * per_column + static_cast<A>(args.eps));

    if (slice.active && slice.lane == 0) {
        if (args.mean) global<A>(args.mean, "mean")[row] = mean;
        if (args.rstd) global<A>(args.rstd, "rstd")[row] = rstd;
    }
    if (!args.y) return;
    const A factor = args.scale && slice.active ? A(global<const A>(args.scale, "scale")[row]) : rstd;
    visit([&](int64_t j, const A(&values)[Width]) {
        if (args.residual_out) {
            store_beside<X>(args.residual_out, args.residual_type, "residual_out", base + j, values);
        }
        A scale[Width], shift[Width], y[Width];
        if (weight) weight.load(j, scale);
        if (bias) bias.load(j, shift);
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            y[k] = (Centred ? values[k] - mean : values[k]) * factor;
            if (weight) y[k] *= scale[k] + static_cast<A>(args.weight_offset);
            if (bias) y[k] += shift[k];
        }
        store_beside<X>(args.y, args.y_type, "y", base + j, y);
    });
}

// --- backward ------------------------------------------------------------------------------------

// dx, and the partial sums of dweight and dbias. Group c of threads walks the rows c, c + chunks, c + 2
// chunks, ... and owns row c of the partial buffers. With Vectors = 0 it writes dx alone;
// norm_backward_columns_kernel does the rest.
template <class S, int Width, int Vectors, bool Centred>
__global__ void __launch_bounds__(512, 1) norm_backward_kernel(NormBackward args, int threads_per_row) {
    using A = compute_t<S>;
    SharedArena arena;
    const Shared<A> partials = arena.template take<A>(max_warps);

    const int groups = blockDim.x / threads_per_row;
    const int lane = threadIdx.x % threads_per_row;
    const int64_t chunk = static_cast<int64_t>(blockIdx.x) * groups + threadIdx.x / threads_per_row;
    const int64_t chunks = static_cast<int64_t>(gridDim.x) * groups;
    const int64_t columns = args.columns, stride = static_cast<int64_t>(threads_per_row) * Width;
    const A per_column = static_cast<A>(args.per_column);
    constexpr bool in_registers = Vectors > 0;
    constexpr int held = in_registers ? Vectors : 1;

    const Beside dy{args.dy, args.dy_type, "dy"};
    const Beside weights{args.weight, args.weight_type, "weight"};
    const auto x = global<const S>(args.x, "x");
    const auto dresidual = global<const S>(args.dresidual, "dresidual");
    const auto dx = global<S>(args.dx, "dx");
    const auto mean_of = global<const A>(args.mean, "mean");
    const auto rstd_of = global<const A>(args.rstd, "rstd");

    const auto load_weight = [&](int64_t j, A(&values)[Width]) {
#pragma unroll
        for (int k = 0; k < Width; ++k) values[k] = A(1);
        if (!weights) return;
        weights.load(j, values);
#pragma unroll
        for (int k = 0; k < Width; ++k) values[k] += static_cast<A>(args.weight_offset);
    };

    A dweight[held][Width] = {}, dbias[held][Width] = {};
    A x_hat[held][Width], g[held][Width];

    // All groups of a block make the same number of rounds, so that they meet at the barriers.
    const int group = threadIdx.x / threads_per_row;
    for (int64_t first_row = chunk - group; first_row < args.rows; first_row += chunks) {
        const int64_t row = first_row + group, base = row * columns;
        const RowSlice<Width> slice(row, args.rows, columns, threads_per_row);
        const A rstd = slice.active ? A(rstd_of[row]) : A(0);
        const A mean = Centred && slice.active ? A(mean_of[row]) : A(0);

        const auto load_terms = [&](int64_t j, A(&x_hat_values)[Width], A(&g_values)[Width]) {
            load_row<Width>(x, base + j, x_hat_values);
            dy.load(base + j, g_values);
#pragma unroll
            for (int k = 0; k < Width; ++k) x_hat_values[k] = (x_hat_values[k] - mean) * rstd;
        };
        if constexpr (in_registers) {
            slice.template visit<Vectors>([&](int64_t j, int v) { load_terms(j, x_hat[v], g[v]); });
        }
        const auto visit = [&](auto&& function) {
            slice.template visit<Vectors>([&](int64_t j, int v) {
                if constexpr (!in_registers) load_terms(j, x_hat[v], g[v]);
                function(j, v);
            });
        };

        A dot = 0, sum = 0;
        visit([&](int64_t j, int v) {
            A weight[Width];
            load_weight(j, weight);
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                const A h = g[v][k] * weight[k];
                dot += h * x_hat[v][k];
                if constexpr (Centred) sum += h;
            }
        });
        const A mean_dot = args.given_scale ? A(0) : group_sum(dot, threads_per_row, partials) * per_column;
        A mean_sum = 0;
        if constexpr (Centred) mean_sum = group_sum(sum, threads_per_row, partials) * per_column;

        visit([&](int64_t j, int v) {
            A weight[Width], d[Width];
            load_weight(j, weight);
            if (dresidual) load_row<Width>(dresidual, base + j, d);
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                A value = g[v][k] * weight[k] - x_hat[v][k] * mean_dot;
                if constexpr (Centred) value -= mean_sum;
                d[k] = dresidual ? value * rstd + d[k] : value * rstd;
                if constexpr (in_registers) {
                    dweight[v][k] += g[v][k] * x_hat[v][k];
                    dbias[v][k] += g[v][k];
                }
            }
            store_row<Width>(dx, base + j, d);
        });
    }

    if constexpr (in_registers) {
#pragma unroll
        for (int v = 0; v < Vectors; ++v) {
            const int64_t j = lane * Width + v * stride;
            if (j >= columns) break;
            if (args.dweight_partial) {
                store_row<Width>(global<A>(args.dweight_partial, "dweight_partial"), chunk * columns + j,
                                 dweight[v]);
            }
            if (args.dbias_partial) {
                store_row<Width>(global<A>(args.dbias_partial, "dbias_partial"), chunk * columns + j,
                                 dbias[v]);
            }
        }
    }
}

// The partial sums of dweight and dbias for rows too long for registers: block (x, c) takes rows chunk c of
// the columns.
template <class S, bool Centred>
__global__ void __launch_bounds__(1024) norm_backward_columns_kernel(NormBackward args) {
    using A = compute_t<S>;
    SharedArena arena;
    const Shared<A> sums = arena.template take<A>(tile_sums);
    const int64_t j = static_cast<int64_t>(blockIdx.x) * tile + threadIdx.x;
    const int64_t last = args.rows * (blockIdx.y + 1) / args.chunks;

    const Beside dy{args.dy, args.dy_type, "dy"};
    const auto x = global<const S>(args.x, "x");
    const auto mean = global<const A>(args.mean, "mean");
    const auto rstd = global<const A>(args.rstd, "rstd");
    A dweight = 0, dbias = 0;
    if (j < args.columns) {
        for (int64_t row = args.rows * blockIdx.y / args.chunks + threadIdx.y; row < last; row += tile) {
            A g[1];
            dy.load(row * args.columns + j, g);
            const A s = to_compute(S(x[row * args.columns + j]));
            dweight += g[0] * ((Centred ? s - A(mean[row]) : s) * A(rstd[row]));
            dbias += g[0];
        }
    }
    dweight = sum_over_tile_rows(dweight, sums);
    dbias = sum_over_tile_rows(dbias, sums);
    if (j >= args.columns || threadIdx.y != 0) return;
    const int64_t target = blockIdx.y * args.columns + j;
    if (args.dweight_partial) global<A>(args.dweight_partial, "dweight_partial")[target] = dweight;
    if (args.dbias_partial) global<A>(args.dbias_partial, "dbias_partial")[target] = dbias;
}

}  // namespace narrowgauge
