// What the binding of the general row norm calls to run its CUDA kernels.
#pragma once

#include "common/stream.h"
#include "norm/general_norm.h"

namespace narrowgauge {

void launch_general_norm_forward(const GeneralForward& args, Stream stream);

// How many rows of partial sums launch_general_norm_backward will write, on the current device.
int64_t general_norm_backward_chunks_on_device(const GeneralBackward& args);
void launch_general_norm_backward(const GeneralBackward& args, Stream stream);

}  // namespace narrowgauge
