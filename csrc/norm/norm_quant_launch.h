// What the binding calls to run the CUDA kernels of a norm with a quantized result.
#pragma once

#include "common/stream.h"
#include "norm/norm_quant.h"

namespace narrowgauge {

void launch_norm_quant(const NormQuant& args, Stream stream);

}  // namespace narrowgauge
