// The CUDA kernel that adds partial sums.
#include "common/columns.cuh"
#include "norm/partial_sums.h"

namespace narrowgauge {
namespace {

template <class A, class T>
__global__ void __launch_bounds__(1024) partial_sums_kernel(PartialSums args) {
    SharedArena arena;
    const Shared<A> sums = arena.template take<A>(tile_sums);
    const int64_t j = static_cast<int64_t>(blockIdx.x) * tile + threadIdx.x;
    const auto partial = global<const A>(args.partial, "partial");
    A sum = 0;
    if (j < args.columns) {
        for (int64_t chunk = threadIdx.y; chunk < args.chunks; chunk += tile)
            sum += partial[chunk * args.columns + j];
    }
    sum = sum_over_tile_rows(sum, sums);
    if (j < args.columns && threadIdx.y == 0) {
        global<T>(args.result, "result")[j] = from_compute<T>(static_cast<compute_t<T>>(sum));
    }
}

template <class A, class T>
void launch_with_types(const PartialSums& args, Stream stream) {
    const LaunchConfig config{dim3(static_cast<unsigned>((args.columns + tile - 1) / tile)), dim3(tile, tile),
                              tile_sums * sizeof(A), 1, stream};
    launch(config, partial_sums_kernel<A, T>, args);
}

}  // namespace

void launch_partial_sums(const PartialSums& args, Stream stream) {
    switch (args.result_type) {
        case DType::float64:
            return launch_with_types<double, double>(args, stream);
        case DType::bfloat16:
            return launch_with_types<float, bf16>(args, stream);
        case DType::float16:
            return launch_with_types<float, f16>(args, stream);
        default:
            return launch_with_types<float, float>(args, stream);
    }
}

}  // namespace narrowgauge
