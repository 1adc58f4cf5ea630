// CUDA kernels of the Peri-LN junction: two dependent sums over a row in one kernel. Bytes: the forward reads
// f and x and writes x_new and y; the backward reads dy, dx_new, f and x_new and writes df and dx. How rows
// lie on threads: common/row.cuh.
#pragma once

#include "common/row.cuh"
#include "norm/peri_add_norm.h"

namespace narrowgauge {

// weight + offset, or ones.
template <int Width, class A>
__device__ __forceinline__ void load_scale(const Beside& weight, double offset, int64_t j,
                                           A (&values)[Width]) {
#pragma unroll
    for (int k = 0; k < Width; ++k) values[k] = A(1);
    if (!weight) return;
    weight.load(j, values);
#pragma unroll
    for (int k = 0; k < Width; ++k) values[k] += static_cast<A>(offset);
}

template <class X, int Width, int Vectors>
__global__ void __launch_bounds__(512, 1) peri_forward_kernel(PeriForward args, int threads_per_row) {
    using A = compute_t<X>;
    SharedArena arena;
    const Shared<A> partials = arena.template take<A>(max_warps);
    const int64_t row = row_of_group(threads_per_row), base = row * args.columns;
    const A per_column = static_cast<A>(args.per_column), eps = static_cast<A>(args.eps);
    const RowSlice<Width> slice(row, args.rows, args.columns, threads_per_row);
    const auto f = global<const X>(args.f, "f");
    const auto y = global<X>(args.y, "y");
    const Beside x{args.x, args.x_type, "x"};
    const Beside weight_out{args.weight_out, args.weight_out_type, "weight_out"};
    const Beside weight_in{args.weight_in, args.weight_in_type, "weight_in"};

    const auto load_branch = [&](int64_t j, A(&values)[Width]) { load_row<Width>(f, base + j, values); };
    RowValues<A, Width, Vectors> held, stream;
    held.load_once(slice, load_branch);
    stream.load_once(slice, [&](int64_t j, A(&values)[Width]) { x.load(base + j, values); });
    A squares = 0;
    held.visit(slice, load_branch, [&](int64_t, const A(&values)[Width]) {
#pragma unroll
        for (int k = 0; k < Width; ++k) squares += values[k] * values[k];
    });
    squares = group_sum(squares, threads_per_row, partials);
    const A rstd_out = A(1) / sqrt(squares * per_column + eps);

    // The un-rounded sum, in place of the branch.
    const auto add = [&](int64_t j, A(&values)[Width], const A(&added)[Width]) {
        A scale[Width];
        load_scale(weight_out, args.weight_offset, j, scale);
#pragma unroll
        for (int k = 0; k < Width; ++k) values[k] = values[k] * rstd_out * scale[k] + added[k];
    };
    const auto load_sum = [&](int64_t j, A(&values)[Width]) {  // where the row is not in registers
        A added[Width];
        load_branch(j, values);
        x.load(base + j, added);
        add(j, values, added);
    };
    A sum_of_squares = 0;
    slice.template visit<Vectors>([&](int64_t j, int v) {
        A(&values)[Width] = held.values[v];
        if constexpr (Vectors > 0) {
            add(j, values, stream.values[v]);
        } else {
            load_sum(j, values);
        }
        store_beside<X>(args.x_new, args.x_type, "x_new", base + j, values);
#pragma unroll
        for (int k = 0; k < Width; ++k) sum_of_squares += values[k] * values[k];
    });
    sum_of_squares = group_sum(sum_of_squares, threads_per_row, partials);
    const A rstd_in = A(1) / sqrt(sum_of_squares * per_column + eps);

    held.visit(slice, load_sum, [&](int64_t j, const A(&values)[Width]) {
        A scale[Width], results[Width];
        load_scale(weight_in, args.weight_offset, j, scale);
#pragma unroll
        for (int k = 0; k < Width; ++k) results[k] = values[k] * rstd_in * scale[k];
        store_row<Width>(y, base + j, results);
    });
    if (slice.active && slice.lane == 0) {
        if (args.rstd_out) global<A>(args.rstd_out, "rstd_out")[row] = rstd_out;
        if (args.rstd_in) global<A>(args.rstd_in, "rstd_in")[row] = rstd_in;
    }
}

// A group of threads walks over rows and owns one row of the partial sums, each thread its columns of it.
// Rows too long for registers (Vectors = 0) are read again, and their partial sums grow in memory.
template <class X, int Width, int Vectors>
__global__ void __launch_bounds__(512, 1) peri_backward_kernel(PeriBackward args, int threads_per_row) {
    using A = compute_t<X>;
    SharedArena arena;
    const Shared<A> partials = arena.template take<A>(max_warps);
    constexpr bool in_registers = Vectors > 0;
    constexpr int held = in_registers ? Vectors : 1;
    const int groups = blockDim.x / threads_per_row, group = threadIdx.x / threads_per_row;
    const int64_t chunk = row_of_group(threads_per_row), chunks = static_cast<int64_t>(gridDim.x) * groups,
                  columns = args.columns;
    const A per_column = static_cast<A>(args.per_column);
    const auto dy = global<const X>(args.dy, "dy");
    const auto f = global<const X>(args.f, "f");
    const auto df = global<X>(args.df, "df");
    const auto rstd_out_of = global<const A>(args.rstd_out, "rstd_out");
    const auto rstd_in_of = global<const A>(args.rstd_in, "rstd_in");
    const Beside x_new{args.x_new, args.x_type, "x_new"}, dx_new{args.dx_new, args.x_type, "dx_new"};
    const Beside weight_out{args.weight_out, args.weight_out_type, "weight_out"};
    const Beside weight_in{args.weight_in, args.weight_in_type, "weight_in"};
    const auto out_partial = global<A>(args.dweight_out_partial, "dweight_out_partial");
    const auto in_partial = global<A>(args.dweight_in_partial, "dweight_in_partial");

    // g is dy, and after the first norm the gradient that arrives at the branch's. x_new does not find room
    // beside these and is loaded twice, the second time from the cache.
    A g[held][Width], f_hat[held][Width];
    A dweight_out[held][Width] = {}, dweight_in[held][Width] = {};
    const RowSlice<Width> all(0, 1, columns, threads_per_row);
    const auto keep_sums = [&](int64_t j, const A(&out)[Width], const A(&in)[Width]) {
        if (args.dweight_out_partial) store_row<Width>(out_partial, chunk * columns + j, out);
        if (args.dweight_in_partial) store_row<Width>(in_partial, chunk * columns + j, in);
    };
    if constexpr (!in_registers) {
        all.template visit<0>([&](int64_t j, int) { keep_sums(j, dweight_out[0], dweight_in[0]); });
    }

    // All groups of a block make the same number of rounds, so that they meet at the barriers.
    for (int64_t first_row = chunk - group; first_row < args.rows; first_row += chunks) {
        const int64_t row = first_row + group, base = row * columns;
        const RowSlice<Width> slice(row, args.rows, columns, threads_per_row);
        const A rstd_out = slice.active ? A(rstd_out_of[row]) : A(0);
        const A rstd_in = slice.active ? A(rstd_in_of[row]) : A(0);
        const auto load_x_hat = [&](int64_t j, A(&x_hat)[Width]) {
            x_new.load(base + j, x_hat);
#pragma unroll
            for (int k = 0; k < Width; ++k) x_hat[k] *= rstd_in;
        };
        const auto load_branch = [&](int64_t j, int v) {
            load_row<Width>(f, base + j, f_hat[v]);
#pragma unroll
            for (int k = 0; k < Width; ++k) f_hat[v][k] *= rstd_out;
        };
        if constexpr (in_registers) {
            slice.template visit<Vectors>([&](int64_t j, int v) {
                load_row<Width>(dy, base + j, g[v]);
                load_branch(j, v);
            });
        }

        A dot_in = 0;
        slice.template visit<Vectors>([&](int64_t j, int v) {
            if constexpr (!in_registers) load_row<Width>(dy, base + j, g[v]);
            A scale[Width], x_hat[Width];
            load_x_hat(j, x_hat);
            load_scale(weight_in, args.weight_offset, j, scale);
#pragma unroll
            for (int k = 0; k < Width; ++k) dot_in += g[v][k] * scale[k] * x_hat[k];
        });
        const A mean_in = group_sum(dot_in, threads_per_row, partials) * per_column;

        // From dy to the gradient of the stream, in place.
        const auto through_norm = [&](int64_t j, int v, bool summed) {
            A scale[Width], x_hat[Width], added[Width];
            load_x_hat(j, x_hat);
            load_scale(weight_in, args.weight_offset, j, scale);
            if (dx_new) dx_new.load(base + j, added);
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                if (summed) dweight_in[v][k] += g[v][k] * x_hat[k];
                const A d = (g[v][k] * scale[k] - x_hat[k] * mean_in) * rstd_in;
                g[v][k] = dx_new ? d + added[k] : d;
            }
        };
        A dot_out = 0;
        slice.template visit<Vectors>([&](int64_t j, int v) {
            if constexpr (!in_registers) {
                load_row<Width>(dy, base + j, g[v]);
                load_branch(j, v);
            }
            through_norm(j, v, in_registers);
            store_beside<X>(args.dx, args.x_type, "dx", base + j, g[v]);
            A scale[Width];
            load_scale(weight_out, args.weight_offset, j, scale);
#pragma unroll
            for (int k = 0; k < Width; ++k) dot_out += g[v][k] * scale[k] * f_hat[v][k];
        });
        const A mean_out = group_sum(dot_out, threads_per_row, partials) * per_column;

        slice.template visit<Vectors>([&](int64_t j, int v) {
            if constexpr (!in_registers) {
                const auto sums_so_far = [&](const void* partial, const char* name, A(&sums)[Width]) {
                    if (partial) load_row<Width>(global<const A>(partial, name), chunk * columns + j, sums);
                };
                sums_so_far(args.dweight_out_partial, "dweight_out_partial", dweight_out[v]);
                sums_so_far(args.dweight_in_partial, "dweight_in_partial", dweight_in[v]);
                load_row<Width>(dy, base + j, g[v]);
                load_branch(j, v);
                through_norm(j, v, true);
            }
            A scale[Width], results[Width];
            load_scale(weight_out, args.weight_offset, j, scale);
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                results[k] = (g[v][k] * scale[k] - f_hat[v][k] * mean_out) * rstd_out;
                dweight_out[v][k] += g[v][k] * f_hat[v][k];
            }
            store_row<Width>(df, base + j, results);
            if constexpr (!in_registers) keep_sums(j, dweight_out[v], dweight_in[v]);
        });
    }
    if constexpr (in_registers) {
        all.template visit<Vectors>([&](int64_t j, int v) { keep_sums(j, dweight_out[v], dweight_in[v]); });
    }
}

}  // namespace narrowgauge
