// Arguments of RMSNorm whose result is quantized row by row, without ever being written:
//
//     y = rms_norm(x (+ residual))          scale = max|y| / largest code          code = round(y / scale)
#pragma once

#include "norm/norm.h"
#include "quant/quantize.h"

#if !NARROWGAUGE_CPU
#include "common/stream.h"
#endif

namespace narrowgauge {

struct RmsNormQuant {
    NormForward norm;   // y, mean and rstd are not used
    Quantize quantize;  // codes, scale and code_type
};

#if !NARROWGAUGE_CPU
void launch_rms_norm_quant(const RmsNormQuant& args, Stream stream);
#endif

}  // namespace narrowgauge
