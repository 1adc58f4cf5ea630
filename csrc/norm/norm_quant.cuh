// CUDA kernels of a norm with a quantized result. With e bytes per element of x:
//
//     norm_quant_kernel               e + 1 bytes: x is read once, codes are written. Rows too long for
//     registers
//                                     are read again, from the caches where they fit
//     norm_quant_transposed_kernel    1 + 1 with a given scale (codes are moved), else e + 1: y is computed
//     again
//                                     from x and the statistics
//     and for scales of whole columns once more e, to find them
#pragma once

#include "common/columns.cuh"
#include "common/row.cuh"
#include "norm/norm_quant.h"
#include "quant/encode.cuh"

namespace narrowgauge {

// y of `Width` elements from their sums: both kernels below compute the same bits.
template <int Width>
__device__ __forceinline__ void normalize(float (&values)[Width], bool centred, float mean, float rstd,
                                          bool with_weight, const float (&factor)[Width], bool with_bias,
                                          const float (&shift)[Width]) {
#pragma unroll
    for (int k = 0; k < Width; ++k) {
        if (centred) values[k] -= mean;
        values[k] *= rstd;
        if (with_weight) values[k] *= factor[k];
        if (with_bias) values[k] += shift[k];
    }
}

template <class Code>
__device__ __forceinline__ Code encode_value(float value, float scale, bool given) {
    return given ? round_to_given<Code>(value / scale) : round_nearest<Code>(value / scale);
}

template <int Width>
__device__ __forceinline__ uint32_t largest_of(const float (&values)[Width], uint32_t largest) {
#pragma unroll
    for (int k = 0; k < Width; ++k) largest = max(largest, magnitude_bits(values[k]));
    return largest;
}

// --- rows ----------------------------------------------------------------------------------------

// The normalized row stays in registers until its scale is known; with Vectors = 0 it is computed again for
// each of the passes that need it.
template <class X, class Code, int Width, int Vectors>
__global__ void __launch_bounds__(512, 1) norm_quant_kernel(NormQuant args, int threads_per_row) {
    SharedArena arena;
    const Shared<float> sums = arena.template take<float>(max_warps);
    const Shared<uint32_t> maxima = arena.template take<uint32_t>(max_warps);

    const NormForward& norm = args.norm;
    const int64_t row = row_of_group(threads_per_row);
    const int64_t columns = norm.columns, base = row * columns;
    const RowSlice<Width> slice(row, norm.rows, columns, threads_per_row);
    const bool centred = norm.centred, leads = slice.active && slice.lane == 0;

    const auto x = global<const X>(norm.x, "x");
    const auto codes = global<Code>(args.codes, "codes");
    const auto scales = global<float>(args.scale, "scale");
    const Beside residual{norm.residual, norm.residual_type, "residual"};
    const Beside weight{norm.weight, norm.weight_type, "weight"};
    const Beside bias{norm.bias, norm.bias_type, "bias"};

    const auto load_sum = [&](int64_t j, float (&values)[Width]) {
        load_row<Width>(x, base + j, values);
        if (residual) {
            float added[Width];
            residual.load(base + j, added);
#pragma unroll
            for (int k = 0; k < Width; ++k) values[k] += added[k];
        }
    };
    RowValues<float, Width, Vectors> held;
    held.load_once(slice, load_sum);

    float mean = 0.0f;
    if (centred) {
        float sum = 0.0f;
        held.visit(slice, load_sum, [&](int64_t, const float (&values)[Width]) {
#pragma unroll
            for (int k = 0; k < Width; ++k) sum += values[k];
        });
        mean = group_sum(sum, threads_per_row, sums) * static_cast<float>(norm.per_column);
    }
    float sum_of_squares = 0.0f;
    held.visit(slice, load_sum, [&](int64_t j, const float (&values)[Width]) {
        if (norm.residual_out) {
            store_beside<X>(norm.residual_out, norm.residual_type, "residual_out", base + j, values);
        }
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            const float deviation = centred ? values[k] - mean : values[k];
            sum_of_squares += deviation * deviation;
        }
    });
    sum_of_squares = group_sum(sum_of_squares, threads_per_row, sums);
    const float variance = sum_of_squares * static_cast<float>(norm.per_column);
    const float rstd = 1.0f / sqrtf(variance + static_cast<float>(norm.eps));
    if (leads) {
        if (norm.mean) global<float>(norm.mean, "mean")[row] = mean;
        global<float>(norm.rstd, "rstd")[row] = rstd;
    }

    const auto normalized = [&](int64_t j, float (&values)[Width]) {
        float factor[Width] = {}, shift[Width] = {};
        if (weight) {
            weight.load(j, factor);
#pragma unroll
            for (int k = 0; k < Width; ++k) factor[k] += static_cast<float>(norm.weight_offset);
        }
        if (bias) bias.load(j, shift);
        normalize(values, centred, mean, rstd, bool(weight), factor, bool(bias), shift);
    };
    const auto load_normalized = [&](int64_t j, float (&values)[Width]) {
        load_sum(j, values);
        normalized(j, values);
    };
    const auto encode = [&](int64_t j, const float (&values)[Width], float scale, bool given) {
        Vec<Code, Width> rounded;
#pragma unroll
        for (int k = 0; k < Width; ++k) rounded[k] = encode_value<Code>(values[k], scale, given);
        store<Width>(codes, base + j, rounded);
    };
    if constexpr (Vectors > 0) held.visit(slice, load_sum, normalized);

    if (args.given || args.segments == 1) {
        float scale;
        if (args.given) {
            scale = global<const float>(args.given, "scale")[0];
        } else {
            uint32_t largest = 0;
            held.visit(slice, load_normalized,
                       [&](int64_t, const float (&values)[Width]) { largest = largest_of(values, largest); });
            scale = bounded_scale<Code>(group_max(largest, threads_per_row, maxima), args.upper_bound);
            if (leads) scales[row] = scale;
        }
        held.visit(slice, load_normalized, [&](int64_t j, const float (&values)[Width]) {
            encode(j, values, scale, args.given != nullptr);
        });
        return;
    }

    // A scale per segment: the threads that hold one are neighbours in a warp, so no barrier is needed; every
    // thread takes part in every exchange.
    constexpr int segment = static_cast<int>(kNormQuantTile);
    if constexpr (Vectors > 0) {
        const int holders = min(threads_per_row, segment / Width);
#pragma unroll
        for (int v = 0; v < Vectors; ++v) {
            const int64_t j = slice.first + v * slice.stride;
            const uint32_t largest = j < columns ? largest_of(held.values[v], 0u) : 0u;
            const float scale = bounded_scale<Code>(group_max(largest, holders, maxima), args.upper_bound);
            if (j >= columns) continue;
            if (j % segment == 0) scales[row * args.segments + j / segment] = scale;
            encode(j, held.values[v], scale, false);
        }
    } else {
        constexpr int most = segment / Width < warp_threads ? segment / Width : warp_threads;
        const int holders = min(threads_per_row, most), holder = slice.lane % holders;
        for (int64_t i = 0; i < args.segments; i += threads_per_row / holders) {
            const int64_t at = i + slice.lane / holders, left = at * segment;
            const int64_t end = slice.active ? min(left + segment, columns) : left;
            uint32_t largest = 0;
            for (int64_t j = left + holder * Width; j < end; j += holders * Width) {
                load_normalized(j, held.values[0]);
                largest = largest_of(held.values[0], largest);
            }
            const float scale = bounded_scale<Code>(group_max(largest, holders, maxima), args.upper_bound);
            if (holder == 0 && left < end) scales[row * args.segments + at] = scale;
            for (int64_t j = left + holder * Width; j < end; j += holders * Width) {
                load_normalized(j, held.values[0]);
                encode(j, held.values[0], scale, false);
            }
        }
    }
}

// --- the transposed copy -------------------------------------------------------------------------

// A block takes a tile of 128 rows and 64 columns. A thread holds 8 columns of 4 consecutive rows: one word
// of codes per column. The words cross over in shared memory, where a column of the tile is 32 words and a
// gap of one (and of four more every 32 columns), so that neither side meets a bank twice.
namespace transposed {
constexpr int rows = static_cast<int>(kNormQuantTile), columns = 64, width = 8, rows_each = 4;
constexpr int threads = rows / rows_each * (columns / width), warps = threads / warp_threads;
constexpr int words = columns * (rows / rows_each + 1) + 4 * (columns / 32);
__device__ __forceinline__ int word(int column, int i) {
    return column * (rows / rows_each + 1) + column / 32 * 4 + i;
}
constexpr size_t shared_bytes = (warps * columns + columns + words) * sizeof(uint32_t);
}  // namespace transposed

// What the transposing kernel does with its tile: moves codes that exist, finds the largest magnitudes of its
// columns, or encodes, with the scale of its own columns or of whole ones.
enum class Transposing { move, find_largest, encode_own, encode_whole };

// `count` of 8 elements from i on, the others 0. `aligned` says that all 8 may be loaded as vectors.
__device__ __forceinline__ void load_some(const Beside& source, int64_t i, int count, bool aligned,
                                          float (&values)[transposed::width]) {
    if (aligned) return source.load(i, values);
#pragma unroll
    for (int k = 0; k < transposed::width; ++k) {
        float one[1] = {0.0f};
        if (k < count) source.load(i + k, one);
        values[k] = one[0];
    }
}

template <class Code>
__global__ void __launch_bounds__(transposed::threads)
    norm_quant_transposed_kernel(NormQuant args, Transposing what, int64_t column_tiles, bool aligned) {
    using namespace transposed;
    SharedArena arena;
    const Shared<uint32_t> partials = arena.template take<uint32_t>(warps * columns);
    const Shared<float> scales = arena.template take<float>(columns);
    const Shared<uint32_t> tile = arena.template take<uint32_t>(words);

    const NormForward& norm = args.norm;
    constexpr int across = columns / width;
    const int thread = threadIdx.x, slot = thread % across, group = thread / across;
    const int64_t row_tile = blockIdx.x / column_tiles,
                  left = (blockIdx.x - row_tile * column_tiles) * columns, j = left + slot * width,
                  top = row_tile * rows, row = top + group * rows_each;
    const int count = static_cast<int>(max(int64_t{0}, min(int64_t{width}, norm.columns - j)));

    if (what == Transposing::move) {
        const auto codes = global<const uint8_t>(args.codes, "codes");
        uint8_t moved[rows_each][width] = {};
#pragma unroll
        for (int r = 0; r < rows_each; ++r) {
            if (row + r >= norm.rows) break;
            const int64_t i = (row + r) * norm.columns + j;
            if (aligned && count > 0) {
                const auto loaded = load<width>(codes, i);
#pragma unroll
                for (int k = 0; k < width; ++k) moved[r][k] = loaded[k];
            } else {
#pragma unroll
                for (int k = 0; k < width; ++k) {
                    if (k < count) moved[r][k] = codes[i + k];
                }
            }
        }
#pragma unroll
        for (int k = 0; k < width; ++k) {
            uint32_t packed = 0;
#pragma unroll
            for (int r = 0; r < rows_each; ++r) packed |= static_cast<uint32_t>(moved[r][k]) << (8 * r);
            tile[word(slot * width + k, group)] = packed;
        }
    } else {
        const Beside x{norm.x, norm.x_type, "x"};
        const Beside residual{norm.residual, norm.residual_type, "residual"};
        const Beside weight{norm.weight, norm.weight_type, "weight"};
        const Beside bias{norm.bias, norm.bias_type, "bias"};
        float factor[width] = {}, shift[width] = {}, y[rows_each][width] = {};
        if (count > 0) {
            if (weight) load_some(weight, j, count, aligned, factor);
            if (bias) load_some(bias, j, count, aligned, shift);
#pragma unroll
            for (int k = 0; k < width; ++k) factor[k] += static_cast<float>(norm.weight_offset);
#pragma unroll
            for (int r = 0; r < rows_each; ++r) {
                if (row + r >= norm.rows) break;
                const int64_t i = (row + r) * norm.columns + j;
                load_some(x, i, count, aligned, y[r]);
                if (residual) {
                    float added[width];
                    load_some(residual, i, count, aligned, added);
#pragma unroll
                    for (int k = 0; k < width; ++k) y[r][k] += added[k];
                }
                const float rstd = global<const float>(norm.rstd, "rstd")[row + r];
                const float mean =
                    norm.centred ? float(global<const float>(norm.mean, "mean")[row + r]) : 0.0f;
                normalize(y[r], norm.centred, mean, rstd, bool(weight), factor, bool(bias), shift);
            }
        }

        if (what == Transposing::encode_whole) {
            if (thread < columns && left + thread < norm.columns) {
                scales[thread] = global<const float>(args.scale_t, "scale_t")[left + thread];
            }
        } else {
#pragma unroll
            for (int k = 0; k < width; ++k) {
                uint32_t largest = 0;
#pragma unroll
                for (int r = 0; r < rows_each; ++r) largest = max(largest, magnitude_bits(y[r][k]));
                for (int offset = across; offset < warp_threads; offset *= 2) {
                    largest = max(largest, __shfl_xor_sync(all_lanes, largest, offset));
                }
                if (thread % warp_threads < across) {
                    partials[thread / warp_threads * columns + slot * width + k] = largest;
                }
            }
            __syncthreads();
            if (thread < columns && left + thread < norm.columns) {
                uint32_t largest = 0;
                for (int warp = 0; warp < warps; ++warp) {
                    largest = max(largest, static_cast<uint32_t>(partials[warp * columns + thread]));
                }
                if (what == Transposing::find_largest) {
                    global<uint32_t>(args.largest_t, "largest_t")[row_tile * norm.columns + left + thread] =
                        largest;
                } else {
                    const float scale = bounded_scale<Code>(largest, args.upper_bound);
                    scales[thread] = scale;
                    global<float>(args.scale_t, "scale_t")[(left + thread) * args.segments_t + row_tile] =
                        scale;
                }
            }
            if (what == Transposing::find_largest) return;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < width; ++k) {
            if (k >= count) break;
            const float scale = scales[slot * width + k];
            uint32_t packed = 0;
#pragma unroll
            for (int r = 0; r < rows_each; ++r) {
                const Code code = round_nearest<Code>(y[r][k] / scale);
                packed |= static_cast<uint32_t>(bit_cast<uint8_t>(code)) << (8 * r);
            }
            tile[word(slot * width + k, group)] = packed;
        }
    }
    __syncthreads();

    // 16 bytes of a column at a time.
    const auto bytes = global<uint8_t>(args.codes_t, "codes_t");
    const auto vectors = global<uint32_t>(args.codes_t, "codes_t");
    constexpr int pieces = rows / 16;
    for (int i = thread; i < columns * pieces; i += threads) {
        const int column = i / pieces, piece = i % pieces;
        const int64_t first = top + piece * 16, at = (left + column) * norm.rows + first;
        if (left + column >= norm.columns || first >= norm.rows) continue;
        Vec<uint32_t, 4> four;
#pragma unroll
        for (int w = 0; w < 4; ++w) four[w] = tile[word(column, piece * 4 + w)];
        if (norm.rows % 16 == 0) {
            store<4>(vectors, at / 4, four);
        } else {
#pragma unroll
            for (int b = 0; b < 16; ++b) {
                if (first + b < norm.rows) bytes[at + b] = static_cast<uint8_t>(four[b / 4] >> (8 * (b % 4)));
            }
        }
    }
}

// The scales of whole columns, from the largest magnitudes in each tile of rows.
template <class Code>
__global__ void __launch_bounds__(tile* tile) norm_quant_column_scales_kernel(NormQuant args, int64_t tiles) {
    SharedArena arena;
    const Shared<uint32_t> maxima = arena.template take<uint32_t>(tile * tile);
    const int64_t columns = args.norm.columns, j = static_cast<int64_t>(blockIdx.x) * tile + threadIdx.x;
    const auto found = global<const uint32_t>(args.largest_t, "largest_t");
    uint32_t largest = 0;
    if (j < columns) {
        for (int64_t i = threadIdx.y; i < tiles; i += tile) {
            largest = max(largest, static_cast<uint32_t>(found[i * columns + j]));
        }
    }
    maxima[threadIdx.y * tile + threadIdx.x] = largest;
    __syncthreads();
    if (threadIdx.y != 0 || j >= columns) return;
    for (int y = 1; y < tile; ++y) {
        largest = max(largest, static_cast<uint32_t>(maxima[y * tile + threadIdx.x]));
    }
    global<float>(args.scale_t, "scale_t")[j] = bounded_scale<Code>(largest, args.upper_bound);
}

}  // namespace narrowgauge
