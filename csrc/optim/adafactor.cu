// Launches of the Adafactor kernels.
#include <algorithm>

#include "optim/adafactor.cuh"
#include "optim/adafactor_launch.h"

namespace narrowgauge {
namespace {

LaunchConfig config_for(int64_t blocks, size_t shared_bytes, Stream stream) {
    const int64_t resident = int64_t{multiprocessor_count()} * 2;
    LaunchConfig config{};
    config.grid = dim3(static_cast<unsigned>(blocks < resident ? blocks : resident));
    config.block = dim3(elementwise_threads);
    config.shared_bytes = shared_bytes;
    config.stream = stream;
    return config;
}

template <class T>
void add_squares(const AdafactorLaunch& table, Stream stream) {
    LaunchConfig config = config_for(1, taken<double>(max_warps), stream);
    config.grid = dim3(static_cast<unsigned>(table.args.count));
    launch(config, adafactor_square_kernel<T>, table);
}

template <class T>
void sums_of(const AdafactorLaunch& table, Stream stream) {
    if (table.args.chunks > 0)
        launch(config_for(table.args.chunks, taken<T>(max_warps), stream), adafactor_sum_kernel<T>, table);
    int64_t most = 1;
    for (int64_t i = 0; i < table.args.count; ++i) {
        const AdafactorTensor& tensor = table.tensors[i];
        most = std::max({most, rows_of(tensor), tensor.numel / tensor.matrix_rows});
    }
    LaunchConfig config = config_for(1, 0, stream);
    const int64_t blocks = (most + elementwise_threads - 1) / elementwise_threads;
    config.grid =
        dim3(static_cast<unsigned>(table.args.count), static_cast<unsigned>(std::min<int64_t>(blocks, 64)));
    launch(config, adafactor_add_kernel<T>, table);
    add_squares<T>(table, stream);
}

template <class T>
void norms_of(const AdafactorLaunch& table, Stream stream) {
    if (table.args.chunks > 0)
        launch(config_for(table.args.chunks, taken<T>(max_warps), stream), adafactor_norm_kernel<T>, table);
    add_squares<T>(table, stream);
}

template <class T>
void step_of(const AdafactorLaunch& table, Stream stream) {
    launch(config_for(1, 0, stream), count_steps_kernel<AdafactorLaunch>, table);
    if (table.args.chunks > 0)
        launch(config_for(table.args.chunks, 0, stream), adafactor_step_kernel<T>, table);
}

}  // namespace

void launch_adafactor_sums(const AdafactorLaunch& table, Stream stream) {
    table.args.param_type == DType::float64 ? sums_of<double>(table, stream) : sums_of<float>(table, stream);
}

void launch_adafactor_norms(const AdafactorLaunch& table, Stream stream) {
    table.args.param_type == DType::float64 ? norms_of<double>(table, stream)
                                            : norms_of<float>(table, stream);
}

void launch_adafactor_step(const AdafactorLaunch& table, Stream stream) {
    table.args.param_type == DType::float64 ? step_of<double>(table, stream) : step_of<float>(table, stream);
}

}  // namespace narrowgauge
