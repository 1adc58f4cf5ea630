// CUDA kernels of CRMSNorm. How rows lie on threads: common/row.cuh.
//
// Bytes: the forward reads x and writes y once, the backward reads dy and x and writes dx once, as far as a
// row fits into registers; a longer one is read twice.
#pragma once

#include "common/row.cuh"
#include "norm/crms_norm.h"

namespace narrowgauge {

template <class X, int Width, int Vectors>
__global__ void __launch_bounds__(512, 1) crms_forward_kernel(CrmsForward args, int threads_per_row) {
    using A = compute_t<X>;
    SharedArena arena;
    const Shared<A> partials = arena.template take<A>(max_warps);
    const int64_t row = row_of_group(threads_per_row), base = row * args.columns;
    const RowSlice<Width> slice(row, args.rows, args.columns, threads_per_row);
    const auto x = global<const X>(args.x, "x");
    const auto y = global<X>(args.y, "y");

    const auto load = [&](int64_t j, A(&values)[Width]) { load_row<Width>(x, base + j, values); };
    RowValues<A, Width, Vectors> held;
    held.load_once(slice, load);

    A sum = 0, squares = 0;
    held.visit(slice, load, [&](int64_t, const A(&values)[Width]) {
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            sum += values[k];
            squares += values[k] * values[k];
        }
    });
    sum = group_sum(sum, threads_per_row, partials);
    squares = group_sum(squares, threads_per_row, partials);
    const A rstd =
        A(1) / sqrt((squares + sum * sum) * static_cast<A>(args.per_entry) + static_cast<A>(args.eps));
    if (args.rstd && slice.active && slice.lane == 0) global<A>(args.rstd, "rstd")[row] = rstd;

    held.visit(slice, load, [&](int64_t j, const A(&values)[Width]) {
        A scaled[Width];
#pragma unroll
        for (int k = 0; k < Width; ++k) scaled[k] = values[k] * rstd;
        store_row<Width>(y, base + j, scaled);
    });
}

template <class X, int Width, int Vectors>
__global__ void __launch_bounds__(512, 1) crms_backward_kernel(CrmsBackward args, int threads_per_row) {
    using A = compute_t<X>;
    SharedArena arena;
    const Shared<A> partials = arena.template take<A>(max_warps);
    const int64_t row = row_of_group(threads_per_row), base = row * args.columns;
    const RowSlice<Width> slice(row, args.rows, args.columns, threads_per_row);
    const auto dy = global<const X>(args.dy, "dy");
    const auto x = global<const X>(args.x, "x");
    const auto dx = global<X>(args.dx, "dx");
    const A rstd = slice.active ? A(global<const A>(args.rstd, "rstd")[row]) : A(0);

    // Both streams of a vector side by side: dy, then x.
    const auto load = [&](int64_t j, A(&values)[2 * Width]) {
        A pair[2][Width];
        load_row<Width>(dy, base + j, pair[0]);
        load_row<Width>(x, base + j, pair[1]);
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            values[k] = pair[0][k];
            values[Width + k] = pair[1][k];
        }
    };
    constexpr bool in_registers = Vectors > 0;
    A held[in_registers ? Vectors : 1][2 * Width];
    if constexpr (in_registers) {
        slice.template visit<Vectors>([&](int64_t j, int v) { load(j, held[v]); });
    }
    const auto visit = [&](auto&& function) {
        slice.template visit<Vectors>([&](int64_t j, int v) {
            if constexpr (!in_registers) load(j, held[v]);
            function(j, held[v]);
        });
    };

    A sum = 0, dot = 0;
    visit([&](int64_t, const A(&values)[2 * Width]) {
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            sum += values[Width + k];
            dot += values[k] * values[Width + k];
        }
    });
    const A y_sum = group_sum(sum, threads_per_row, partials) * rstd;
    const A c = group_sum(dot, threads_per_row, partials) * rstd * static_cast<A>(args.per_entry);
    visit([&](int64_t j, const A(&values)[2 * Width]) {
        A d[Width];
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            d[k] = (values[k] - (values[Width + k] * rstd + y_sum) * c) * rstd;
        }
        store_row<Width>(dx, base + j, d);
    });
}

}  // namespace narrowgauge
