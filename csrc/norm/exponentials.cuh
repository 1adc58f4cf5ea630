// Sums of exponentials over a row shared by a group of threads.
#pragma once

#include "common/row.cuh"

namespace narrowgauge {

template <class A>
__device__ __forceinline__ A minus_infinity() {
    return -A(INFINITY);
}

// The largest value in each group of `group` consecutive threads, as group_sum in reduce.cuh. The first
// reduction of a kernel: it does not wait for readers of an earlier use of `partials`.
template <class A>
__device__ __forceinline__ A group_max(A value, int group, Shared<A> partials) {
    for (int offset = (group < warp_threads ? group : warp_threads) / 2; offset > 0; offset /= 2) {
        value = max(value, __shfl_xor_sync(all_lanes, value, offset));
    }
    if (group <= warp_threads) return value;

    const int warp = threadIdx.x / warp_threads, warps = group / warp_threads, first = warp / warps * warps;
    if (threadIdx.x % warp_threads == 0) partials[warp] = value;
    __syncthreads();
    for (int i = 0; i < warps; ++i) value = max(value, A(partials[first + i]));
    return value;
}

// sum(e^x) = sum * e^shift. With an infinite shift, the largest element, the sum is that of e^x itself: 0 for
// -inf throughout, infinite, or NaN.
template <class A>
struct ShiftedSum {
    A shift, sum;

    __device__ __forceinline__ A logarithm() const {
        return shift == -minus_infinity<A>() ? sum : shift + log(sum);
    }
};

template <class A>
__device__ __forceinline__ A finite_shift(A most) {
    return most == minus_infinity<A>() || most == -minus_infinity<A>() ? A(0) : most;
}

// `visit(f)` calls f(j, values) for each of this thread's vectors. A row in registers is visited twice; from
// memory it is read once, the sum being rescaled when a vector brings a new maximum.
template <int Width, bool InRegisters, class A, class Visit>
__device__ __forceinline__ ShiftedSum<A> shifted_sum(Visit&& visit, int group, Shared<A> partials) {
    A most = minus_infinity<A>(), sum = 0;
    if constexpr (InRegisters) {
        visit([&](int64_t, const A(&values)[Width]) {
#pragma unroll
            for (int k = 0; k < Width; ++k) most = max(most, values[k]);
        });
        most = group_max(most, group, partials);
        const A shift = finite_shift(most);
        visit([&](int64_t, const A(&values)[Width]) {
#pragma unroll
            for (int k = 0; k < Width; ++k) sum += exp(values[k] - shift);
        });
    } else {
        visit([&](int64_t, const A(&values)[Width]) {
            A top = most;
#pragma unroll
            for (int k = 0; k < Width; ++k) top = max(top, values[k]);
            const A shift = finite_shift(top);
            sum *= exp(most - shift);
#pragma unroll
            for (int k = 0; k < Width; ++k) sum += exp(values[k] - shift);
            most = top;
        });
        const A own = most;
        most = group_max(most, group, partials);
        sum *= exp(own - finite_shift(most));
    }
    return {most, group_sum(sum, group, partials)};
}

// The sum as mantissa * 2^exponent, mantissa in [1, 2).
template <class A>
struct Extended {
    A mantissa, exponent;
};

template <class A>
__device__ __forceinline__ Extended<A> to_extended(const ShiftedSum<A>& sum) {
    if (sum.shift == minus_infinity<A>()) return {sum.sum, sum.shift};
    if (sum.shift == -minus_infinity<A>()) return {sum.sum, 0};
    constexpr double ln2 = 0x1.62e42fefa39efp-1;
    const double shift = static_cast<double>(sum.shift), whole = rint(shift / ln2);
    int steps = 0;
    const double mantissa = frexp(static_cast<double>(sum.sum) * exp(shift - whole * ln2), &steps);
    // NaN keeps the exponent finite.
    return {static_cast<A>(2 * mantissa), static_cast<A>(mantissa == mantissa ? whole + steps - 1 : 0)};
}

}  // namespace narrowgauge
