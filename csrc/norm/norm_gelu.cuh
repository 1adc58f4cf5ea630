// CUDA kernels of the normalization of TokenFormer's scores. How rows lie on threads: common/row.cuh.
//
// Bytes per element of size e: forward 2e (s, a), backward 3e (da, s, ds); a row beyond the registers is read
// twice.
#pragma once

#include "common/row.cuh"
#include "norm/norm_gelu.h"

namespace narrowgauge {

template <class A>
__device__ __forceinline__ A normal_distribution(A u) {
    return (erf(u * static_cast<A>(0.70710678118654752440)) + 1) * static_cast<A>(0.5);
}
template <class A>
__device__ __forceinline__ A normal_density(A u) {
    return exp(u * u * static_cast<A>(-0.5)) * static_cast<A>(0.39894228040143267794);  // 1 / sqrt(2 pi)
}

template <class T, int Width, int Vectors>
__global__ void __launch_bounds__(512, 1) norm_gelu_kernel(NormGelu args, int threads_per_row) {
    using A = compute_t<T>;
    SharedArena arena;
    const Shared<A> partials = arena.template take<A>(max_warps);
    const int64_t row = row_of_group(threads_per_row), base = row * args.columns;
    const RowSlice<Width> slice(row, args.rows, args.columns, threads_per_row);
    const auto s = global<const T>(args.s, "s");
    const auto a = global<T>(args.a, "a");

    // s, or gelu(s)
    const auto load_row_of = [&](int64_t j, A(&values)[Width]) {
        load_row<Width>(s, base + j, values);
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            if (args.gelu_first) values[k] *= normal_distribution(values[k]);
        }
    };
    RowValues<A, Width, Vectors> held;
    held.load_once(slice, load_row_of);
    A squares = 0;
    held.visit(slice, load_row_of, [&](int64_t, const A(&values)[Width]) {
#pragma unroll
        for (int k = 0; k < Width; ++k) squares += values[k] * values[k];
    });
    const A mean_square = group_sum(squares, threads_per_row, partials) * static_cast<A>(args.per_count) +
                          static_cast<A>(args.eps);
    const A rho = mean_square > 0 ? A(1) / sqrt(mean_square) : A(0);
    if (args.rho && slice.active && slice.lane == 0) global<A>(args.rho, "rho")[row] = rho;
    held.visit(slice, load_row_of, [&](int64_t j, const A(&values)[Width]) {
        A result[Width];
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            result[k] = values[k] * rho;
            if (!args.gelu_first) result[k] *= normal_distribution(result[k]);
        }
        store_row<Width>(a, base + j, result);
    });
}

// s and da in registers; GELU and its slope are computed again, which costs less than registers do.
template <class T, int Width, int Vectors>
__global__ void __launch_bounds__(512, 1)
    norm_gelu_backward_kernel(NormGeluBackward args, int threads_per_row) {
    using A = compute_t<T>;
    SharedArena arena;
    const Shared<A> partials = arena.template take<A>(max_warps);
    const int64_t row = row_of_group(threads_per_row), base = row * args.columns;
    const RowSlice<Width> slice(row, args.rows, args.columns, threads_per_row);
    const auto s = global<const T>(args.s, "s"), da = global<const T>(args.da, "da");
    const auto ds = global<T>(args.ds, "ds");
    const A rho = slice.active ? A(global<const A>(args.rho, "rho")[row]) : A(0);

    const auto load_s = [&](int64_t j, A(&values)[Width]) { load_row<Width>(s, base + j, values); };
    const auto load_da = [&](int64_t j, A(&values)[Width]) { load_row<Width>(da, base + j, values); };
    RowValues<A, Width, Vectors> scores, gradients;
    scores.load_once(slice, load_s);
    gradients.load_once(slice, load_da);
    // f(j, x, slope, normed, h): of each vector the argument of GELU and its slope there; what the norm gives
    // and the gradient that arrives at it.
    const auto visit = [&](auto&& function) {
        slice.template visit<Vectors>([&](int64_t j, int v) {
            if constexpr (Vectors == 0) {
                load_s(j, scores.values[v]);
                load_da(j, gradients.values[v]);
            }
            A slope[Width], normed[Width], h[Width];
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                const A score = scores.values[v][k], x = args.gelu_first ? score : score * rho;
                const A phi = normal_distribution(x);
                slope[k] = phi + x * normal_density(x);
                normed[k] = args.gelu_first ? x * phi * rho : x;
                h[k] = args.gelu_first ? gradients.values[v][k] : gradients.values[v][k] * slope[k];
            }
            function(j, slope, normed, h);
        });
    };
    A dot = 0;
    visit([&](int64_t, const A(&)[Width], const A(&normed)[Width], const A(&h)[Width]) {
#pragma unroll
        for (int k = 0; k < Width; ++k) dot += h[k] * normed[k];
    });
    const A mean = group_sum(dot, threads_per_row, partials) * static_cast<A>(args.per_count);
    visit([&](int64_t j, const A(&slope)[Width], const A(&normed)[Width], const A(&h)[Width]) {
        A d[Width];
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            d[k] = (h[k] - normed[k] * mean) * rho;
            if (args.gelu_first) d[k] *= slope[k];
        }
        store_row<Width>(ds, base + j, d);
    });
}

}  // namespace narrowgauge
