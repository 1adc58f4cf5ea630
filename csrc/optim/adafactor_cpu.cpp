// CPU kernels of Adafactor.
#include "optim/adafactor.h"
#include "optim/elementwise_cpu.h"

NG_NAMESPACE_BEGIN

namespace {

template <class F>
void for_tensors(const AdafactorTensor* tensors, int64_t count, int64_t begin, int64_t end,
                 const F& function) {
    const AdafactorTensor* tensor =
        std::upper_bound(tensors, tensors + count, begin,
                         [](int64_t part, const auto& candidate) { return part < candidate.last_chunk; });
    for (int64_t part = begin; part < end; ++tensor) {
        const int64_t first = tensor == tensors ? 0 : tensor[-1].last_chunk,
                      last = std::min(end, tensor->last_chunk);
        if (part == last) continue;  // an empty parameter
        function(*tensor, part - first, last - first, part);
        part = last;
    }
}

// The factor of each element's column.
template <class T>
void spread_columns(const AdafactorTensor& tensor, int64_t begin, int n, T* to) {
    const T* columns = static_cast<const T*>(tensor.columns);
    const int64_t size = tensor.row_length;
    for (int i = 0; i < n;) {
        const int64_t column = (begin + i) % size;
        const int count = static_cast<int>(std::min<int64_t>(n - i, size - column));
        std::copy_n(columns + column_of(tensor, begin + i), count, to + i);
        i += count;
    }
}

template <class T>
void sum_tile(const AdafactorArgs& args, const AdafactorTensor& tensor, const Tiles& tiles, int64_t index,
              T* squares) {
    alignas(64) T param_buffer[state_block], grad_buffer[state_block], terms[state_block];
    const Tile tile = tile_at(tensor, tiles, index);
    T* columns = static_cast<T*>(args.column_partial) + tensor.first_column_partial +
                 (tile.matrix * tiles.down + tile.down) * tensor.row_length + tile.column;
    T* rows = static_cast<T*>(args.row_partial) + tensor.first_row_partial + tile.across;
    std::fill_n(columns, tile.columns, T(0));
    double param_squares = 0.0;
    for (int64_t row = tile.row; row < tile.row + tile.rows; ++row) {
        double sum = 0.0;
        for (int j = 0; j < tile.columns; j += state_block) {
            const int n = std::min(state_block, tile.columns - j);
            const int64_t i = row * tensor.row_length + tile.column + j;
            const T* p = staging::load_param(args, tensor, i, n, param_buffer);
            const T* g = staging::load_grad(args, tensor, i, n, grad_buffer);
            T* column = columns + j;
            NG_INDEPENDENT_ITERATIONS
            for (int k = 0; k < n; ++k) {
                const T square = g[k] * g[k];
                column[k] += square;
                terms[k] = square;
            }
            sum += sum_of(terms, n);
            NG_INDEPENDENT_ITERATIONS
            for (int k = 0; k < n; ++k) terms[k] = p[k] * p[k];
            param_squares += sum_of(terms, n);
        }
        rows[row * tiles.across] = static_cast<T>(sum);
    }
    *squares = static_cast<T>(param_squares);
}

template <class T>
void sum_tiles(const AdafactorArgs& args, const AdafactorTensor* tensors, int64_t begin, int64_t end) {
    for_tensors(tensors, args.count, begin, end,
                [&](const AdafactorTensor& tensor, int64_t first, int64_t last, int64_t part) {
                    const Tiles tiles = tiles_of(tensor);
                    T* squares = static_cast<T*>(args.square_partial) + part;
                    for (int64_t index = first; index < last; ++index)
                        sum_tile<T>(args, tensor, tiles, index, squares++);
                });
}

template <class T>
struct Block {
    alignas(64) T param[state_block], grad[state_block], rows[state_block], columns[state_block];
};

template <class T>
void norm_chunks(const AdafactorArgs& args, const AdafactorTensor* tensors, int64_t begin, int64_t end) {
    const T least = static_cast<T>(args.least);
    for_tensors(tensors, args.count, begin, end,
                [&](const AdafactorTensor& tensor, int64_t first, int64_t last, int64_t part) {
                    Block<T> block;
                    T* squares = static_cast<T*>(args.square_partial) + part;
                    for (int64_t chunk = first; chunk < last; ++chunk) {
                        const int64_t stop = std::min(tensor.numel, (chunk + 1) * cpu_chunk);
                        double sum = 0.0;
                        for (int64_t i = chunk * cpu_chunk; i < stop; i += state_block) {
                            const int n = static_cast<int>(std::min<int64_t>(state_block, stop - i));
                            const T* g = staging::load_grad(args, tensor, i, n, block.grad);
                            staging::spread_rows(tensor, i, n, block.rows);
                            spread_columns(tensor, i, n, block.columns);
                            NG_INDEPENDENT_ITERATIONS
                            for (int k = 0; k < n; ++k) {
                                const T v = block.rows[k] * block.columns[k];
                                block.param[k] = g[k] * g[k] / (v < least ? least : v);
                            }
                            sum += sum_of(block.param, n);
                        }
                        *squares++ = static_cast<T>(sum);
                    }
                });
}

template <class T>
void step_chunks(const AdafactorArgs& args, const AdafactorTensor* tensors, int64_t begin, int64_t end) {
    const T least = static_cast<T>(args.least);
    for_tensors(tensors, args.count, begin, end,
                [&](const AdafactorTensor& tensor, int64_t first, int64_t last, int64_t) {
                    Block<T> block;
                    const T decay = static_cast<T>(tensor.given[0]), rate = static_cast<T>(tensor.given[1]);
                    const bool followed = tensor.ema || tensor.copy || args.zero_grad;
                    const int64_t stop = std::min(tensor.numel, last * cpu_chunk);
                    for (int64_t i = first * cpu_chunk; i < stop; i += state_block) {
                        const int n = static_cast<int>(std::min<int64_t>(state_block, stop - i));
                        T* p = staging::load_param(args, tensor, i, n, block.param);
                        const T* g = staging::load_grad(args, tensor, i, n, block.grad);
                        staging::spread_rows(tensor, i, n, block.rows);
                        spread_columns(tensor, i, n, block.columns);
                        NG_INDEPENDENT_ITERATIONS
                        for (int k = 0; k < n; ++k) {
                            const T v = block.rows[k] * block.columns[k];
                            p[k] = p[k] * decay - rate * (g[k] / std::sqrt(v < least ? least : v));
                        }
                        staging::store_param(args, tensor, i, n, p);
                        if (followed) staging::follow(args, tensor, i, n, p);
                    }
                });
}

}  // namespace

void adafactor_sum_tiles(const AdafactorArgs& args, const AdafactorTensor* tensors, int64_t begin,
                         int64_t end) {
    args.param_type == DType::float64 ? sum_tiles<double>(args, tensors, begin, end)
                                      : sum_tiles<float>(args, tensors, begin, end);
}

void adafactor_norm_chunks(const AdafactorArgs& args, const AdafactorTensor* tensors, int64_t begin,
                           int64_t end) {
    args.param_type == DType::float64 ? norm_chunks<double>(args, tensors, begin, end)
                                      : norm_chunks<float>(args, tensors, begin, end);
}

void adafactor_step_chunks(const AdafactorArgs& args, const AdafactorTensor* tensors, int64_t begin,
                           int64_t end) {
    args.param_type == DType::float64 ? step_chunks<double>(args, tensors, begin, end)
                                      : step_chunks<float>(args, tensors, begin, end);
}

NG_NAMESPACE_END
