// What the binding calls to run the CUDA kernels of cross-entropy.
#pragma once

#include "common/stream.h"
#include "norm/cross_entropy.h"

namespace narrowgauge {

void launch_cross_entropy(const CrossEntropy& args, Stream stream);
void launch_scale_rows(const ScaleRows& args, Stream stream);

}  // namespace narrowgauge
