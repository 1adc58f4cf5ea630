// CUDA kernels of Adafactor.
#pragma once

#include "optim/adafactor.h"
#include "optim/elementwise.cuh"

namespace narrowgauge {

// A block adds up one tile: a thread keeps its columns in registers, rows are summed over the block.
template <class T>
__global__ void __launch_bounds__(elementwise_threads, 2)
    adafactor_sum_kernel(const __grid_constant__ AdafactorLaunch launch) {
    constexpr int per_thread = tile_columns / elementwise_threads;
    const AdafactorArgs& args = launch.args;
    SharedArena arena;
    const Shared<T> partials = arena.take<T>(max_warps);
    T divisor;
    const T factor = load_grad_factor(args, divisor);
    const auto row_partial = global<T>(args.row_partial, "row_partial"),
               column_partial = global<T>(args.column_partial, "column_partial");
    for (int64_t part = blockIdx.x; part < args.chunks; part += gridDim.x) {
        const AdafactorTensor& tensor = launch.tensors[find_tensor(launch, part)];
        const Tiles tiles = tiles_of(tensor);
        const Tile tile = tile_at(tensor, tiles, part - (tensor.last_chunk - tiles.count()));
        T columns[per_thread] = {}, squares = 0;
        for (int64_t row = tile.row; row < tile.row + tile.rows; ++row) {
            const int64_t begin = row * tensor.row_length + tile.column;
            T sum = 0;
#pragma unroll
            for (int k = 0; k < per_thread; ++k) {
                const int j = k * elementwise_threads + static_cast<int>(threadIdx.x);
                if (j >= tile.columns) continue;
                T p[1], g[1];
                load_any<1>(args.param_type, tensor.param, "param", begin + j, 1, false, p);
                load_any<1>(args.grad_type, tensor.grad, "grad", begin + j, 1, false, g);
                if (args.grad_scale) g[0] = g[0] / divisor;
                g[0] = g[0] * factor;
                const T square = g[0] * g[0];
                columns[k] += square;
                sum += square;
                squares += p[0] * p[0];
            }
            sum = group_sum(sum, elementwise_threads, partials);
            if (threadIdx.x == 0)
                row_partial[tensor.first_row_partial + row * tiles.across + tile.across] = sum;
        }
        const int64_t first = tensor.first_column_partial +
                              (tile.matrix * tiles.down + tile.down) * tensor.row_length + tile.column;
#pragma unroll
        for (int k = 0; k < per_thread; ++k) {
            const int j = k * elementwise_threads + static_cast<int>(threadIdx.x);
            if (j < tile.columns) column_partial[first + j] = columns[k];
        }
        squares = group_sum(squares, elementwise_threads, partials);
        if (threadIdx.x == 0) global<T>(args.square_partial, "square_partial")[part] = squares;
    }
}

// A thread adds up the tiles of one row, or of one column. One block column per parameter.
template <class T>
__global__ void __launch_bounds__(elementwise_threads)
    adafactor_add_kernel(const __grid_constant__ AdafactorLaunch launch) {
    const AdafactorArgs& args = launch.args;
    const AdafactorTensor& tensor = launch.tensors[blockIdx.x];
    const Tiles tiles = tiles_of(tensor);
    const int64_t size = tensor.row_length, rows = size > 0 ? tensor.numel / size : 1,
                  columns = tiles.matrices * size;
    const int64_t stride = int64_t{gridDim.y} * elementwise_threads;
    const int64_t start = int64_t{blockIdx.y} * elementwise_threads + threadIdx.x;
    const auto row_partial = global<const T>(args.row_partial, "row_partial"),
               column_partial = global<const T>(args.column_partial, "column_partial");
    for (int64_t row = start; row < rows; row += stride) {
        double sum = 0.0;
        for (int64_t k = 0; k < tiles.across; ++k)
            sum += static_cast<double>(
                static_cast<T>(row_partial[tensor.first_row_partial + row * tiles.across + k]));
        global<T>(args.row_sums, "row_sums")[tensor.first_row + row] = static_cast<T>(sum);
    }
    for (int64_t column = start; column < columns; column += stride) {
        const int64_t first = tensor.first_column_partial + column / size * tiles.down * size + column % size;
        double sum = 0.0;
        for (int64_t k = 0; k < tiles.down; ++k)
            sum += static_cast<double>(static_cast<T>(column_partial[first + k * size]));
        global<T>(args.column_sums, "column_sums")[tensor.first_column + column] = static_cast<T>(sum);
    }
}

// A block per parameter adds up what its tiles or chunks left.
template <class T>
__global__ void __launch_bounds__(elementwise_threads)
    adafactor_square_kernel(const __grid_constant__ AdafactorLaunch launch) {
    const AdafactorArgs& args = launch.args;
    SharedArena arena;
    const Shared<double> partials = arena.take<double>(max_warps);
    const int64_t first = blockIdx.x == 0 ? 0 : launch.tensors[blockIdx.x - 1].last_chunk;
    const auto partial = global<const T>(args.square_partial, "square_partial");
    double sum = 0.0;
    for (int64_t part = first + threadIdx.x; part < launch.tensors[blockIdx.x].last_chunk;
         part += elementwise_threads)
        sum += static_cast<double>(static_cast<T>(partial[part]));
    sum = group_sum(sum, elementwise_threads, partials);
    if (threadIdx.x == 0) global<T>(args.squares, "squares")[blockIdx.x] = static_cast<T>(sum);
}

// The factor of each element's column.
template <int N, class T>
__device__ __forceinline__ void load_columns(const AdafactorTensor& tensor, int64_t i, int n, T (&to)[N]) {
    if (n <= 0) return;
    const auto columns = global<const T>(tensor.columns, "columns");
    const int64_t size = tensor.row_length, row = i / size;
    int64_t column = i - row * size, matrix = row / tensor.matrix_rows;
    int64_t left = (matrix + 1) * tensor.matrix_rows - row;
#pragma unroll
    for (int j = 0; j < N; ++j) {
        if (column == size) {
            column = 0;
            if (--left == 0) {
                ++matrix;
                left = tensor.matrix_rows;
            }
        }
        if (j < n) to[j] = columns[matrix * size + column];
        ++column;
    }
}

// function(tensor, i, n, whole, g, v) for every few elements of a chunk, v their second moment.
template <class T, int Width, class F>
__device__ __forceinline__ void for_elements(const AdafactorArgs& args, const AdafactorTensor& tensor,
                                             int64_t chunk, const F& function) {
    T divisor;
    const T factor = load_grad_factor(args, divisor), least = static_cast<T>(args.least);
    const bool aligned =
        ((reinterpret_cast<uintptr_t>(tensor.param) | reinterpret_cast<uintptr_t>(tensor.grad) |
          reinterpret_cast<uintptr_t>(tensor.ema) | reinterpret_cast<uintptr_t>(tensor.copy)) %
         16) == 0;
    const int64_t begin = chunk * cuda_chunk, end = min(tensor.numel, begin + cuda_chunk);
    for (int64_t base = begin; base < end; base += elementwise_threads * Width) {
        const int64_t i = base + threadIdx.x * Width;
        const int n = static_cast<int>(max(int64_t{0}, min(int64_t{Width}, end - i)));
        const bool whole = aligned && n == Width;
        T g[Width], v[Width] = {}, columns[Width] = {};
        load_any<Width>(args.grad_type, tensor.grad, "grad", i, n, whole, g);
        load_rows(tensor, i, n, v);
        load_columns(tensor, i, n, columns);
#pragma unroll
        for (int j = 0; j < Width; ++j) {
            if (args.grad_scale) g[j] = g[j] / divisor;
            g[j] = g[j] * factor;
            v[j] = v[j] * columns[j];
            v[j] = v[j] < least ? least : v[j];
        }
        function(i, n, whole, g, v);
    }
}

template <class T>
__global__ void __launch_bounds__(elementwise_threads, 2)
    adafactor_norm_kernel(const __grid_constant__ AdafactorLaunch launch) {
    constexpr int width = std::is_same_v<T, float> ? 8 : 2;
    const AdafactorArgs& args = launch.args;
    SharedArena arena;
    const Shared<T> partials = arena.take<T>(max_warps);
    for (int64_t part = blockIdx.x; part < args.chunks; part += gridDim.x) {
        const AdafactorTensor& tensor = launch.tensors[find_tensor(launch, part)];
        const int64_t chunks = (tensor.numel + cuda_chunk - 1) / cuda_chunk;
        T sum = 0;
        for_elements<T, width>(args, tensor, part - (tensor.last_chunk - chunks),
                               [&](int64_t, int n, bool, const T(&g)[width], const T(&v)[width]) {
#pragma unroll
                                   for (int j = 0; j < width; ++j) {
                                       if (j < n) sum += g[j] * g[j] / v[j];
                                   }
                               });
        sum = group_sum(sum, elementwise_threads, partials);
        if (threadIdx.x == 0) global<T>(args.square_partial, "square_partial")[part] = sum;
    }
}

template <class T>
__global__ void __launch_bounds__(elementwise_threads, 2)
    adafactor_step_kernel(const __grid_constant__ AdafactorLaunch launch) {
    constexpr bool narrow = std::is_same_v<T, float>;
    constexpr int width = narrow ? 8 : 2;
    const AdafactorArgs& args = launch.args;
    if (args.found_inf && global<const float>(args.found_inf, "found_inf")[0] != 0.0f) return;
    for (int64_t part = blockIdx.x; part < args.chunks; part += gridDim.x) {
        const AdafactorTensor& tensor = launch.tensors[find_tensor(launch, part)];
        const int64_t chunks = (tensor.numel + cuda_chunk - 1) / cuda_chunk;
        const auto given = global<const double>(tensor.given, "given");
        const T decay = static_cast<T>(static_cast<double>(given[0])),
                rate = static_cast<T>(static_cast<double>(given[1]));
        const uint32_t step = load_step(tensor);
        for_elements<T, width>(args, tensor, part - (tensor.last_chunk - chunks),
                               [&](int64_t i, int n, bool whole, const T(&g)[width], const T(&v)[width]) {
                                   T p[width];
                                   load_any<width>(args.param_type, tensor.param, "param", i, n, whole, p);
#pragma unroll
                                   for (int j = 0; j < width; ++j)
                                       p[j] = p[j] * decay - rate * (g[j] / std::sqrt(v[j]));
                                   follow_param<width>(args, tensor, step, i, n, whole, p);
                               });
    }
}

}  // namespace narrowgauge
