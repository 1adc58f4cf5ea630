// CUDA kernels of Dynamic Tanh and Derf. Bytes: the forward reads x and writes y, the backward reads dy and x
// and writes dx; weights and sums are small beside them.
//
// Nothing ties the elements of a row together. A block is `groups` x `threads_per_row` threads; a thread
// keeps to one vector of columns, walks over rows, and has several of them in flight.
#pragma once

#include "common/row.cuh"
#include "norm/dyt.h"

namespace narrowgauge {

struct Tanh {
    static __device__ __forceinline__ float value(float u) { return tanhf(u); }
    static __device__ __forceinline__ double value(double u) { return ::tanh(u); }
    template <class A>
    static __device__ __forceinline__ A derivative(A, A f) {
        return A(1) - f * f;
    }
};

struct Erf {
    static __device__ __forceinline__ float value(float u) { return erff(u); }
    static __device__ __forceinline__ double value(double u) { return ::erf(u); }
    static __device__ __forceinline__ float derivative(float u, float) {
        return 1.12837916709551257f * expf(-(u * u));
    }
    static __device__ __forceinline__ double derivative(double u, double) {
        return 1.12837916709551257 * ::exp(-(u * u));
    }
};

template <class A>
__device__ __forceinline__ A scalar_of(const void* raw, DType type, const char* name, int64_t index = 0) {
    A value[1];
    Beside{raw, type, name}.load(index, value);
    return value[0];
}

template <int Width>
constexpr int rows_in_flight = Width == 1 || Width == 4 ? 4 : 2;  // fewer of bfloat16, and of double

template <class X, int Width, class F>
__global__ void __launch_bounds__(128, 1) dyt_forward_kernel(DytForward args, int threads_per_row) {
    using A = compute_t<X>;
    constexpr int in_flight = rows_in_flight<Width>;
    const int groups = blockDim.x / threads_per_row;
    const int64_t lane = threadIdx.x % threads_per_row, columns = args.columns,
                  j = (static_cast<int64_t>(blockIdx.x) * threads_per_row + lane) * Width,
                  stride = static_cast<int64_t>(gridDim.y) * groups;
    if (j >= columns) return;

    const auto x = global<const X>(args.x, "x");
    const auto y = global<X>(args.y, "y");
    const Beside weights{args.weight, args.weight_type, "weight"}, biases{args.bias, args.bias_type, "bias"};
    const A alpha = scalar_of<A>(args.alpha, args.alpha_type, "alpha");
    const A shift = args.shift ? scalar_of<A>(args.shift, args.shift_type, "shift") : A(-0.0);
    A weight[Width] = {}, bias[Width];
#pragma unroll
    for (int k = 0; k < Width; ++k) bias[k] = A(-0.0);  // which keeps the sign of a zero
    if (args.channels_last) {
        weights.load(j, weight);
        if (biases) biases.load(j, bias);
    }

    for (int64_t first = static_cast<int64_t>(blockIdx.y) * groups + threadIdx.x / threads_per_row;
         first < args.rows; first += in_flight * stride) {
        A values[in_flight][Width];
#pragma unroll
        for (int i = 0; i < in_flight; ++i) {
            const int64_t row = first + i * stride;
            if (row < args.rows) load_row<Width>(x, row * columns + j, values[i]);
        }
#pragma unroll
        for (int i = 0; i < in_flight; ++i) {
            const int64_t row = first + i * stride;
            if (row >= args.rows) break;
            if (!args.channels_last) {
                const int64_t channel = row % args.channels;
                const A w = scalar_of<A>(args.weight, args.weight_type, "weight", channel);
                const A b = biases ? scalar_of<A>(args.bias, args.bias_type, "bias", channel) : A(-0.0);
#pragma unroll
                for (int k = 0; k < Width; ++k) {
                    weight[k] = w;
                    bias[k] = b;
                }
            }
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                values[i][k] = weight[k] * F::value(alpha * values[i][k] + shift) + bias[k];
            }
            store_row<Width>(y, row * columns + j, values[i]);
        }
    }
}

// The terms of one vector: dx in place of s, and what they add to the sums.
template <int Width, class F, class A>
__device__ __forceinline__ void dyt_terms(A (&s)[Width], const A (&g)[Width], const A (&weight)[Width],
                                          A alpha, A shift, A& dalpha, A& dshift, A (&dweight)[Width],
                                          A (&dbias)[Width]) {
#pragma unroll
    for (int k = 0; k < Width; ++k) {
        const A u = alpha * s[k] + shift, f = F::value(u), du = g[k] * weight[k] * F::derivative(u, f);
        dalpha += du * s[k];
        dshift += du;
        dweight[k] += g[k] * f;
        dbias[k] += g[k];
        s[k] = alpha * du;
    }
}

// One partial sum of dalpha and dshift for each block.
template <class A>
__device__ __forceinline__ void dyt_scalar_sums(const DytBackward& args, A dalpha, A dshift) {
    SharedArena arena;
    const Shared<A> partials = arena.template take<A>(max_warps);
    dalpha = group_sum(dalpha, blockDim.x, partials);
    dshift = group_sum(dshift, blockDim.x, partials);
    if (threadIdx.x != 0) return;
    const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
    if (args.dalpha_partial) global<A>(args.dalpha_partial, "dalpha_partial")[block] = dalpha;
    if (args.dshift_partial) global<A>(args.dshift_partial, "dshift_partial")[block] = dshift;
}

// Channels last: as the forward. A thread holds the sums of its columns, and its group writes one row of
// them.
template <class X, int Width, class F>
__global__ void __launch_bounds__(128, 1) dyt_backward_kernel(DytBackward args, int threads_per_row) {
    using A = compute_t<X>;
    constexpr int in_flight = rows_in_flight<Width>;
    const int groups = blockDim.x / threads_per_row;
    const int64_t lane = threadIdx.x % threads_per_row, columns = args.columns,
                  j = (static_cast<int64_t>(blockIdx.x) * threads_per_row + lane) * Width,
                  chunk = static_cast<int64_t>(blockIdx.y) * groups + threadIdx.x / threads_per_row,
                  stride = static_cast<int64_t>(gridDim.y) * groups;
    const auto dy = global<const X>(args.dy, "dy");
    const auto x = global<const X>(args.x, "x");
    const auto dx = global<X>(args.dx, "dx");
    const A alpha = scalar_of<A>(args.alpha, args.alpha_type, "alpha");
    const A shift = args.shift ? scalar_of<A>(args.shift, args.shift_type, "shift") : A(-0.0);

    A dalpha = 0, dshift = 0;
    if (j < columns) {
        A weight[Width], dweight[Width] = {}, dbias[Width] = {};
        Beside{args.weight, args.weight_type, "weight"}.load(j, weight);
        for (int64_t first = chunk; first < args.rows; first += in_flight * stride) {
            A s[in_flight][Width], g[in_flight][Width];
#pragma unroll
            for (int i = 0; i < in_flight; ++i) {
                const int64_t row = first + i * stride;
                if (row >= args.rows) break;
                load_row<Width>(x, row * columns + j, s[i]);
                load_row<Width>(dy, row * columns + j, g[i]);
            }
#pragma unroll
            for (int i = 0; i < in_flight; ++i) {
                const int64_t row = first + i * stride;
                if (row >= args.rows) break;
                dyt_terms<Width, F>(s[i], g[i], weight, alpha, shift, dalpha, dshift, dweight, dbias);
                store_row<Width>(dx, row * columns + j, s[i]);
            }
        }
        const int64_t target = chunk * columns + j;
        if (args.dweight_partial)
            store_row<Width>(global<A>(args.dweight_partial, "dweight_partial"), target, dweight);
        if (args.dbias_partial)
            store_row<Width>(global<A>(args.dbias_partial, "dbias_partial"), target, dbias);
    }
    dyt_scalar_sums(args, dalpha, dshift);
}

// Channels second: a group of threads sums over a row, which is of one channel.
template <class X, int Width, class F>
__global__ void __launch_bounds__(256, 1) dyt_backward_rows_kernel(DytBackward args, int threads_per_row) {
    using A = compute_t<X>;
    SharedArena arena;
    const Shared<A> partials = arena.template take<A>(max_warps);
    const int groups = blockDim.x / threads_per_row;
    const auto dy = global<const X>(args.dy, "dy");
    const auto x = global<const X>(args.x, "x");
    const auto dx = global<X>(args.dx, "dx");
    const A alpha = scalar_of<A>(args.alpha, args.alpha_type, "alpha");
    const A shift = args.shift ? scalar_of<A>(args.shift, args.shift_type, "shift") : A(-0.0);

    A dalpha = 0, dshift = 0;
    // All groups of a block make the same number of rounds, so that they meet at the barriers.
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * groups; first < args.rows;
         first += static_cast<int64_t>(gridDim.x) * groups) {
        const int64_t row = first + threadIdx.x / threads_per_row, base = row * args.columns;
        const RowSlice<Width> slice(row, args.rows, args.columns, threads_per_row);
        A weight[Width], dweight[Width] = {}, dbias[Width] = {};
        if (slice.active) {
            const A w = scalar_of<A>(args.weight, args.weight_type, "weight", row % args.channels);
#pragma unroll
            for (int k = 0; k < Width; ++k) weight[k] = w;
        }
        slice.template visit<0>([&](int64_t j, int) {
            A s[Width], g[Width];
            load_row<Width>(x, base + j, s);
            load_row<Width>(dy, base + j, g);
            dyt_terms<Width, F>(s, g, weight, alpha, shift, dalpha, dshift, dweight, dbias);
            store_row<Width>(dx, base + j, s);
        });
        A dweight_sum = 0, dbias_sum = 0;
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            dweight_sum += dweight[k];
            dbias_sum += dbias[k];
        }
        dweight_sum = group_sum(dweight_sum, threads_per_row, partials);
        dbias_sum = group_sum(dbias_sum, threads_per_row, partials);
        if (slice.active && slice.lane == 0) {
            if (args.dweight_partial) global<A>(args.dweight_partial, "dweight_partial")[row] = dweight_sum;
            if (args.dbias_partial) global<A>(args.dbias_partial, "dbias_partial")[row] = dbias_sum;
        }
    }
    dyt_scalar_sums(args, dalpha, dshift);
}

}  // namespace narrowgauge
