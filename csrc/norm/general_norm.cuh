// CUDA kernels of the general row norm. How rows lie on threads: common/row.cuh.
//
// Bytes: the forward reads x, x1 and residual and writes y, y1 and the sum, each once; the backward reads dy,
// dy1, s and dresidual and writes what differs among dx, dx1 and dresidual_in. Masks are drawn in registers,
// not stored.
#pragma once

#include "common/columns.cuh"
#include "common/philox.h"
#include "common/row.cuh"
#include "norm/general_norm.h"

namespace narrowgauge {

// Whether elements i ... i + Width - 1 of x (draw 0) or x1 (draw 1) are kept.
template <int Width>
__device__ __forceinline__ void load_keep(const GeneralBranch& branch, int draw, int64_t i,
                                          bool (&keep)[Width]) {
    if (branch.has_mask(draw)) {
        const auto mask = global<const uint8_t>(draw == 0 ? branch.mask : branch.mask1, "dropout_mask");
        const auto loaded = load<Width>(mask, i);
#pragma unroll
        for (int k = 0; k < Width; ++k) keep[k] = loaded[k] != 0;
        return;
    }
    const auto rng = global<const int64_t>(branch.rng, "rng");
    const Philox philox{static_cast<uint64_t>(int64_t(rng[0])),
                        static_cast<uint64_t>(int64_t(rng[1])) + static_cast<uint64_t>(draw)};
    constexpr int step = Width < 4 ? Width : 4;
#pragma unroll
    for (int start = 0; start < Width; start += step) {
        const Philox::Words words = philox.group(static_cast<uint64_t>(i + start) >> 2);
        const int first = Width < 4 ? static_cast<int>(i & 3) : 0;  // of the four; vectors of 4 are aligned
#pragma unroll
        for (int k = 0; k < step; ++k) {
            const uint32_t word = Width < 4 ? pick(words, first + k) : words.word[k];
            keep[start + k] = uniform(word) >= branch.dropout_p;
        }
    }
}

template <int Width, class A>
__device__ __forceinline__ void drop(const GeneralBranch& branch, int draw, int64_t i, A (&values)[Width]) {
    if (!branch.drops(draw)) return;
    bool keep[Width];
    load_keep<Width>(branch, draw, i, keep);
#pragma unroll
    for (int k = 0; k < Width; ++k) {
        values[k] = keep[k] ? values[k] * static_cast<A>(branch.dropout_scale) : A(0);
    }
}

template <class A>
__device__ __forceinline__ A rowscale_of(const GeneralBranch& branch, int64_t row) {
    A factor[1] = {A(1)};
    if (branch.rowscale) Beside{branch.rowscale, branch.rowscale_type, "rowscale"}.load(row, factor);
    return factor[0];
}

template <class X, class A>
__device__ __forceinline__ A round_to(A value) {
    return to_compute(from_compute<X>(value));
}

// --- forward -------------------------------------------------------------------------------------

template <class X, int Width, int Vectors>
__global__ void __launch_bounds__(512, 1)
    general_norm_forward_kernel(GeneralForward args, int threads_per_row) {
    using A = compute_t<X>;
    SharedArena arena;
    const Shared<A> partials = arena.template take<A>(max_warps);

    const int64_t row = row_of_group(threads_per_row);
    const int64_t columns = args.columns, base = row * columns;
    const A per_column = static_cast<A>(args.per_column), eps = static_cast<A>(args.eps);
    const RowSlice<Width> slice(row, args.rows, columns, threads_per_row);
    const bool early = args.casting != Casting::gemma;

    const auto x = global<const X>(args.x, "x");
    const auto x1 = global<const X>(args.x1, "x1");
    const Beside residual{args.residual, args.residual_type, "residual"};
    const A rowscale = slice.active ? rowscale_of<A>(args.branch, row) : A(1);

    const auto load_sum = [&](int64_t j, A(&values)[Width]) {
        load_row<Width>(x, base + j, values);
#pragma unroll
        for (int k = 0; k < Width; ++k) values[k] *= rowscale;
        drop<Width>(args.branch, 0, base + j, values);
        A added[Width];
        if (x1) {
            load_row<Width>(x1, base + j, added);
            drop<Width>(args.branch, 1, base + j, added);
#pragma unroll
            for (int k = 0; k < Width; ++k) values[k] += added[k];
        }
        if (residual) {
            residual.load(base + j, added);
#pragma unroll
            for (int k = 0; k < Width; ++k) values[k] += added[k];
        }
    };

    RowValues<A, Width, Vectors> held;
    held.load_once(slice, load_sum);
    const auto visit = [&](auto&& function) { held.visit(slice, load_sum, function); };

    A mean = 0;
    if (args.centred) {
        A sum = 0;
        visit([&](int64_t, const A(&values)[Width]) {
#pragma unroll
            for (int k = 0; k < Width; ++k) sum += values[k];
        });
        mean = group_sum(sum, threads_per_row, partials) * per_column;
    }
    A sum_of_squares = 0, rounded_squares = 0;
    visit([&](int64_t, const A(&values)[Width]) {
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            const A square = (values[k] - mean) * (values[k] - mean);
            sum_of_squares += square;
            rounded_squares += round_to<X>(square);
        }
    });
    sum_of_squares = group_sum(sum_of_squares, threads_per_row, partials);
    const A rstd = A(1) / sqrt(sum_of_squares * per_column + eps);
    A factor = rstd;
    if (args.casting == Casting::none) {
        rounded_squares = group_sum(rounded_squares, threads_per_row, partials);
        const A variance = round_to<X>(round_to<X>(rounded_squares * per_column) + eps);
        factor = round_to<X>(A(1) / sqrt(variance));
    }

    if (slice.active && slice.lane == 0) {
        if (args.mean) global<A>(args.mean, "mean")[row] = mean;
        if (args.rstd) global<A>(args.rstd, "rstd")[row] = rstd;
    }
    visit([&](int64_t j, const A(&values)[Width]) {
        if (args.residual_out) {
            store_beside<X>(args.residual_out, args.sum_type, "residual_out", base + j, values);
        }
        const auto write = [&](const Beside& weight, const Beside& bias, void* target, const char* name) {
            A scale[Width] = {}, shift[Width] = {}, y[Width];
            if (weight) weight.load(j, scale);
            if (bias) bias.load(j, shift);
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                const auto cast = [&](A value) { return early ? round_to<X>(value) : value; };
                y[k] = cast((values[k] - mean) * factor);
                if (weight) y[k] = cast(y[k] * cast(scale[k] + static_cast<A>(args.weight_offset)));
                if (bias) y[k] = cast(y[k] + cast(shift[k]));
                y[k] *= static_cast<A>(args.output_scale);
            }
            store_beside<X>(target, args.y_type, name, base + j, y);
        };
        write({args.weight, args.weight_type, "weight"}, {args.bias, args.bias_type, "bias"}, args.y, "y");
        if (args.y1) {
            write({args.weight1, args.weight1_type, "weight1"}, {args.bias1, args.bias1_type, "bias1"},
                  args.y1, "y1");
        }
    });
}

// --- backward ------------------------------------------------------------------------------------

// Loads the terms of the backward from column j of a row on.
template <int Width, class A>
struct GeneralTerms {
    const GeneralBackward& args;
    Beside s{args.s, args.s_type, "s"}, dy{args.dy, args.dy_type, "dy"}, dy1{args.dy1, args.dy_type, "dy1"};
    Beside weight{args.weight, args.weight_type, "weight"},
        weight1{args.weight1, args.weight1_type, "weight1"};
    Beside bias{args.bias, args.bias_type, "bias"};

    __device__ __forceinline__ void load_weight(const Beside& vector, int64_t j, A (&values)[Width]) const {
#pragma unroll
        for (int k = 0; k < Width; ++k) values[k] = A(1);
        if (!vector) return;
        vector.load(j, values);
#pragma unroll
        for (int k = 0; k < Width; ++k) values[k] += static_cast<A>(args.weight_offset);
    }

    __device__ __forceinline__ void load_x_hat(int64_t base, int64_t j, A mean, A rstd,
                                               A (&x_hat)[Width]) const {
        s.load(base + j, x_hat);
        if (args.from_output) {
            A divisor[Width], shift[Width] = {};
            load_weight(weight, j, divisor);
            if (bias) bias.load(j, shift);
            const A least = static_cast<A>(args.min_weight);
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                if (fabs(divisor[k]) < least) divisor[k] = copysign(least, divisor[k]);
                x_hat[k] = (x_hat[k] / static_cast<A>(args.output_scale) - shift[k]) / divisor[k];
            }
        } else {
#pragma unroll
            for (int k = 0; k < Width; ++k) x_hat[k] = (x_hat[k] - mean) * rstd;
        }
    }

    __device__ __forceinline__ void load_gradient(const Beside& gradient, int64_t i, A (&g)[Width]) const {
        gradient.load(i, g);
#pragma unroll
        for (int k = 0; k < Width; ++k) g[k] *= static_cast<A>(args.output_scale);
    }
};

// The gradients of full size, and the partial sums of those of weights and biases, as norm_backward_kernel.
// Only with `Second` may there be a second output: its sums need as many registers again.
template <class X, int Width, int Vectors, bool Second>
__global__ void __launch_bounds__(512, 1)
    general_norm_backward_kernel(GeneralBackward args, int threads_per_row) {
    using A = compute_t<X>;
    SharedArena arena;
    const Shared<A> partials = arena.template take<A>(max_warps);

    const int groups = blockDim.x / threads_per_row, group = threadIdx.x / threads_per_row;
    const int64_t chunk = static_cast<int64_t>(blockIdx.x) * groups + group;
    const int64_t chunks = static_cast<int64_t>(gridDim.x) * groups;
    const int64_t columns = args.columns;
    const A per_column = static_cast<A>(args.per_column);
    constexpr bool in_registers = Vectors > 0;
    constexpr int held = in_registers ? Vectors : 1, pairs = Second ? 2 : 1;

    const GeneralTerms<Width, A> terms{args};
    const Beside dresidual{args.dresidual, args.dresidual_type, "dresidual"};
    const auto mean_of = global<const A>(args.mean, "mean");
    const auto rstd_of = global<const A>(args.rstd, "rstd");

    A dweight[pairs][held][Width] = {}, dbias[pairs][held][Width] = {};
    A x_hat[held][Width], h[held][Width];

    // All groups of a block make the same number of rounds, so that they meet at the barriers.
    for (int64_t first_row = chunk - group; first_row < args.rows; first_row += chunks) {
        const int64_t row = first_row + group, base = row * columns;
        const RowSlice<Width> slice(row, args.rows, columns, threads_per_row);
        const A rstd = slice.active ? A(rstd_of[row]) : A(0);
        const A mean = slice.active && mean_of ? A(mean_of[row]) : A(0);
        const A rowscale = slice.active ? rowscale_of<A>(args.branch, row) : A(1);

        const auto load_terms = [&](int64_t j, int v) {
            terms.load_x_hat(base, j, mean, rstd, x_hat[v]);
#pragma unroll
            for (int k = 0; k < Width; ++k) h[v][k] = 0;
#pragma unroll
            for (int pair = 0; pair < pairs; ++pair) {
                if (pair == 1 && !terms.dy1) continue;
                A g[Width], weight[Width];
                terms.load_gradient(pair == 0 ? terms.dy : terms.dy1, base + j, g);
                terms.load_weight(pair == 0 ? terms.weight : terms.weight1, j, weight);
#pragma unroll
                for (int k = 0; k < Width; ++k) {
                    h[v][k] += g[k] * weight[k];
                    if constexpr (in_registers) {  // loaded once, so added once
                        dweight[pair][v][k] += g[k] * x_hat[v][k];
                        dbias[pair][v][k] += g[k];
                    }
                }
            }
        };
        if constexpr (in_registers) slice.template visit<Vectors>(load_terms);
        const auto visit = [&](auto&& function) {
            slice.template visit<Vectors>([&](int64_t j, int v) {
                if constexpr (!in_registers) load_terms(j, v);
                function(j, v);
            });
        };

        A dot = 0, sum = 0;
        visit([&](int64_t, int v) {
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                dot += h[v][k] * x_hat[v][k];
                sum += h[v][k];
            }
        });
        const A mean_dot = group_sum(dot, threads_per_row, partials) * per_column;
        const A mean_sum = args.centred ? group_sum(sum, threads_per_row, partials) * per_column : A(0);

        visit([&](int64_t j, int v) {
            A ds[Width], added[Width] = {};
            if (dresidual) dresidual.load(base + j, added);
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                ds[k] = (h[v][k] - x_hat[v][k] * mean_dot - mean_sum) * rstd + added[k];
            }
            if (args.dresidual_in) {
                store_beside<X>(args.dresidual_in, args.residual_type, "dresidual_in", base + j, ds);
            }
            if (args.dx1) {
#pragma unroll
                for (int k = 0; k < Width; ++k) added[k] = ds[k];
                drop<Width>(args.branch, 1, base + j, added);
                store_row<Width>(global<X>(args.dx1, "dx1"), base + j, added);
            }
            drop<Width>(args.branch, 0, base + j, ds);
#pragma unroll
            for (int k = 0; k < Width; ++k) ds[k] *= rowscale;
            store_row<Width>(global<X>(args.dx, "dx"), base + j, ds);
        });
    }

    if constexpr (in_registers) {
        const int64_t stride = static_cast<int64_t>(threads_per_row) * Width;
#pragma unroll
        for (int v = 0; v < Vectors; ++v) {
            const int64_t j = (threadIdx.x % threads_per_row) * Width + v * stride;
            if (j >= columns) break;
            const auto keep = [&](void* target, const char* name, const A(&sums)[Width]) {
                if (target) store_row<Width>(global<A>(target, name), chunk * columns + j, sums);
            };
            keep(args.dweight_partial, "dweight_partial", dweight[0][v]);
            keep(args.dbias_partial, "dbias_partial", dbias[0][v]);
            if constexpr (Second) {
                keep(args.dweight1_partial, "dweight1_partial", dweight[1][v]);
                keep(args.dbias1_partial, "dbias1_partial", dbias[1][v]);
            }
        }
    }
}

// The partial sums for rows too long for registers: block (x, c) takes rows chunk c of the columns.
template <class X>
__global__ void __launch_bounds__(1024) general_norm_columns_kernel(GeneralBackward args) {
    using A = compute_t<X>;
    SharedArena arena;
    const Shared<A> shared = arena.template take<A>(tile_sums);
    const int64_t j = static_cast<int64_t>(blockIdx.x) * tile + threadIdx.x;
    const int64_t last = args.rows * (blockIdx.y + 1) / args.chunks;

    const GeneralTerms<1, A> terms{args};
    const auto mean_of = global<const A>(args.mean, "mean");
    const auto rstd_of = global<const A>(args.rstd, "rstd");
    A sums[4] = {};  // dweight, dbias, dweight1, dbias1
    if (j < args.columns) {
        for (int64_t row = args.rows * blockIdx.y / args.chunks + threadIdx.y; row < last; row += tile) {
            const int64_t base = row * args.columns;
            A x_hat[1], g[1];
            terms.load_x_hat(base, j, mean_of ? A(mean_of[row]) : A(0), rstd_of[row], x_hat);
            terms.load_gradient(terms.dy, base + j, g);
            sums[0] += g[0] * x_hat[0];
            sums[1] += g[0];
            if (!terms.dy1) continue;
            terms.load_gradient(terms.dy1, base + j, g);
            sums[2] += g[0] * x_hat[0];
            sums[3] += g[0];
        }
    }
    void* const targets[4] = {args.dweight_partial, args.dbias_partial, args.dweight1_partial,
                              args.dbias1_partial};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (!targets[i]) continue;
        const A total = sum_over_tile_rows(sums[i], shared);
        if (j < args.columns && threadIdx.y == 0) {
            global<A>(targets[i], "partial")[blockIdx.y * args.columns + j] = total;
        }
    }
}

}  // namespace narrowgauge
