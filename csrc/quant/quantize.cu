// Launches of the quantization kernels.
#include <algorithm>

#include "quant/quantize.cuh"
#include "quant/quantize_launch.h"

namespace narrowgauge {
namespace {

constexpr int kBlockThreads = 256;
constexpr int kRowVectors = 4;  // a thread holds this many vectors of its segment in registers

unsigned blocks_for(int64_t work, int64_t per_block) {
    return static_cast<unsigned>((work + per_block - 1) / per_block);
}

// Enough threads to hold a segment in registers; 512 threads read a longer one twice.
int threads_per_segment(int64_t vectors) {
    int threads = 8;
    while (threads < 512 && threads * kRowVectors < vectors) threads *= 2;
    return threads;
}

bool is_aligned_to_vectors(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class T, class Code, int Width>
void launch_segments(const Quantize& args, Stream stream) {
    const int64_t vectors = (args.segment + Width - 1) / Width;
    const int threads = threads_per_segment(vectors), block = std::max(threads, 128);
    const LaunchConfig config{dim3(blocks_for(args.rows * args.segments, block / threads)),
                              dim3(static_cast<unsigned>(block)), max_warps * sizeof(uint32_t), 1, stream};
    const bool aligned = Width == 1 || is_aligned_to_vectors(args.x);
    if (Width > 1 && vectors <= threads * kRowVectors) {
        launch(config, quantize_segments_kernel<T, Code, Width, kRowVectors>, args, threads, aligned);
    } else {
        launch(config, quantize_segments_kernel<T, Code, Width, 0>, args, threads, aligned);
    }
}

template <class T, class Code>
void launch_tensor(const Quantize& args, Stream stream) {
    const LaunchConfig config{dim3(static_cast<unsigned>(args.chunks)), dim3(kBlockThreads),
                              max_warps * sizeof(uint32_t), 1, stream};
    const bool aligned = is_aligned_to_vectors(args.x);
    launch(config, quantize_find_largest_kernel<T>, args, aligned);
    launch(config, quantize_encode_kernel<T, Code>, args, aligned);
}

template <class T, class Code, int Width>
void launch_columns(const Quantize& args, Stream stream) {
    constexpr int tile = column_threads * Width;
    LaunchConfig config{dim3(blocks_for(args.columns, tile), static_cast<unsigned>(args.chunks)),
                        dim3(column_threads, column_rows), 0, 1, stream};
    const bool aligned = Width == 1 || is_aligned_to_vectors(args.x);
    config.shared_bytes = column_threads * column_rows / warp_threads * tile * sizeof(uint32_t);
    launch(config, quantize_find_largest_columns_kernel<T, Width>, args, aligned);
    config.shared_bytes = tile * sizeof(float);
    launch(config, quantize_encode_columns_kernel<T, Code, Width>, args, aligned);
}

template <class T, class Code>
void launch_quantize_to(const Quantize& args, Stream stream) {
    constexpr int Width = vector_width<T>;
    const bool vectors = args.columns % Width == 0;
    if (args.granularity == Granularity::tensor) return launch_tensor<T, Code>(args, stream);
    if (args.granularity == Granularity::row) {
        if (args.rows * args.segments == 0) return;
        return vectors ? launch_segments<T, Code, Width>(args, stream)
                       : launch_segments<T, Code, 1>(args, stream);
    }
    if (args.columns == 0) return;
    return vectors ? launch_columns<T, Code, Width>(args, stream) : launch_columns<T, Code, 1>(args, stream);
}

template <class T>
void launch_quantize_from(const Quantize& args, Stream stream) {
    if (args.code_type == DType::int8) return launch_quantize_to<T, int8_t>(args, stream);
    if (args.code_type == DType::e4m3) return launch_quantize_to<T, e4m3>(args, stream);
    return launch_quantize_to<T, e5m2>(args, stream);
}

template <class Code, class Y>
void launch_dequantize_to(const Dequantize& args, Stream stream) {
    constexpr int Width = vector_width<Y>;
    const int64_t total = args.rows * args.columns;
    if (total == 0) return;
    // A vector holds Width codes: as many bytes as it has elements.
    const bool aligned = reinterpret_cast<uintptr_t>(args.codes) % Width == 0;
    const bool whole = args.columns % Width == 0;
    const int64_t blocks = blocks_for(total, int64_t{kBlockThreads} * (whole ? Width : 1));
    const LaunchConfig config{dim3(static_cast<unsigned>(std::min<int64_t>(blocks, 1 << 20))),
                              dim3(kBlockThreads), 0, 1, stream};
    if (whole) {
        launch(config, dequantize_kernel<Code, Y, Width>, args, aligned);
    } else {
        launch(config, dequantize_kernel<Code, Y, 1>, args, true);
    }
}

template <class Code>
void launch_dequantize_from(const Dequantize& args, Stream stream) {
    if (args.y_type == DType::bfloat16) return launch_dequantize_to<Code, bf16>(args, stream);
    if (args.y_type == DType::float16) return launch_dequantize_to<Code, f16>(args, stream);
    return launch_dequantize_to<Code, float>(args, stream);
}

}  // namespace

int64_t quantize_chunks(const Quantize& args) {
    switch (args.granularity) {
        case Granularity::row:
            return 0;
        case Granularity::column:
            return std::clamp<int64_t>(args.rows / 128, 1, 64);
        default:
            // Blocks that fill the device a few times, each with a few vectors per thread.
            return std::clamp<int64_t>(args.rows * args.columns / (kBlockThreads * 32), 1,
                                       8 * multiprocessor_count());
    }
}

void launch_quantize(const Quantize& args, Stream stream) {
    if (args.x_type == DType::bfloat16) return launch_quantize_from<bf16>(args, stream);
    if (args.x_type == DType::float16) return launch_quantize_from<f16>(args, stream);
    return launch_quantize_from<float>(args, stream);
}

void launch_dequantize(const Dequantize& args, Stream stream) {
    if (args.code_type == DType::int8) return launch_dequantize_from<int8_t>(args, stream);
    if (args.code_type == DType::e4m3) return launch_dequantize_from<e4m3>(args, stream);
    return launch_dequantize_from<e5m2>(args, stream);
}

}  // namespace narrowgauge
