// CUDA kernels of PolyNorm. Bytes: the forward reads x and writes y, the backward reads dy and x and writes
// dx. How rows lie on threads: common/row.cuh.
#pragma once

#include "common/row.cuh"
#include "norm/poly_norm.h"

namespace narrowgauge {

template <class A>
__device__ __forceinline__ A poly_norm_rstd(A sum_of_squares, A per_column, double eps) {
    return A(1) / sqrt(sum_of_squares * per_column + static_cast<A>(eps));
}

template <class A>
__device__ __forceinline__ void load_weights(const void* weight, DType type, A (&values)[3]) {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        A value[1];
        Beside{weight, type, "weight"}.load(i, value);
        values[i] = value[0];
    }
}

template <class X, int Width, int Vectors>
__global__ void __launch_bounds__(512, 1)
    poly_norm_forward_kernel(PolyNormForward args, int threads_per_row) {
    using A = compute_t<X>;
    SharedArena arena;
    const Shared<A> partials = arena.template take<A>(max_warps);
    const int64_t row = row_of_group(threads_per_row), base = row * args.columns;
    const A per_column = static_cast<A>(args.per_column);
    const RowSlice<Width> slice(row, args.rows, args.columns, threads_per_row);
    const auto x = global<const X>(args.x, "x");
    const auto y = global<X>(args.y, "y");
    const auto load = [&](int64_t j, A(&values)[Width]) { load_row<Width>(x, base + j, values); };

    RowValues<A, Width, Vectors> held;
    held.load_once(slice, load);
    A squares[3] = {};
    held.visit(slice, load, [&](int64_t, const A(&values)[Width]) {
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            const A s = values[k], square = s * s, cube = square * s;
            squares[0] += cube * cube;
            squares[1] += square * square;
            squares[2] += square;
        }
    });
    A factor[3], bias[1] = {0};
    load_weights(args.weight, args.weight_type, factor);
    if (args.bias) Beside{args.bias, args.bias_type, "bias"}.load(0, bias);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        factor[i] *= poly_norm_rstd(group_sum(squares[i], threads_per_row, partials), per_column, args.eps);
    }
    held.visit(slice, load, [&](int64_t j, const A(&values)[Width]) {
        A results[Width];
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            const A s = values[k];
            results[k] = ((s * factor[0] + factor[1]) * s + factor[2]) * s + bias[0];
        }
        store_row<Width>(y, base + j, results);
    });
}

// A group of threads walks over rows and owns one row of the partial sums.
template <class X, int Width, int Vectors>
__global__ void __launch_bounds__(512, 1)
    poly_norm_backward_kernel(PolyNormBackward args, int threads_per_row) {
    using A = compute_t<X>;
    SharedArena arena;
    const Shared<A> partials = arena.template take<A>(max_warps);
    const int groups = blockDim.x / threads_per_row, group = threadIdx.x / threads_per_row;
    const int64_t chunk = row_of_group(threads_per_row), chunks = static_cast<int64_t>(gridDim.x) * groups;
    const A per_column = static_cast<A>(args.per_column);
    const auto dy = global<const X>(args.dy, "dy");
    const auto x = global<const X>(args.x, "x");
    const auto dx = global<X>(args.dx, "dx");
    A weight[3], dweight[3] = {}, dbias = 0;
    load_weights(args.weight, args.weight_type, weight);

    // All groups of a block make the same number of rounds, so that they meet at the barriers.
    for (int64_t first_row = chunk - group; first_row < args.rows; first_row += chunks) {
        const int64_t row = first_row + group, base = row * args.columns;
        const RowSlice<Width> slice(row, args.rows, args.columns, threads_per_row);
        const auto load_x = [&](int64_t j, A(&values)[Width]) { load_row<Width>(x, base + j, values); };
        RowValues<A, Width, Vectors> s_row, g_row;
        s_row.load_once(slice, load_x);
        g_row.load_once(slice, [&](int64_t j, A(&values)[Width]) { load_row<Width>(dy, base + j, values); });
        const auto visit = [&](auto&& function) {
            slice.template visit<Vectors>([&](int64_t j, int v) {
                if constexpr (Vectors == 0) {
                    load_x(j, s_row.values[v]);
                    load_row<Width>(dy, base + j, g_row.values[v]);
                }
                function(j, s_row.values[v], g_row.values[v]);
            });
        };

        A sums[7] = {};  // of s^6, s^4, s^2, then g s^3, g s^2, g s, then g
        visit([&](int64_t, const A(&s)[Width], const A(&g)[Width]) {
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                const A square = s[k] * s[k], cube = square * s[k];
                sums[0] += cube * cube;
                sums[1] += square * square;
                sums[2] += square;
                sums[3] += g[k] * cube;
                sums[4] += g[k] * square;
                sums[5] += g[k] * s[k];
                sums[6] += g[k];
            }
        });
#pragma unroll
        for (int i = 0; i < 7; ++i) sums[i] = group_sum(sums[i], threads_per_row, partials);

        A factor[3], back[3];
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            const A r = poly_norm_rstd(sums[i], per_column, args.eps), dot = sums[3 + i] * r;
            factor[i] = static_cast<A>(3 - i) * r * weight[i];
            back[i] = factor[i] * r * (dot * per_column);
            if (slice.active) dweight[i] += dot;
        }
        if (slice.active) dbias += sums[6];
        visit([&](int64_t j, const A(&s)[Width], const A(&g)[Width]) {
            A results[Width];
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                const A square = s[k] * s[k];
                results[k] = ((s[k] * factor[0] + factor[1]) * s[k] + factor[2]) * g[k] -
                             ((square * back[0] + back[1]) * square + back[2]) * s[k];
            }
            store_row<Width>(dx, base + j, results);
        });
    }
    if (threadIdx.x % threads_per_row != 0) return;
    if (args.dweight_partial) {
        const auto partial = global<A>(args.dweight_partial, "dweight_partial");
#pragma unroll
        for (int i = 0; i < 3; ++i) partial[chunk * 3 + i] = dweight[i];
    }
    if (args.dbias_partial) global<A>(args.dbias_partial, "dbias_partial")[chunk] = dbias;
}

}  // namespace narrowgauge
