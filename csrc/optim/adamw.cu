// Instantiations of the CUDA kernels of AdamW.
#include "optim/adamw.h"
#include "optim/elementwise.cuh"

namespace narrowgauge {

void launch_adamw(const ElementwiseLaunch<2, AdamWOptions>& launch, Stream stream) {
    launch_elementwise<AdamW<false>>(launch, stream);
}

void launch_adamw(const ElementwiseLaunch<3, AdamWOptions>& launch, Stream stream) {
    launch_elementwise<AdamW<true>>(launch, stream);
}

}  // namespace narrowgauge
