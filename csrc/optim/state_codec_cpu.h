// Encoding and decoding optimizer states on the CPU, for kernel files of one instruction set.
#pragma once

#include "optim/state_format.h"

NG_NAMESPACE_BEGIN

// `codes` and `scales` are those of the whole state. Elements [begin, begin + n), with begin a multiple of
// state_chunk and n at most state_chunk; `values` holds state_chunk floats whatever n is, and those behind
// the first n are overwritten. Not for fp32, which needs no copy.
void decode_state_block(StateFormat format, bool is_signed, const void* codes, const void* scales,
                        int64_t begin, int n, float* values);
void encode_state_block(StateFormat format, bool is_signed, const float* values, int64_t begin, int n,
                        void* codes, void* scales);

NG_NAMESPACE_END
