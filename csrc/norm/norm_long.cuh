// LayerNorm / RMSNorm of rows too long for the registers of a block, still read once.
//
// A cluster of blocks (one block where the device has none) takes a row, and each thread keeps its part of it
// in shared memory. Blocks exchange their sums through distributed shared memory. Beyond what a cluster
// holds, norm.cuh reads a row again at each pass.
#pragma once

#include "norm/norm.cuh"

namespace narrowgauge {

constexpr int long_row_threads = 512;

// How many blocks share a row, and what each keeps of it. A block keeps about 64 KiB, so that several fit on
// a multiprocessor, and more only when there are no more blocks to ask.
struct LongRow {
    int64_t max_row_bytes;
    int cluster;
};
constexpr LongRow long_rows[] = {{int64_t{64} << 10, 1}, {int64_t{128} << 10, 2}, {int64_t{256} << 10, 4}};
constexpr int largest_cluster = 8;

struct LongRowPlan {
    int cluster;
    int64_t kept_bytes;  // of each block; 0: the row does not fit
};

inline LongRowPlan long_row_plan(int64_t columns, int width, int64_t bytes_per_column,
                                 const BlockLimits& limits) {
    int cluster = largest_cluster;
    for (const LongRow& step : long_rows) {
        if (columns * bytes_per_column <= step.max_row_bytes) {
            cluster = step.cluster;
            break;
        }
    }
    if (cluster > limits.cluster) cluster = limits.cluster;
    const int64_t per_visit = static_cast<int64_t>(long_row_threads) * width,
                  visits = (columns + per_visit * cluster - 1) / (per_visit * cluster),
                  bytes = visits * per_visit * bytes_per_column;
    constexpr int64_t sums = 1024;  // room for those of the reductions
    return {cluster, bytes + sums <= limits.shared_bytes ? bytes : 0};
}

// The sum of `value` over all threads of the blocks that share the row. Each call needs a slot of its own,
// and before the kernel ends the blocks must meet once more, because the others may still be reading.
template <class A>
__device__ __forceinline__ A long_row_sum(A value, int cluster, Shared<A> partials, Shared<A> slot) {
    value = group_sum(value, long_row_threads, partials);
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (cluster > 1) {
        if (threadIdx.x == 0) slot[0] = value;
        cluster_barrier();
        value = 0;
        for (int rank = 0; rank < cluster; ++rank) value += A(cluster_map(slot, rank)[0]);
    }
#endif
    return value;
}

__device__ __forceinline__ void long_row_end([[maybe_unused]] int cluster) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (cluster > 1) cluster_barrier();
#endif
}

// This thread's columns of the row that its cluster takes.
template <int Width>
__device__ __forceinline__ RowSlice<Width> long_row_slice(int64_t columns, [[maybe_unused]] int cluster) {
    RowSlice<Width> slice(0, 1, columns, long_row_threads);
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (cluster > 1) {
        slice.first += static_cast<int64_t>(cluster_rank()) * slice.stride;
        slice.stride *= cluster;
    }
#endif
    return slice;
}

// A thread's values of one row in shared memory, where no other thread touches them: neighbours lie in
// neighbouring banks.
template <class A, int Width>
struct KeptInShared {
    Shared<A> space;

    __device__ __forceinline__ void put(int visit, const A (&values)[Width]) const {
#pragma unroll
        for (int k = 0; k < Width; ++k)
            space[(visit * Width + k) * long_row_threads + threadIdx.x] = values[k];
    }
    __device__ __forceinline__ void get(int visit, A (&values)[Width]) const {
#pragma unroll
        for (int k = 0; k < Width; ++k)
            values[k] = space[(visit * Width + k) * long_row_threads + threadIdx.x];
    }
};

// f(j, visit) for each of this thread's vectors.
template <int Width, class F>
__device__ __forceinline__ void visit_long(const RowSlice<Width>& slice, F&& f) {
    int visit = 0;
    for (int64_t j = slice.first; j < slice.columns; j += slice.stride, ++visit) f(j, visit);
}

template <class X, int Width>
__global__ void __launch_bounds__(long_row_threads, 1)
    norm_forward_long_kernel(NormForward args, int cluster, int kept) {
    using A = compute_t<X>;
    SharedArena arena;
    const Shared<A> partials = arena.template take<A>(max_warps);
    const Shared<A> slots = arena.template take<A>(2);
    const KeptInShared<A, Width> row_values{arena.template take<A>(kept)};

    const int64_t row = blockIdx.x / cluster, base = row * args.columns;
    const A per_column = static_cast<A>(args.per_column);
    const RowSlice<Width> slice = long_row_slice<Width>(args.columns, cluster);
    const auto x = global<const X>(args.x, "x");
    const Beside residual{args.residual, args.residual_type, "residual"};
    const Beside weight{args.weight, args.weight_type, "weight"};
    const Beside bias{args.bias, args.bias_type, "bias"};

    A sum = 0;
    visit_long(slice, [&](int64_t j, int visit) {
        A values[Width], added[Width] = {};
        load_row<Width>(x, base + j, values);
        if (residual) residual.load(base + j, added);
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            values[k] += added[k];
            sum += values[k];
        }
        row_values.put(visit, values);
        if (args.residual_out) {
            store_beside<X>(args.residual_out, args.residual_type, "residual_out", base + j, values);
        }
    });
    const A mean = args.centred ? long_row_sum(sum, cluster, partials, slots) * per_column : A(0);
    A sum_of_squares = 0;
    visit_long(slice, [&](int64_t, int visit) {
        A values[Width];
        row_values.get(visit, values);
#pragma unroll
        for (int k = 0; k < Width; ++k) sum_of_squares += (values[k] - mean) * (values[k] - mean);
    });
    sum_of_squares = long_row_sum(sum_of_squares, cluster, partials, slots + 1);
    const A rstd = A(1) / sqrt(sum_of_squares * per_column + static_cast<A>(args.eps));
    if (slice.first == 0) {
        if (args.mean) global<A>(args.mean, "mean")[row] = mean;
        if (args.rstd) global<A>(args.rstd, "rstd")[row] = rstd;
    }
    if (!args.y) return long_row_end(cluster);
    const A factor = args.scale ? A(global<const A>(args.scale, "scale")[row]) : rstd;
    visit_long(slice, [&](int64_t j, int visit) {
        A values[Width], scale[Width] = {}, shift[Width] = {};
        row_values.get(visit, values);
        if (weight) weight.load(j, scale);
        if (bias) bias.load(j, shift);
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            values[k] = (values[k] - mean) * factor;
            if (weight) values[k] *= scale[k] + static_cast<A>(args.weight_offset);
            if (bias) values[k] += shift[k];
        }
        store_beside<X>(args.y, args.y_type, "y", base + j, values);
    });
    long_row_end(cluster);
}

// dx alone; norm_backward_columns_kernel does the rest.
template <class S, int Width>
__global__ void __launch_bounds__(long_row_threads, 1)
    norm_backward_long_kernel(NormBackward args, int cluster, int kept) {
    using A = compute_t<S>;
    SharedArena arena;
    const Shared<A> partials = arena.template take<A>(max_warps);
    const Shared<A> slots = arena.template take<A>(2);
    const KeptInShared<A, Width> kept_x_hat{arena.template take<A>(kept)},
        kept_h{arena.template take<A>(kept)};

    const int64_t row = blockIdx.x / cluster, base = row * args.columns;
    const A per_column = static_cast<A>(args.per_column);
    const RowSlice<Width> slice = long_row_slice<Width>(args.columns, cluster);
    const Beside dy{args.dy, args.dy_type, "dy"};
    const Beside weight{args.weight, args.weight_type, "weight"};
    const auto x = global<const S>(args.x, "x");
    const auto dresidual = global<const S>(args.dresidual, "dresidual");
    const A rstd = global<const A>(args.rstd, "rstd")[row];
    const A mean = args.centred ? A(global<const A>(args.mean, "mean")[row]) : A(0);

    A dot = 0, sum = 0;
    visit_long(slice, [&](int64_t j, int visit) {
        A x_hat[Width], h[Width], scale[Width] = {};
        load_row<Width>(x, base + j, x_hat);
        dy.load(base + j, h);
        if (weight) weight.load(j, scale);
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            x_hat[k] = (x_hat[k] - mean) * rstd;
            if (weight) h[k] *= scale[k] + static_cast<A>(args.weight_offset);
            dot += h[k] * x_hat[k];
            sum += h[k];
        }
        kept_x_hat.put(visit, x_hat);
        kept_h.put(visit, h);
    });
    const A mean_dot = args.given_scale ? A(0) : long_row_sum(dot, cluster, partials, slots) * per_column;
    const A mean_sum = args.centred ? long_row_sum(sum, cluster, partials, slots + 1) * per_column : A(0);
    visit_long(slice, [&](int64_t j, int visit) {
        A x_hat[Width], h[Width], d[Width] = {};
        kept_x_hat.get(visit, x_hat);
        kept_h.get(visit, h);
        if (dresidual) load_row<Width>(dresidual, base + j, d);
#pragma unroll
        for (int k = 0; k < Width; ++k) d[k] += (h[k] - x_hat[k] * mean_dot - mean_sum) * rstd;
        store_row<Width>(global<S>(args.dx, "dx"), base + j, d);
    });
    long_row_end(cluster);
}

}  // namespace narrowgauge
