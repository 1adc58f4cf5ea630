// CUDA kernels of quantize and dequantize.
#pragma once

#include "quant/encode.cuh"

namespace narrowgauge {

// Divides in 32 bits where they suffice: a GPU divides 64-bit integers in software.
__device__ __forceinline__ int64_t quotient(int64_t i, int64_t by) {
    if (i <= 0xffffffffll && by <= 0xffffffffll) {
        return static_cast<int64_t>(static_cast<uint32_t>(i) / static_cast<uint32_t>(by));
    }
    return i / by;
}

// --- one scale per row, or per segment of a row --------------------------------------------------

// Consecutive groups of `threads_per_segment` threads take a segment each; a thread holds `Vectors` vectors
// of it, so that it is read once. Vectors = 0 stands for a segment too long for that: it is read again for
// the codes.
template <class T, class Code, int Width, int Vectors>
__global__ void __launch_bounds__(512, 1)
    quantize_segments_kernel(Quantize args, int threads_per_segment, bool aligned) {
    SharedArena arena;
    const Shared<uint32_t> partials = arena.template take<uint32_t>(max_warps);
    const int lane = threadIdx.x % threads_per_segment;
    const int64_t group = static_cast<int64_t>(blockIdx.x) * (blockDim.x / threads_per_segment) +
                          threadIdx.x / threads_per_segment;
    const int64_t row = quotient(group, args.segments), left = (group - row * args.segments) * args.segment;
    const int64_t columns = min(args.segment, args.columns - left), base = row * args.columns + left;
    const bool active = row < args.rows;  // idle groups still take part in the reduction
    const int64_t stride = static_cast<int64_t>(threads_per_segment) * Width,
                  first = active ? lane * Width : columns;
    const auto x = global<const T>(args.x, "x");

    constexpr bool in_registers = Vectors > 0;
    Vec<T, Width> kept[in_registers ? Vectors : 1];
    uint32_t largest = 0;
    if constexpr (in_registers) {
#pragma unroll
        for (int v = 0; v < Vectors; ++v) {
            if (first + v * stride < columns) {
                kept[v] = load_elements<Width>(x, base + first + v * stride, aligned);
                largest = largest_of(kept[v], largest);
            }
        }
    } else {
        for (int64_t j = first; j < columns; j += stride) {
            largest = largest_of(load_elements<Width>(x, base + j, aligned), largest);
        }
    }
    const float scale =
        scale_of<Code>(magnitude_to_float<T>(group_max(largest, threads_per_segment, partials)));
    if (active && lane == 0) global<float>(args.scale, "scale")[group] = scale;

    const Encoder<Code> encoder(args);
    const auto scale_at = [=](int) { return scale; };
    if constexpr (in_registers) {
#pragma unroll
        for (int v = 0; v < Vectors; ++v) {
            if (first + v * stride < columns) encoder.encode(base + first + v * stride, kept[v], scale_at);
        }
    } else {
        for (int64_t j = first; j < columns; j += stride) {
            encoder.encode(base + j, load_elements<Width>(x, base + j, aligned), scale_at);
        }
    }
}

// --- one scale for the whole tensor --------------------------------------------------------------

// Every block writes the largest magnitude among its elements.
template <class T>
__global__ void __launch_bounds__(256, 1) quantize_find_largest_kernel(Quantize args, bool aligned) {
    constexpr int Width = vector_width<T>;
    SharedArena arena;
    const Shared<uint32_t> partials = arena.template take<uint32_t>(max_warps);
    const int64_t total = args.rows * args.columns, vectors = total / Width;
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
    const auto x = global<const T>(args.x, "x");
    uint32_t largest = 0;
    for (int64_t v = thread; v < vectors; v += threads) {
        largest = largest_of(load_elements<Width>(x, v * Width, aligned), largest);
    }
    for (int64_t i = vectors * Width + thread; i < total; i += threads)
        largest = largest_of(load<1>(x, i), largest);
    largest = group_max(largest, blockDim.x, partials);
    if (threadIdx.x == 0) global<uint32_t>(args.largest, "largest")[blockIdx.x] = largest;
}

// Every block finds the scale from the partial results.
template <class T, class Code>
__global__ void __launch_bounds__(256, 1) quantize_encode_kernel(Quantize args, bool aligned) {
    constexpr int Width = vector_width<T>;
    SharedArena arena;
    const Shared<uint32_t> partials = arena.template take<uint32_t>(max_warps);
    const auto found = global<const uint32_t>(args.largest, "largest");
    uint32_t largest = 0;
    for (int64_t chunk = threadIdx.x; chunk < args.chunks; chunk += blockDim.x) {
        largest = max(largest, static_cast<uint32_t>(found[chunk]));
    }
    const float scale = scale_of<Code>(magnitude_to_float<T>(group_max(largest, blockDim.x, partials)));
    if (blockIdx.x == 0 && threadIdx.x == 0) global<float>(args.scale, "scale")[0] = scale;

    const int64_t total = args.rows * args.columns, vectors = total / Width;
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
    const auto x = global<const T>(args.x, "x");
    const Encoder<Code> encoder(args);
    const auto scale_at = [=](int) { return scale; };
    for (int64_t v = thread; v < vectors; v += threads) {
        encoder.encode(v * Width, load_elements<Width>(x, v * Width, aligned), scale_at);
    }
    for (int64_t i = vectors * Width + thread; i < total; i += threads)
        encoder.encode(i, load<1>(x, i), scale_at);
}

// --- one scale per column ------------------------------------------------------------------------

// Blocks of 8 x 32 threads: block (x, c) takes the rows of chunk c in 8 * Width columns.
constexpr int column_threads = 8, column_rows = 32;

// The largest magnitude in each column of a chunk.
template <class T, int Width>
__global__ void __launch_bounds__(256, 1) quantize_find_largest_columns_kernel(Quantize args, bool aligned) {
    constexpr int warps = column_threads * column_rows / warp_threads, tile = column_threads * Width;
    SharedArena arena;
    const Shared<uint32_t> partials = arena.template take<uint32_t>(warps * tile);
    const int thread = threadIdx.y * column_threads + threadIdx.x;
    const int64_t left = static_cast<int64_t>(blockIdx.x) * tile, j = left + threadIdx.x * Width;
    const int64_t last = args.rows * (blockIdx.y + 1) / args.chunks;
    const auto x = global<const T>(args.x, "x");
    uint32_t largest[Width] = {};
    if (j < args.columns) {
        for (int64_t row = args.rows * blockIdx.y / args.chunks + threadIdx.y; row < last;
             row += column_rows) {
            const auto loaded = load_elements<Width>(x, row * args.columns + j, aligned);
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                largest[k] = max(largest[k], static_cast<uint32_t>(magnitude_bits(loaded[k])));
            }
        }
    }
#pragma unroll
    for (int k = 0; k < Width; ++k) {
        for (int offset = column_threads; offset < warp_threads; offset *= 2) {
            largest[k] = max(largest[k], __shfl_xor_sync(all_lanes, largest[k], offset));
        }
        if (thread % warp_threads < column_threads) {
            partials[thread / warp_threads * tile + threadIdx.x * Width + k] = largest[k];
        }
    }
    __syncthreads();
    if (thread < tile && left + thread < args.columns) {
        uint32_t column_largest = 0;
        for (int warp = 0; warp < warps; ++warp) {
            column_largest = max(column_largest, static_cast<uint32_t>(partials[warp * tile + thread]));
        }
        global<uint32_t>(args.largest, "largest")[blockIdx.y * args.columns + left + thread] = column_largest;
    }
}

template <class T, class Code, int Width>
__global__ void __launch_bounds__(256, 1) quantize_encode_columns_kernel(Quantize args, bool aligned) {
    constexpr int tile = column_threads * Width;
    SharedArena arena;
    const Shared<float> scales = arena.template take<float>(tile);
    const int thread = threadIdx.y * column_threads + threadIdx.x;
    const int64_t left = static_cast<int64_t>(blockIdx.x) * tile, j = left + threadIdx.x * Width;
    if (thread < tile && left + thread < args.columns) {
        const auto found = global<const uint32_t>(args.largest, "largest");
        uint32_t largest = 0;
        for (int64_t chunk = 0; chunk < args.chunks; ++chunk) {
            largest = max(largest, static_cast<uint32_t>(found[chunk * args.columns + left + thread]));
        }
        const float scale = scale_of<Code>(magnitude_to_float<T>(largest));
        scales[thread] = scale;
        if (blockIdx.y == 0) global<float>(args.scale, "scale")[left + thread] = scale;
    }
    __syncthreads();
    if (j >= args.columns) return;
    float scale[Width];
#pragma unroll
    for (int k = 0; k < Width; ++k) scale[k] = scales[threadIdx.x * Width + k];

    const int64_t last = args.rows * (blockIdx.y + 1) / args.chunks;
    const auto x = global<const T>(args.x, "x");
    const Encoder<Code> encoder(args);
    for (int64_t row = args.rows * blockIdx.y / args.chunks + threadIdx.y; row < last; row += column_rows) {
        const int64_t i = row * args.columns + j;
        encoder.encode(i, load_elements<Width>(x, i, aligned), [&](int k) { return scale[k]; });
    }
}

// --- dequantize ----------------------------------------------------------------------------------

// A vector lies within a row.
template <class Code, class Y, int Width>
__global__ void __launch_bounds__(256, 1) dequantize_kernel(Dequantize args, bool aligned) {
    const int64_t vectors = args.rows * args.columns / Width;
    const auto codes = global<const Code>(args.codes, "codes");
    const auto scale = global<const float>(args.scale, "scale");
    const auto y = global<Y>(args.y, "y");
    const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t v = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; v < vectors; v += threads) {
        const int64_t i = v * Width;
        const int64_t row = args.granularity == Granularity::tensor ? 0 : quotient(i, args.columns);
        int64_t segment = row;
        if (args.segments != 1) {
            segment = row * args.segments + quotient(i - row * args.columns, args.segment);
        }
        const auto loaded = load_elements<Width>(codes, i, aligned);
        Vec<Y, Width> values;
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            const int64_t group =
                args.granularity == Granularity::column ? i + k - row * args.columns : segment;
            values[k] = from_float<Y>(to_float(loaded[k]) * float(scale[group]));
        }
        store<Width>(y, i, values);
    }
}

}  // namespace narrowgauge
