// What the bindings call to run the CUDA kernels of the LayerNorm / RMSNorm family.
#pragma once

#include "common/stream.h"
#include "norm/norm.h"

namespace narrowgauge {

void launch_norm_forward(const NormForward& args, Stream stream);

// How many rows of partial sums launch_norm_backward will write, on the current device.
int64_t norm_backward_chunks_on_device(const NormBackward& args);
void launch_norm_backward(const NormBackward& args, Stream stream);

}  // namespace narrowgauge
