// Arguments of the operators that encode and decode one state.
#pragma once

#include "common/cpu.h"
#include "optim/state_format.h"

namespace narrowgauge {

struct StateEncode {
    const void* x;
    void* codes;
    void* scales;
    int64_t numel;
    StateFormat format;
    bool is_signed;
    DType x_type;
};

struct StateDecode {
    const void* codes;
    const void* scales;
    float* values;
    int64_t numel;
    StateFormat format;
    bool is_signed;
};

}  // namespace narrowgauge

NG_CPU_KERNEL(void, state_encode_chunks, (const StateEncode& args, int64_t begin, int64_t end))
NG_CPU_KERNEL(void, state_decode_chunks, (const StateDecode& args, int64_t begin, int64_t end))
