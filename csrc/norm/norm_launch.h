// What the bindings call to run the CUDA kernels of the LayerNorm / RMSNorm family.
#pragma once

#include "norm/norm.h"

#if NARROWGAUGE_EMULATOR
#include "common/device.h"
#else
#include <cuda_runtime_api.h>
namespace narrowgauge {
using Stream = cudaStream_t;
}
#endif

namespace narrowgauge {

void launch_norm_forward(const NormForward& args, Stream stream);

// How many rows of partial sums launch_norm_backward will write, on the current device.
int64_t norm_backward_chunks_on_device(const NormBackward& args);
void launch_norm_backward(const NormBackward& args, Stream stream);

void launch_norm_reduce(const NormReduce& args, Stream stream);

}  // namespace narrowgauge
