// CUDA kernels of softmax, log-softmax and log-sum-exp.
//
// A row is read once and stays in registers (bytes: one read, one write); a longer one (Vectors = 0) is read
// twice, the maximum and the sum being found together (online form). The backward likewise.
#pragma once

#include "common/row.cuh"
#include "norm/exponentials.cuh"
#include "norm/softmax.h"

namespace narrowgauge {

template <class X, int Width, int Vectors>
__global__ void __launch_bounds__(512, 1) softmax_forward_kernel(SoftmaxForward args, int threads_per_row) {
    using A = compute_t<X>;
    SharedArena arena;
    const Shared<A> partials = arena.template take<A>(max_warps);

    const int64_t row = row_of_group(threads_per_row), base = row * args.columns;
    const RowSlice<Width> slice(row, args.rows, args.columns, threads_per_row);
    const auto x = global<const X>(args.x, "x");
    const auto keep = global<const bool>(args.mask_type == DType::boolean ? args.mask : nullptr, "mask");
    const Beside added{args.mask_type == DType::boolean ? nullptr : args.mask, args.mask_type, "mask"};
    const int64_t mask_base = args.mask && slice.active ? mapped_row(args.mask_rows, row) * args.columns : 0;

    const auto load_masked = [&](int64_t j, A(&values)[Width]) {
        load_row<Width>(x, base + j, values);
        if (keep) {
            const auto kept = load<Width>(keep, mask_base + j);
#pragma unroll
            for (int k = 0; k < Width; ++k) values[k] = kept[k] ? values[k] : minus_infinity<A>();
        } else if (added) {
            A mask[Width];
            added.load(mask_base + j, mask);
#pragma unroll
            for (int k = 0; k < Width; ++k) values[k] += mask[k];
        }
    };
    RowValues<A, Width, Vectors> held;
    held.load_once(slice, load_masked);
    const auto visit = [&](auto&& f) { held.visit(slice, load_masked, f); };
    const ShiftedSum<A> sum = shifted_sum<Width, (Vectors > 0), A>(visit, threads_per_row, partials);
    const A shift = sum.shift;

    if (slice.active && slice.lane == 0) {
        if (args.lse) {
            global<X>(args.lse, "lse")[row] = from_compute<X>(sum.logarithm());
        }
        if (args.mantissa) {
            const Extended<A> extended = to_extended(sum);
            global<A>(args.mantissa, "mantissa")[row] = extended.mantissa;
            global<A>(args.exponent, "exponent")[row] = extended.exponent;
        }
    }
    if (args.y == nullptr) return;
    const bool zero = args.zero_masked && shift == minus_infinity<A>() && sum.sum == A(0);
    const bool infinite = shift == -minus_infinity<A>();
    const A rest = infinite ? shift - shift : args.log ? log(sum.sum) : A(1) / sum.sum;  // NaN where infinite
    visit([&](int64_t j, const A(&values)[Width]) {
        A y[Width];
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            if (zero) {
                y[k] = args.log ? minus_infinity<A>() : A(0);
            } else {
                y[k] = args.log ? (values[k] - shift) - rest : exp(values[k] - shift) * rest;
            }
        }
        store_beside<X>(args.y, args.y_type, "y", base + j, y);
    });
}

template <class X, int Width, int Vectors>
__global__ void __launch_bounds__(512, 1) softmax_backward_kernel(SoftmaxBackward args, int threads_per_row) {
    using A = compute_t<X>;
    SharedArena arena;
    const Shared<A> partials = arena.template take<A>(max_warps);

    const int64_t row = row_of_group(threads_per_row), base = row * args.columns;
    const RowSlice<Width> slice(row, args.rows, args.columns, threads_per_row);
    const Beside gradient{args.dy, args.y_type, "dy"}, result{args.y, args.y_type, "y"};
    const auto keep = global<const bool>(args.mask, "mask");
    const int64_t mask_base = args.mask && slice.active ? mapped_row(args.mask_rows, row) * args.columns : 0;

    RowValues<A, Width, Vectors> y, dy;
    y.load_once(slice, [&](int64_t j, A(&values)[Width]) { result.load(base + j, values); });
    dy.load_once(slice, [&](int64_t j, A(&values)[Width]) { gradient.load(base + j, values); });
    const auto visit = [&](auto&& f) {
        slice.template visit<Vectors>([&](int64_t j, int v) {
            if constexpr (Vectors == 0) {
                result.load(base + j, y.values[v]);
                gradient.load(base + j, dy.values[v]);
            }
            f(j, y.values[v], dy.values[v]);
        });
    };
    A sum = 0;
    visit([&](int64_t, const A(&value)[Width], const A(&g)[Width]) {
#pragma unroll
        for (int k = 0; k < Width; ++k) sum += args.log ? g[k] : g[k] * value[k];
    });
    sum = group_sum(sum, threads_per_row, partials);
    visit([&](int64_t j, const A(&value)[Width], const A(&g)[Width]) {
        A d[Width];
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            d[k] = args.log ? g[k] - exp(value[k]) * sum : value[k] * (g[k] - sum);
        }
        if (keep) {
            const auto kept = load<Width>(keep, mask_base + j);
#pragma unroll
            for (int k = 0; k < Width; ++k) d[k] = kept[k] ? d[k] : A(0);
        }
        store_row<Width>(global<X>(args.dx, "dx"), base + j, d);
    });
}

}  // namespace narrowgauge
