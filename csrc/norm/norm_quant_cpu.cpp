// CPU kernels of a norm with a quantized result: rows are normalized into float32 working memory that stays
// in the cache, and quantized from there.
#include "common/scratch.h"
#include "norm/norm_quant.h"
#include "quant/encode_cpu.h"

NG_NAMESPACE_BEGIN
namespace {

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The norm of `rows` rows from `first` on, and what it leaves beside y.
void normalize(const NormQuant& args, int64_t first, int64_t rows, float* y) {
    NormForward norm = args.norm;
    const int64_t skipped = first * norm.columns;
    norm.x = static_cast<const char*>(norm.x) + skipped * size_of(norm.x_type);
    if (norm.residual) {
        norm.residual = static_cast<const char*>(norm.residual) + skipped * size_of(norm.residual_type);
        norm.residual_out = static_cast<char*>(norm.residual_out) + skipped * size_of(norm.residual_type);
    }
    if (norm.mean) norm.mean = static_cast<float*>(norm.mean) + first;
    norm.rstd = static_cast<float*>(norm.rstd) + first;
    norm.y = y;
    norm_forward_rows(norm, 0, rows);
}

using U8x16 = uint8_t __attribute__((vector_size(16)));

// Transposes 16 x 16 bytes. One step interleaves row i with row i + 8, which rotates the eight bits of (row,
// column) by one; four steps exchange row and column.
NG_HOST_DEVICE void transpose(U8x16 (&rows)[16]) {
    for (int step = 0; step < 4; ++step) {
        U8x16 next[16];
        for (int i = 0; i < 8; ++i) {
            next[2 * i] = __builtin_shufflevector(rows[i], rows[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5,
                                                  21, 6, 22, 7, 23);
            next[2 * i + 1] = __builtin_shufflevector(rows[i], rows[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12,
                                                      28, 13, 29, 14, 30, 15, 31);
        }
        for (int i = 0; i < 16; ++i) rows[i] = next[i];
    }
}

template <class Code>
struct Kernels {
    // scale_at(j) is the scale of element j.
    template <class ScaleAt>
    static void encode(const float* y, int64_t count, bool given, ScaleAt scale_at, Code* codes) {
        if (given) {
#pragma omp simd
            for (int64_t j = 0; j < count; ++j) codes[j] = round_to_given<Code>(y[j] / scale_at(j));
        } else {
#pragma omp simd
            for (int64_t j = 0; j < count; ++j) codes[j] = round_nearest<Code>(y[j] / scale_at(j));
        }
    }

    static void encode_rows(const NormQuant& args, int64_t first, int64_t rows, const float* y) {
        const int64_t columns = args.norm.columns;
        Code* codes = static_cast<Code*>(args.codes) + first * columns;
        if (args.given) {
            const float scale = *args.given;
            return encode(y, rows * columns, true, [=](int64_t) { return scale; }, codes);
        }
        for (int64_t group = 0; group < rows * args.segments; ++group) {
            const int64_t left = group % args.segments * args.segment,
                          at = group / args.segments * columns + left;
            const int64_t count = smaller(args.segment, columns - left);
            const float scale = bounded_scale<Code>(largest_magnitude(y + at, count), args.upper_bound);
            args.scale[first * args.segments + group] = scale;
            encode(y + at, count, false, [=](int64_t) { return scale; }, codes + at);
        }
    }

    static void rows(const NormQuant& args, int64_t begin, int64_t end) {
        const int64_t columns = args.norm.columns, at_once = columns < 32768 ? 32768 / (columns + 1) + 1 : 1;
        const Scratch<float> y(at_once * columns);
        for (int64_t row = begin; row < end; row += at_once) {
            const int64_t rows = smaller(at_once, end - row);
            normalize(args, row, rows, y.get());
            encode_rows(args, row, rows, y.get());
        }
    }

    static void largest_of_columns(const float* y, int64_t rows, int64_t columns, uint32_t* largest) {
        for (int64_t j = 0; j < columns; ++j) largest[j] = 0;
        for (int64_t row = 0; row < rows; ++row) {
#pragma omp simd
            for (int64_t j = 0; j < columns; ++j) {
                const uint32_t bits = magnitude_bits(y[row * columns + j]);
                largest[j] = bits > largest[j] ? bits : largest[j];
            }
        }
    }

    // Writes columns of the tile as rows; scale[j] is that of column j.
    static void encode_transposed(const NormQuant& args, int64_t first, int64_t rows, const float* y,
                                  const float* scale) {
        constexpr int64_t width = 64;
        const int64_t columns = args.norm.columns;
        Code* codes = static_cast<Code*>(args.codes_t) + first;
        Code tile[kNormQuantTile][width];
        for (int64_t left = 0; left < columns; left += width) {
            const int64_t count = smaller(width, columns - left);
            for (int64_t row = 0; row < rows; ++row) {
                encode(
                    y + row * columns + left, count, args.given != nullptr,
                    [=](int64_t j) { return scale[left + j]; }, tile[row]);
            }
            Code* target = codes + left * args.norm.rows;
            const int64_t whole = count == width ? rows / 16 * 16 : 0;
            for (int64_t j = 0; j < width && whole > 0; j += 16) {
                for (int64_t row = 0; row < whole; row += 16) {
                    U8x16 square[16];
                    for (int i = 0; i < 16; ++i) memcpy(&square[i], &tile[row + i][j], 16);
                    transpose(square);
                    for (int i = 0; i < 16; ++i)
                        memcpy(target + (j + i) * args.norm.rows + row, &square[i], 16);
                }
            }
            for (int64_t j = 0; j < count; ++j) {
                for (int64_t row = whole; row < rows; ++row) target[j * args.norm.rows + row] = tile[row][j];
            }
        }
    }

    static void tiles(const NormQuant& args, int64_t begin, int64_t end) {
        const int64_t columns = args.norm.columns;
        const Scratch<float> y(kNormQuantTile * columns), scale(columns);
        const Scratch<uint32_t> largest(columns);
        for (int64_t tile = begin; tile < end; ++tile) {
            const int64_t first = tile * kNormQuantTile,
                          rows = smaller(kNormQuantTile, args.norm.rows - first);
            normalize(args, first, rows, y.get());
            encode_rows(args, first, rows, y.get());
            if (args.whole_columns) {
                largest_of_columns(y.get(), rows, columns, args.largest_t + tile * columns);
                continue;
            }
            if (args.given) {
                for (int64_t j = 0; j < columns; ++j) scale.get()[j] = *args.given;
            } else {
                largest_of_columns(y.get(), rows, columns, largest.get());
                for (int64_t j = 0; j < columns; ++j) {
                    scale.get()[j] = bounded_scale<Code>(largest.get()[j], args.upper_bound);
                    args.scale_t[j * args.segments_t + tile] = scale.get()[j];
                }
            }
            encode_transposed(args, first, rows, y.get(), scale.get());
        }
    }

    static void column_scales(const NormQuant& args, int64_t begin, int64_t end) {
        const int64_t tiles = (args.norm.rows + kNormQuantTile - 1) / kNormQuantTile;
        for (int64_t j = begin; j < end; ++j) {
            uint32_t largest = 0;
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const uint32_t bits = args.largest_t[tile * args.norm.columns + j];
                largest = bits > largest ? bits : largest;
            }
            args.scale_t[j] = bounded_scale<Code>(largest, args.upper_bound);
        }
    }

    static void transposed_tiles(const NormQuant& args, int64_t begin, int64_t end) {
        const Scratch<float> y(kNormQuantTile * args.norm.columns);
        for (int64_t tile = begin; tile < end; ++tile) {
            const int64_t first = tile * kNormQuantTile,
                          rows = smaller(kNormQuantTile, args.norm.rows - first);
            normalize(args, first, rows, y.get());
            encode_transposed(args, first, rows, y.get(), args.scale_t);
        }
    }
};

// Calls with a value of the type of the codes.
template <class F>
void with_code(const NormQuant& args, F function) {
    if (args.code_type == DType::int8) return function(int8_t{});
    if (args.code_type == DType::e4m3) return function(e4m3{});
    return function(e5m2{});
}

}  // namespace

void norm_quant_rows(const NormQuant& args, int64_t begin, int64_t end) {
    with_code(args, [&](auto code) { Kernels<decltype(code)>::rows(args, begin, end); });
}

void norm_quant_tiles(const NormQuant& args, int64_t begin, int64_t end) {
    with_code(args, [&](auto code) { Kernels<decltype(code)>::tiles(args, begin, end); });
}

void norm_quant_column_scales(const NormQuant& args, int64_t begin, int64_t end) {
    with_code(args, [&](auto code) { Kernels<decltype(code)>::column_scales(args, begin, end); });
}

void norm_quant_transposed_tiles(const NormQuant& args, int64_t begin, int64_t end) {
    with_code(args, [&](auto code) { Kernels<decltype(code)>::transposed_tiles(args, begin, end); });
}

NG_NAMESPACE_END
