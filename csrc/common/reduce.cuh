// Reductions over groups of consecutive threads.
#pragma once

#include "common/device.h"

namespace narrowgauge {

constexpr int warp_threads = 32;
constexpr unsigned all_lanes = 0xffffffffu;

// Partial sums that group_sum needs: one per warp of the block.
constexpr int max_warps = 32;

// The sum over each group of `group` consecutive threads (a power of two that divides the block), given to
// all of them. Every thread of the block must call it. The order of the additions depends on `group` alone.
template <class A>
__device__ __forceinline__ A group_sum(A value, int group, Shared<A> partials) {
    for (int offset = (group < warp_threads ? group : warp_threads) / 2; offset > 0; offset /= 2) {
        value += __shfl_xor_sync(all_lanes, value, offset);
    }
    if (group <= warp_threads) return value;

    const int warp = threadIdx.x / warp_threads, warps = group / warp_threads;
    __syncthreads();  // every thread has read the partials of the call before
    if (threadIdx.x % warp_threads == 0) partials[warp] = value;
    __syncthreads();
    const int first = warp / warps * warps;
    value = 0;
    for (int i = 0; i < warps; ++i) value += partials[first + i];
    return value;
}

}  // namespace narrowgauge
