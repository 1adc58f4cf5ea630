// Sums over the columns of a matrix.
#pragma once

#include "common/device.h"

namespace narrowgauge {

// A 32 x 32 block takes a slice of 32 columns: each thread sums over the rows y, y + 32, ... of its column,
// then sum_over_tile_rows adds the 32 results (in the threads of the first row; the others get 0).
constexpr int tile = 32;
constexpr int tile_sums = tile * (tile + 1);  // elements of shared memory that it needs

template <class A>
__device__ __forceinline__ A sum_over_tile_rows(A value, Shared<A> sums) {
    __syncthreads();  // the call before is done with `sums`
    sums[threadIdx.y * (tile + 1) + threadIdx.x] = value;
    __syncthreads();
    A total = 0;
    if (threadIdx.y == 0) {
        for (int y = 0; y < tile; ++y) total += sums[y * (tile + 1) + threadIdx.x];
    }
    return total;
}

}  // namespace narrowgauge
