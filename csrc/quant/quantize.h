// Arguments of quantize and dequantize.
//
//     scale = max|x| over a group / largest code          code = round(x / scale)
//
// A group is the whole tensor, a row, a column, or a segment of a row, of x seen as rows of contiguous
// elements. A row is one segment, unless it is cut into blocks.
#pragma once

#include "common/cpu.h"
#include "common/dtype.h"

namespace narrowgauge {

enum class Granularity { tensor, row, column };

struct Quantize {
    const void* x;
    const int64_t* rng;  // or null; [seed, offset]
    const float* noise;  // or null; like x
    void* codes;
    float* scale;
    uint32_t* largest;  // working memory: the largest magnitudes of each chunk
    int64_t rows, columns, chunks;
    int64_t segment, segments;  // elements of a row that share a scale (fewer in the last), scales of a row
    Granularity granularity;
    DType x_type, code_type;
};

struct Dequantize {
    const void* codes;
    const float* scale;
    void* y;
    int64_t rows, columns, segment, segments;
    Granularity granularity;
    DType code_type, y_type;
};

// How many consecutive elements of a row are a block.
constexpr int64_t kQuantizeBlock = 128;
// How many consecutive elements the CPU kernels of a whole tensor take at a time.
constexpr int64_t kQuantizeChunk = 32768;
// How many neighbouring columns the CPU kernel of columns takes at a time.
constexpr int64_t kQuantizeColumns = 64;

}  // namespace narrowgauge

NG_CPU_KERNEL(void, quantize_segments, (const Quantize& args, int64_t begin, int64_t end))
NG_CPU_KERNEL(void, quantize_column_tiles, (const Quantize& args, int64_t begin, int64_t end))
NG_CPU_KERNEL(void, quantize_find_largest, (const Quantize& args, int64_t begin, int64_t end))
NG_CPU_KERNEL(float, quantize_tensor_scale, (const Quantize& args))
NG_CPU_KERNEL(void, quantize_encode_chunks, (const Quantize& args, int64_t begin, int64_t end))
NG_CPU_KERNEL(void, dequantize_elements, (const Dequantize& args, int64_t begin, int64_t end))
