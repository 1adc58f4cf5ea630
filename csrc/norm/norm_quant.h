// Arguments of a norm whose result is quantized without ever being written:
//
//     y = norm(x (+ residual))          scale = max|y| / largest code          code = round(y / scale)
//
// and of the transposed copy: the same y as a matrix of `columns` rows, quantized along these.
#pragma once

#include "norm/norm.h"
#include "quant/codes.h"

namespace narrowgauge {

struct NormQuant {
    NormForward norm;    // y is not used
    const float* given;  // the scale of everything, or null: scales are found
    void* codes;
    float* scale;               // unless given; [rows, segments]
    void* codes_t;              // [columns, rows]
    float* scale_t;             // unless given; [columns, segments_t]
    uint32_t* largest_t;        // [tiles of rows, columns], working memory of whole_columns
    int64_t segment, segments;  // elements of a row that share a scale (fewer in the last), scales of a row
    int64_t segments_t;
    float upper_bound;   // of the scales found
    bool transposed;     // with the transposed copy
    bool whole_columns;  // whose scales serve all rows, not kNormQuantTile of them
    DType code_type;
};

// How many rows of x the transposed copy is made of at a time: as many as share a scale under "block".
constexpr int64_t kNormQuantTile = 128;

}  // namespace narrowgauge

NG_NAMESPACE_BEGIN

template <class Code>
NG_HOST_DEVICE float bounded_scale(uint32_t largest, float upper_bound) {
    const float scale = scale_of<Code>(bit_cast<float>(largest));
    return largest > 0 && scale > upper_bound ? upper_bound : scale;
}

// A scale that was given cannot tell of a NaN, so the code does, where its format has one.
template <class Code>
NG_HOST_DEVICE Code round_to_given(float v) {
    return from_float<Code>(v == v ? v : bit_cast<float>(0x7fc00000u));
}
template <>
NG_HOST_DEVICE int8_t round_to_given<int8_t>(float v) {
    return round_nearest<int8_t>(v);
}

NG_NAMESPACE_END

NG_CPU_KERNEL(void, norm_quant_rows, (const NormQuant& args, int64_t begin, int64_t end))
// Tiles of kNormQuantTile rows, with the transposed copy where its scales need no other tile.
NG_CPU_KERNEL(void, norm_quant_tiles, (const NormQuant& args, int64_t begin, int64_t end))
// For whole_columns: the scales of columns, then the transposed copy of tiles.
NG_CPU_KERNEL(void, norm_quant_column_scales, (const NormQuant& args, int64_t begin, int64_t end))
NG_CPU_KERNEL(void, norm_quant_transposed_tiles, (const NormQuant& args, int64_t begin, int64_t end))
