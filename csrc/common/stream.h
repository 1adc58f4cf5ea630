// The type of a CUDA stream, for headers that a binding and a .cu file share.
#pragma once

#if NARROWGAUGE_EMULATOR
#include "common/device.h"
#else
#include <cuda_runtime_api.h>
namespace narrowgauge {
using Stream = cudaStream_t;
}
#endif
