// How optimizer states are stored (python/narrowgauge/optim/codec.py is the definition): plain data, shared
// by bindings, CPU kernels and CUDA kernels.
#pragma once

#include "common/dtype.h"

namespace narrowgauge {

// In the order of the numbers in codec.py.
enum class StateFormat : int32_t { fp32, bf16, int8, int4, fp8, fp8_expanded, int8_companded };

constexpr int state_formats = 7;

// The codec functions take this many consecutive elements at a time: a whole number of blocks in every
// format.
constexpr int state_chunk = 256;

}  // namespace narrowgauge

NG_NAMESPACE_BEGIN

// How many consecutive elements share a scale; 0 when there is none.
NG_HOST_DEVICE constexpr int state_block_size(StateFormat format) {
    switch (format) {
        case StateFormat::int8:
        case StateFormat::fp8:
            return 256;
        case StateFormat::int4:
        case StateFormat::fp8_expanded:
            return 128;
        case StateFormat::int8_companded:
            return 32;
        default:
            return 0;
    }
}

NG_HOST_DEVICE constexpr bool has_codes(StateFormat format) { return state_block_size(format) != 0; }

// Numbers per block: fp8_expanded has scale, exponent and center.
NG_HOST_DEVICE constexpr int state_scale_columns(StateFormat format) {
    return format == StateFormat::fp8_expanded ? 3 : 1;
}

// Two codes share a byte, the first in the high half.
NG_HOST_DEVICE constexpr bool is_packed(StateFormat format) { return format == StateFormat::int4; }

NG_HOST_DEVICE constexpr DType state_codes_type(StateFormat format, bool is_signed) {
    switch (format) {
        case StateFormat::fp32:
            return DType::float32;
        case StateFormat::bf16:
            return DType::bfloat16;
        case StateFormat::int8_companded:
            return is_signed ? DType::int8 : DType::uint8;
        default:
            return DType::uint8;
    }
}

NG_HOST_DEVICE constexpr DType state_scale_type(StateFormat format) {
    return format == StateFormat::int8_companded ? DType::float16 : DType::float32;
}

// Elements of the tensors `codes` and `scale` of a state of `numel` elements.
NG_HOST_DEVICE constexpr int64_t state_codes_numel(StateFormat format, int64_t numel) {
    return is_packed(format) ? (numel + 1) / 2 : numel;
}
NG_HOST_DEVICE constexpr int64_t state_scale_numel(StateFormat format, int64_t numel) {
    const int block = state_block_size(format);
    return block == 0 ? 0 : (numel + block - 1) / block * state_scale_columns(format);
}

NG_NAMESPACE_END
