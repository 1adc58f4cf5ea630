// Adafactor (Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", ICML 2018,
// arXiv 1804.04235): what its kernels take.
//
// A parameter is a list of matrices, its last two dimensions; a vector is one of a single row. Three passes:
//
//   sums   g^2 by rows and by columns, and p^2 as a whole
//   norms  u^2 as a whole, where u = g / sqrt(max(row * column, least))
//   step   p = p * decay - rate * u
//
// Between them Python turns the sums into one factor per row and one per column.
#pragma once

#include "common/cpu.h"
#include "optim/elementwise.h"

namespace narrowgauge {

// What the first pass adds up in one go: a tile of a matrix.
constexpr int tile_rows = 32, tile_columns = 2048;

struct AdafactorTensor : ElementwiseTensor {  // `row_length` is the number of columns
    const void* columns;  // one factor per column of each matrix, of the type of computation
    int64_t matrix_rows;
    int64_t first_column;  // counted over the list, as first_row
    int64_t first_row_partial, first_column_partial;
};

struct AdafactorArgs : ElementwiseArgs {
    void* row_partial;     // [rows, tiles in a row], of the type of computation, as everything below
    void* column_partial;  // [tiles in a column, columns] of each matrix
    void* square_partial;  // [tiles], or [chunks] of the norms
    void *row_sums, *column_sums, *squares;
    double least;
};

struct AdafactorLaunch {
    static constexpr int capacity =
        static_cast<int>((32764 - sizeof(AdafactorArgs)) / sizeof(AdafactorTensor));
    AdafactorArgs args;
    AdafactorTensor tensors[capacity];
};

// The tiles of a parameter: matrix by matrix, and in each row by row of tiles.
struct Tiles {
    int64_t across, down, matrices;
    NG_HOST_DEVICE int64_t count() const { return across * down * matrices; }
};
NG_HOST_DEVICE Tiles tiles_of(const AdafactorTensor& tensor) {
    if (tensor.numel == 0) return {0, 0, 0};
    return {(tensor.row_length + tile_columns - 1) / tile_columns,
            (tensor.matrix_rows + tile_rows - 1) / tile_rows,
            tensor.numel / (tensor.row_length * tensor.matrix_rows)};
}

// One tile of them.
struct Tile {
    int64_t matrix, row, column;  // the row counted over the parameter
    int rows, columns;
    int64_t across, down;  // its place among the tiles of the matrix
};
NG_HOST_DEVICE Tile tile_at(const AdafactorTensor& tensor, const Tiles& tiles, int64_t index) {
    Tile tile;
    tile.across = index % tiles.across;
    tile.down = index / tiles.across % tiles.down;
    tile.matrix = index / (tiles.across * tiles.down);
    const int64_t row = tile.down * tile_rows, rows = tensor.matrix_rows - row;
    tile.row = tile.matrix * tensor.matrix_rows + row;
    tile.column = tile.across * tile_columns;
    const int64_t columns = tensor.row_length - tile.column;
    tile.rows = static_cast<int>(rows < tile_rows ? rows : tile_rows);
    tile.columns = static_cast<int>(columns < tile_columns ? columns : tile_columns);
    return tile;
}

// Where element i finds the factor of its column.
NG_HOST_DEVICE int64_t column_of(const AdafactorTensor& tensor, int64_t i) {
    return i / (tensor.row_length * tensor.matrix_rows) * tensor.row_length + i % tensor.row_length;
}

}  // namespace narrowgauge

NG_CPU_KERNEL(void, adafactor_sum_tiles,
              (const AdafactorArgs& args, const AdafactorTensor* tensors, int64_t begin, int64_t end))
NG_CPU_KERNEL(void, adafactor_norm_chunks,
              (const AdafactorArgs& args, const AdafactorTensor* tensors, int64_t begin, int64_t end))
NG_CPU_KERNEL(void, adafactor_step_chunks,
              (const AdafactorArgs& args, const AdafactorTensor* tensors, int64_t begin, int64_t end))
