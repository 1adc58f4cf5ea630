// What the bindings call to run the CUDA kernels of quantize and dequantize.
#pragma once

#include "common/stream.h"
#include "quant/quantize.h"

namespace narrowgauge {

// Into how many chunks the search for the largest magnitudes is cut; each writes one value per group.
int64_t quantize_chunks(const Quantize& args);
void launch_quantize(const Quantize& args, Stream stream);
void launch_dequantize(const Dequantize& args, Stream stream);

}  // namespace narrowgauge
