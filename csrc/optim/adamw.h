// What the binding of AdamW calls: its kernel over chunks on the CPU, its launches on CUDA.
#pragma once

#include "common/cpu.h"
#include "optim/adamw_rule.h"
#include "optim/elementwise.h"

#if NARROWGAUGE_CPU

// `tensors` points to ElementwiseTensor<3> with amsgrad, <2> without.
NG_CPU_KERNEL(void, adamw_chunks,
              (const ElementwiseArgs<AdamWOptions>& args, const void* tensors, int64_t begin, int64_t end))

#else

#if NARROWGAUGE_EMULATOR
#include "common/device.h"
#else
#include <cuda_runtime_api.h>
namespace narrowgauge {
using Stream = cudaStream_t;
}
#endif

namespace narrowgauge {

void launch_adamw(const ElementwiseLaunch<2, AdamWOptions>& launch, Stream stream);
void launch_adamw(const ElementwiseLaunch<3, AdamWOptions>& launch, Stream stream);

}  // namespace narrowgauge

#endif
